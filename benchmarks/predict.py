"""A support set prefilled once against plain ``generate`` over the whole prompt, on a random LLaVA of 150 M parameters.

    python -m benchmarks.predict [--small] [--store]

32 queries on an 8-shot support set (2 classes, 16 images of 144 tokens), with 8 new tokens each. The time of the
prefilled side includes the prefill. Then the time per query at 16 shots against 2 shots, without the prefill.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import THREADS, finish, options_of, parser, random_model
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.recipe.sources import EpisodeOptions

QUERIES = 32
NEW_TOKENS = 8


def episode(shots: int, queries: int = QUERIES) -> tuple[tuple[Turn, ...], list[Turn]]:
    """A support set and many queries, drawn from the shipped pictures."""
    options = EpisodeOptions(shots=[shots], queries=queries, further_views=4)
    conversation = from_episode(episodes.draw(read_pocket("held_out", min_pictures=5), options, 0, 0, 0), WORDINGS["short"])
    return conversation.shared, [branch[0] for branch in conversation.branches]


def plain(base: Base, support: tuple[Turn, ...], queries: list[Turn]) -> tuple[list[str], float]:
    """Every query with the whole support set, by plain ``generate``. Returns the texts and the seconds."""
    encoder, pixels = base.encoder(), Predictor(base).vision.pixels
    texts = []
    began = time.perf_counter()
    for query in queries:
        ids = torch.tensor([encoder.turns([*support, query], opened=True)[0]], device=base.device)
        images = pixels([t.picture for t in (*support, query) if t.picture is not None])
        new_ids = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **images,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=encoder.eos,
            pad_token_id=encoder.pad,
        )
        texts.append(encoder.tokenizer.decode(new_ids[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts, time.perf_counter() - began


def prefilled(base: Base, support: tuple[Turn, ...], queries: list[Turn]) -> tuple[list[str], float, float]:
    """The support set prefilled once. Returns the texts, all seconds, and the seconds of the queries alone."""
    predictor = Predictor(base, max_new_tokens=NEW_TOKENS)
    began = time.perf_counter()
    ready = predictor.prefill([support])
    prefilled_at = time.perf_counter()
    replies = predictor.ask(ready, [Question(0, q) for q in queries])
    ended = time.perf_counter()
    return [reply.text for reply in replies], ended - began, ended - prefilled_at


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(parser(__doc__), "benchmarks.predict", arguments)
    torch.set_num_threads(THREADS)
    base = load_base(str(random_model(options.small)))
    count, shots, (less, more) = (4, 2, (1, 2)) if options.small else (QUERIES, 8, (2, 16))
    support, queries = episode(shots, count)
    prefilled(base, support, queries[:2])  # warm-up
    cached_texts, cached, _ = prefilled(base, support, queries)
    plain_texts, uncached = plain(base, support, queries)
    same = sum(a == b for a, b in zip(cached_texts, plain_texts, strict=True))

    few, many = episode(less, count), episode(more, count)
    times = [(prefilled(base, *few)[2], prefilled(base, *many)[2]) for _ in range(1 if options.small else 3)]
    growth = statistics.median(longer / shorter for shorter, longer in times)
    rows = [
        (f"{count} queries, {shots} shots: plain / prefilled", f"{uncached / cached:.1f}", "at least 10"),
        (f"same answers, of {count}", str(same), str(count)),
        (f"a query at {more} shots / at {less} shots", f"{growth:.2f}", "at most 1.25"),
    ]
    ratios = {"prefilled_speedup": uncached / cached, "same_answers": same / count, "time_16_over_2_shots": growth}
    return finish(options, "predict", ("measure", "ratio", "bound"), rows, ratios, {"queries": count, "same answers": same})


if __name__ == "__main__":
    main()
