"""A support set read once against plain ``generate`` over the whole prompt, on a random LLaVA of about 150 M parameters.

    python -m benchmarks.predict

32 queries on an 8-shot support set (2 classes, 16 images of 144 tokens), 8 new tokens each. The prefilled side's time
includes reading the support set. Then the time a query at 16 shots against that at 2, the support set being read.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.common import THREADS, finish, random_model
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.recipe.sources import EpisodeOptions

QUERIES = 32
NEW_TOKENS = 8


def episode(shots: int, queries: int = QUERIES) -> tuple[tuple[Turn, ...], list[Turn]]:
    """One support set and many queries, drawn from the shipped pictures."""
    options = EpisodeOptions(shots=[shots], queries=queries, further_views=4)
    spoken = from_episode(episodes.draw(read_pocket("held_out", min_pictures=5), options, 0, 0, 0), WORDINGS["short"])
    return spoken.shared, [branch[0] for branch in spoken.branches]


def plain(base: Base, support: tuple[Turn, ...], queries: list[Turn]) -> tuple[list[str], float]:
    """Every query with the whole support set, as one calls generate."""
    encoder, pixels = base.encoder(), Predictor(base).vision.pixels
    texts = []
    began = time.perf_counter()
    for query in queries:
        ids = torch.tensor([encoder.turns([*support, query], opened=True)[0]])
        images = pixels([t.picture for t in (*support, query) if t.picture is not None])
        made = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=encoder.eos,
            pad_token_id=encoder.pad,
        )
        texts.append(encoder.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts, time.perf_counter() - began


def prefilled(base: Base, support: tuple[Turn, ...], queries: list[Turn]) -> tuple[list[str], float, float]:
    """The support set read once; texts, all seconds, and those of the queries alone."""
    predictor = Predictor(base, max_new_tokens=NEW_TOKENS)
    began = time.perf_counter()
    ready = predictor.prefill([support])
    read = time.perf_counter()
    replies = predictor.ask(ready, [Question(0, q) for q in queries])
    done = time.perf_counter()
    return [r.text for r in replies], done - began, done - read


def main() -> None:
    torch.set_num_threads(THREADS)
    base = load_base(str(random_model()))
    support, queries = episode(8)
    prefilled(base, support, queries[:2])  # warm
    cached_texts, cached, _ = prefilled(base, support, queries)
    plain_texts, whole = plain(base, support, queries)
    same = sum(a == b for a, b in zip(cached_texts, plain_texts, strict=True))

    few, many = episode(2), episode(16)
    times: dict[str, list[float]] = {"2": [], "16": []}
    for _ in range(3):
        times["2"].append(prefilled(base, *few)[2])
        times["16"].append(prefilled(base, *many)[2])
    growth = statistics.median(b / a for a, b in zip(times["2"], times["16"], strict=True))
    rows = [
        ("32 queries, 8 shots: plain / prefilled", f"{whole / cached:.1f}", "at least 5"),
        ("same answers, of 32", str(same), "32"),
        ("a query at 16 shots / at 2 shots", f"{growth:.2f}", "at most 1.5"),
    ]
    ratios = {"prefilled_speedup": whole / cached, "same_answers": same / QUERIES, "time_16_over_2_shots": growth}
    finish("predict", ("measure", "ratio", "bound"), rows, ratios)


if __name__ == "__main__":
    main()
