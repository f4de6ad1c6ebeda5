"""Bounds of row lengths: no drawn row is longer, little is wasted, and what does not fit is refused before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lcl_adapter import recipe
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.model import load_encoder
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import ClassPool, Dialogue, Exchange, InspectionPool, Picture, Pool, QuestionPool
from lcl_adapter.errors import EpisodeError
from lcl_adapter.recipe import Recipe
from lcl_adapter.training import lengths, trainer
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.lengths import check_rows
from tests.conftest import EVERY
from tests.test_episodes import made_pool
from tests.test_formats import opened
from tests.test_policies import made_part
from tests.test_recipes import MIX, all_data, data_root  # noqa: F401
from tests.test_trainer import small
from tests.tiny import save_tiny

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
WORD = st.text(st.sampled_from("abcdefgh ijklmnop.,-_'0123456789/é部品"), min_size=1, max_size=24).map(str.strip).filter(bool)
WORDS = st.lists(WORD, min_size=8, max_size=8, unique=True)


@pytest.fixture(scope="session")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    @lru_cache
    def load(family: str) -> Encoder:
        encoder = load_encoder(str(save_tiny(tmp_path_factory.mktemp(family), family)))
        encoder.context = 10**6
        return encoder

    return load


def collator_of(encoder: Encoder, pool: Pool, wording: str = "short", **options: Any) -> Collator:
    kind = {ClassPool: "pocket", InspectionPool: "mvtec", QuestionPool: "llava-json"}[type(pool)]
    paths = {"mvtec": {"path": "."}, "llava-json": {"file": "x", "images": "."}}.get(kind, {})
    made = Recipe.model_validate({"base": "x", "wording": wording, "sources": {"s": {"type": kind, **paths, **options}}})
    return Collator(Mixture(made, {"s": pool}), encoder)


def longest_drawn(collator: Collator, rows: int = 25) -> int:
    """The longest of the first rows; a row that cannot be drawn from this pool does not count."""
    found = [0]
    for index in range(rows):
        try:
            found.append(len(collator.encoder.conversation(collator.conversation(index))))
        except EpisodeError as error:
            if "tokens" in str(error):
                raise
    return max(found)


def bound_of(collator: Collator) -> int:
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lengths, "CHECKED", 0)  # the bound does not come from drawn rows
            return check_rows(collator).bounds["s"]
    except EpisodeError as error:  # too few pictures or clashing names for these options
        assume("tokens" in str(error))
        raise


POLICIES = st.one_of(
    st.fixed_dictionaries({"policy": st.just("n-way"), "names": st.sampled_from(["random", "real", "mixed"]), "ways": st.integers(2, 5)}),
    st.fixed_dictionaries({"policy": st.sampled_from(["2way-weight", "2way-random-shot", "2way-ref", "ref-or-weight"])}),
    st.fixed_dictionaries({"policy": st.just("jigsaw"), "tiles": st.lists(st.sampled_from([4, 6, 9]), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"policy": st.just("product"), "names": st.sampled_from(["random", "mixed"]), "plain": st.sampled_from([0.0, 0.5, 1.0])}),
)


@QUICK
@given(
    st.sampled_from(EVERY), st.sampled_from(["short", "lcl"]), WORDS, POLICIES, st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 3)
)
def test_no_episode_is_longer_than_the_bound(
    encoder_of: Callable[[str], Encoder], family: str, wording: str, names: list[str], options: dict[str, Any], shots: list[int], queries: int
) -> None:
    pool = made_pool(8, 6, 0)
    pool = replace(pool, classes=tuple(replace(c, name=name) for c, name in zip(pool.classes, names, strict=True)))
    collator = collator_of(encoder_of(family), pool, wording, shots=shots, queries=queries, **options)
    assert longest_drawn(collator) <= bound_of(collator)


@QUICK
@given(
    st.sampled_from(EVERY),
    WORDS,
    st.sampled_from(["plain", "one-class", "two-way", "naming"]),
    st.integers(1, 3),
    st.sampled_from([["en"], ["en", "ja"]]),
)
def test_no_inspection_is_longer_than_the_bound(
    encoder_of: Callable[[str], Encoder], family: str, names: list[str], form: str, shots: int, languages: list[str]
) -> None:
    parts = tuple(made_part(name, 4, 3, dict.fromkeys(names[3:], 4)) for name in names[:3])
    more = {"random_names": 0.5} if form in {"two-way", "naming"} else {}
    collator = collator_of(
        encoder_of(family), InspectionPool("parts", parts), forms={form: 1}, shots=[1, shots], queries=2, languages=languages, **more
    )
    assert longest_drawn(collator) <= bound_of(collator)


@pytest.mark.parametrize("family", EVERY)
def test_no_box_is_longer_than_the_bound(encoder_of: Callable[[str], Encoder], family: str) -> None:
    for pool, options in ((opened("class-folder-boxes"), {"policy": "locate"}), (opened("mvtec"), {"forms": {"localise": 1}})):
        collator = collator_of(encoder_of(family), pool, shots=[1], queries=2, **options)
        assert 0 < longest_drawn(collator) <= bound_of(collator)


def dialogues(texts: list[tuple[str, str, int]]) -> QuestionPool:
    pictures = (Picture(Path("a.png")), Picture(Path("b.png")))
    made = []
    for number, (question, answer, images) in enumerate(texts):
        marked = question + " <image>" * (images if images > 1 else 0)
        made.append(Dialogue((Exchange(marked, answer, pictures[0] if images else None, pictures[1:images]),), f"record {number}"))
    return QuestionPool("questions", tuple(made))


@QUICK
@given(
    st.sampled_from(EVERY),
    st.lists(st.tuples(WORD, WORD, st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([2, 10**4]),
)
def test_no_row_of_questions_is_longer_than_the_bound(
    encoder_of: Callable[[str], Encoder], family: str, texts: list[tuple[str, str, int]], packed: int, measured: int
) -> None:
    """Also where only few records are measured, and the others are bounded by their bytes."""
    collator = collator_of(encoder_of(family), dialogues(texts), packed=packed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lengths, "MEASURED", measured)
        bound = bound_of(collator)
    longest = longest_drawn(collator, 3 * len(texts))
    assert longest <= bound
    if packed == 1 and measured > len(texts):
        assert bound == longest


# The mean name is shorter than the longest: with a real base's images, that is a few tokens of thousands.
TIGHT = {"mix": MIX, "lcl-mix": [], "lcl-2way-weight": [], "mvtec": [], "products": ["sources.products.hold_out=0.4"], "vqa": []}


@pytest.mark.parametrize("name", TIGHT)
def test_bounds_are_tight(name: str, all_data: Path, tiny_folder: Callable[[str], Path]) -> None:  # noqa: F811
    """For the shipped recipes, with 576 tokens an image: at most 5 % over the longest row that is really drawn."""
    made = recipe.load(name, [f"data.root={all_data}", f"base={tiny_folder('llava-1.5')}", *[c for c in TIGHT[name] if c.startswith("sources")]])
    encoder = load_encoder(str(tiny_folder("llava-1.5")))
    encoder.image, encoder.context = encoder.image[:1] * 576, 10**6
    collator = Collator(Mixture(made), encoder)
    rows = check_rows(collator)
    drawn: dict[str, int] = {}
    for index in range(300):
        source = collator.mixture.slot(index).source
        drawn[source] = max(drawn.get(source, 0), len(collator.row(index)))
    for source, longest in drawn.items():
        assert longest <= rows.bounds[source] <= 1.05 * longest, source
    assert len(rows.longest) == max(rows.bounds.values()), "the trial before the first step runs a row of this length"


def test_a_class_whose_name_is_too_long_is_named(tiny_folder: Callable[[str], Path]) -> None:
    """Although few episodes would draw it."""
    encoder = load_encoder(str(tiny_folder("llava-1.5")))
    pool = made_pool(30, 4, 0)
    name = "zq" * 250
    pool = replace(pool, classes=(*pool.classes[:29], replace(pool.classes[29], name=name)))
    collator = collator_of(encoder, pool, shots=[2], names="mixed", real_names=0.01)
    with pytest.raises(EpisodeError, match=rf"the classes '{name}'.* do not fit the context of 1024.*Shorter names would fit: rename"):
        check_rows(collator)


def test_a_context_that_only_short_names_fit_is_refused_before_weights_are_loaded(
    pocket_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a context that the first 256 rows allow, a later row would not fit."""
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("weights are loaded"))
    made = small(pocket_tiny, tmp_path / "run", max_steps=400)
    drawn = Collator(Mixture(made), load_encoder(str(pocket_tiny)))
    needed = []
    for index in range(1200):
        row = drawn.row(index)
        needed.append(row.branch.count(0) + max(row.branch.count(n) for n in range(1, max(row.branch) + 1)))
    context = max(needed[:256])
    assert max(needed) > context
    folder = tmp_path / "base"
    folder.mkdir()
    for file in pocket_tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EpisodeError, match=rf"lcl: its longest episode, .* \d+ tokens .* do not fit the context of {context}"):
        trainer.train(made.model_copy(update={"base": str(folder)}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
