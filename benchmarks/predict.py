"""A support set prefilled once against plain ``generate`` over the whole prompt, on a random LLaVA of 150 M parameters.

    python -m benchmarks.predict [--small] [--store]

32 queries on an 8-shot support set (2 classes, 16 images of 144 tokens), with 8 new tokens each. The time of the
prefilled side includes the prefill. Plain ``generate`` answers every fourth query, and its time is taken four times.

Then the time per query at 16 shots against 2 shots, without the prefill, and the time to add a photo to an independent set of
31 photos against that of reading one photo alone; both encode the photo. Last, the memory of asking the 16-shot set: keys
and values of the set, and the largest growth of the process while it is asked, against the same with a cache that is
concatenated for each token, as transformers' own is.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from benchmarks.common import THREADS, finish, options_of, parser, random_model
from lcl_adapter.answering import cache
from lcl_adapter.answering.cache import InPlaceLayer, Prefilled
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_pocket
from lcl_adapter.devices import release_memory
from lcl_adapter.recipe.sources import EpisodeOptions

QUERIES = 32
NEW_TOKENS = 8
EVERY = 4  # of the queries, every such one is answered by plain ``generate`` too


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


def repeated(support: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The support set with its instruction at every picture."""
    return tuple(replace(turn, text=support[0].text) if turn.picture else turn for turn in support)


def growing(base: Base, support: tuple[Turn, ...], rounds: int) -> float:
    """The time to add the last photo to an independent set of the others, over the time of reading it alone. The median of rounds."""
    independent = base.with_supports(None, "independent")
    support = repeated(support)
    before = Predictor(independent).prefill([support[:-2]])

    def seconds(turns: tuple[Turn, ...], known: tuple[Prefilled, ...] = ()) -> float:
        predictor = Predictor(independent)  # its cache of features is empty
        began = time.perf_counter()
        predictor.prefill([turns], known=known)
        return time.perf_counter() - began

    return statistics.median(seconds(support, (before,)) / seconds(support[-2:]) for _ in range(rounds))


class Concatenated(InPlaceLayer):
    """A layer as transformers' ``DynamicLayer`` writes it. The set's own tensors are put back at the end of a pass."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states, value_states
        self.is_initialized = True
        self._stored = new if self._stored is None else tuple(torch.cat(pair, 2) for pair in zip(self._stored, new, strict=True))  # type: ignore[assignment]
        return self._show(self.capacity)

    def resize(self, capacity: int) -> None:
        self.prefix = self._stored

    def truncate(self, length: int, capacity: int) -> None:
        self._stored = self.prefix
        self._show(length)


def memory_of_asking(base: Base, support: tuple[Turn, ...], queries: list[Turn]) -> tuple[list[str], int]:
    """The texts, and the bytes of the set with the largest growth while it is asked."""
    predictor = Predictor(base, max_new_tokens=NEW_TOKENS)
    ready = predictor.prefill([support])
    predictor.vision.tower_features([turn.picture for turn in queries if turn.picture])  # the tower has its own peak
    size = ready.bytes
    release_memory()
    trim()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = psutil.Process().memory_info().rss
    replies = predictor.ask(ready, [Question(0, query) for query in queries])
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return [reply.text for reply in replies], size + 1024 * int(peak) - before


def trim() -> None:
    """Return freed memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(parser(__doc__), "benchmarks.predict", arguments)
    torch.set_num_threads(THREADS)
    base = load_base(str(random_model(options.small)))
    count, shots, (less, more) = (4, 2, (1, 2)) if options.small else (QUERIES, 8, (2, 16))
    support, queries = episode(shots, count)
    prefilled(base, support, queries[:2])  # warm-up
    cached_texts, cached, _ = prefilled(base, support, queries)
    plain_texts, seconds = plain(base, support, queries[::EVERY])
    uncached = seconds * len(queries) / len(plain_texts)
    asked = len(plain_texts)
    same = sum(a == b for a, b in zip(cached_texts[::EVERY], plain_texts, strict=True))

    few, many = episode(less, count), episode(more, count)
    times = [(prefilled(base, *few)[2], prefilled(base, *many)[2]) for _ in range(1 if options.small else 2)]
    growth = statistics.median(longer / shorter for shorter, longer in times)
    added = growing(base, episode(more, 1)[0], 1 if options.small else 15)
    compressed = base.with_supports(None, "compressed")
    few_c, many_c = (repeated(support) for support, _ in (few, many))
    times_c = [(prefilled(compressed, few_c, few[1])[2], prefilled(compressed, many_c, many[1])[2]) for _ in range(1 if options.small else 2)]
    growth_c = statistics.median(longer / shorter for shorter, longer in times_c)
    stored = Predictor(compressed).prefill([many_c]).bytes / Predictor(base).prefill([many[0]]).bytes
    texts, in_place = memory_of_asking(base, *many)
    with mock.patch.object(cache, "InPlaceLayer", Concatenated):
        other_texts, concatenated = memory_of_asking(base, *many)
    if texts != other_texts:
        raise AssertionError("the two caches give different answers")
    rows = [
        (f"{count} queries, {shots} shots: plain / prefilled", f"{uncached / cached:.1f}", "at least 10"),
        (f"same answers, of {asked}", str(same), str(asked)),
        (f"a query at {more} shots / at {less} shots", f"{growth:.2f}", "at most 1.25"),
        (f"the same, compressed sets: {more} shots / {less}", f"{growth_c:.2f}", "at most 1.25"),
        (f"bytes of a stored set of {more} shots: compressed / ordered", f"{stored:.3f}", ""),
        (f"a photo added to a set of {2 * more - 1} / a photo alone", f"{added:.2f}", "at most 1.5"),
        (f"memory of asking {more} shots: in place / concatenated", f"{in_place / concatenated:.2f}", "at most 0.6"),
    ]
    ratios = {
        "prefilled_speedup": uncached / cached,
        "same_answers": same / asked,
        "time_16_over_2_shots": growth,
        "time_16_over_2_shots_compressed": growth_c,
        "bytes_compressed_over_ordered": stored,
        "photo_added_over_photo_alone": added,
        "memory_of_asking": in_place / concatenated,
    }
    return finish(options, "predict", ("measure", "ratio", "bound"), rows, ratios, {"queries": count, "plain queries": asked, "same answers": same})


if __name__ == "__main__":
    main()
