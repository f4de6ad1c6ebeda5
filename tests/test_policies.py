"""Policies of inspection, products, places and LCL's other ones: small examples, and what holds for every draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, from_episode
from lcl_adapter.data.episodes import Episode
from lcl_adapter.data.sources import ClassPool, InspectionPool, PartCategory, Picture, Specimen, read_image
from lcl_adapter.data.sources.boxes import parse, region_box
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.errors import EpisodeError, RecipeError
from lcl_adapter.recipe.sources import EpisodeOptions, InspectionOptions
from lcl_adapter.recipe.wording import load, phrase
from tests.conftest import paint
from tests.test_episodes import made_pool
from tests.test_formats import opened

QUICK = settings(max_examples=100, deadline=None)
INDEX = st.integers(0, 10**6)


def made_part(name: str, references: int, good: int, defects: dict[str, int]) -> PartCategory:
    def photo(place: str, number: int) -> Picture:
        return Picture(Path(f"{name}/{place}/{number}.png"))

    return PartCategory(
        name,
        tuple(photo("train/good", n) for n in range(references)),
        tuple(Specimen(photo("test/good", n)) for n in range(good)),
        {kind: tuple(Specimen(photo(kind, n), kind, photo(f"mask/{kind}", n)) for n in range(count)) for kind, count in defects.items()},
    )


PARTS = InspectionPool("parts", tuple(made_part(f"part {n}", 4, 3, {"scratch": 3, "hole": 4, "stain": 3}) for n in range(4)))
FORMS = ["plain", "one-class", "two-way", "naming"]


def options(form: str, **more: object) -> InspectionOptions:
    return InspectionOptions.model_validate({"forms": {form: 1}, "shots": [1, 2], "queries": 3, **more})


@QUICK
@given(st.sampled_from(FORMS), st.integers(0, 999), INDEX)
def test_every_inspection(form: str, seed: int, index: int) -> None:
    episode = episodes.draw(PARTS, options(form), seed, 0, index)
    assert episode == episodes.draw(PARTS, options(form), seed, 0, index)
    part = PARTS.categories[episode.queries[0].class_index]
    truth = {s.picture: s.defect for s in part.good} | {s.picture: s.defect for photos in part.defects.values() for s in photos}
    shown = [e.picture for e in episode.support]
    assert len(shown) == len(set(shown))
    assert all(e.class_index == episode.queries[0].class_index for e in (*episode.support, *episode.queries)), "one part an episode"
    assert not set(shown) & {q.picture for q in episode.queries}
    for query in episode.queries:
        assert query.picture in truth, "no query asks about a reference"
        defect = truth[query.picture]
        expected = defect if form == "naming" and defect else "defective" if defect else "good"
        assert query.label == expected
        assert query.label in episode.labels
    for example in episode.support:
        defect = truth.get(example.picture)
        assert example.label == (defect if form == "naming" and defect else "defective" if defect else "good")
    if form == "plain":
        assert not episode.support
    if form == "one-class":
        assert {e.label for e in episode.support} == {"good"}
        assert set(shown) <= set(part.references)
    if form == "two-way":
        assert Counter(e.label for e in episode.support)["good"] == Counter(e.label for e in episode.support)["defective"]
    if form == "naming":
        assert episode.wording is not None
        assert all(label in episode.wording.query for label in episode.labels) or "{" not in episode.wording.query


def test_half_of_the_queries_are_defective_and_every_kind_comes_as_often() -> None:
    queries = [q for i in range(800) for q in episodes.draw(PARTS, options("one-class"), 0, 0, i).queries]
    share = np.mean([q.label == "defective" for q in queries])
    assert abs(share - 0.5) < 0.05
    kinds = Counter(q.picture.path.parts[1] for q in queries if q.label == "defective")
    assert max(kinds.values()) < 1.3 * min(kinds.values())
    first = [episodes.draw(PARTS, options("two-way"), 0, 0, i).labels[0] for i in range(400)]
    assert 140 < first.count("good") < 260, "the order of labels has no information"


def test_random_names_replace_every_label() -> None:
    for index in range(50):
        episode = episodes.draw(PARTS, options("naming", random_names=1.0), 0, 0, index)
        labels = {e.label for e in (*episode.support, *episode.queries)}
        assert labels <= set(episode.labels)
        assert not labels & {"good", "scratch", "hole", "stain"}
        assert episode.wording is not None
        for word in ("scratch", "hole", "stain"):
            assert word not in episode.wording.query
        if "{labels}" in phrase("inspection.naming", None, 0).query:
            assert all(label in episode.wording.query for label in episode.labels)


def test_japanese_is_drawn_if_the_options_list_it() -> None:
    tally = Counter(episodes.draw(PARTS, options("one-class", languages=["en", "ja"]), 0, 0, i).support[0].label for i in range(300))
    assert set(tally) == {"good", "良品"}
    assert 60 < tally["良品"] < 240


def test_names_that_hold_each_other_are_renamed_whole() -> None:
    pool = InspectionPool("cut", (made_part("lead", 3, 3, {"cut": 3, "cut lead": 3, "is": 3}),))
    for index in range(40):
        episode = episodes.draw(pool, options("naming", random_names=1.0), 0, 0, index)
        assert episode.wording is not None
        question = episode.wording.query
        assert "\0" not in question
        assert "cut" not in question
        assert all(label in question for label in episode.labels)


def test_an_inspection_without_enough_photos_is_an_error() -> None:
    bare = InspectionPool("bare", (made_part("nut", 1, 1, {"hole": 1}),))
    with pytest.raises(EpisodeError, match="'nut' has 1 references, 2 are needed"):
        episodes.draw(bare, options("one-class", shots=[2]), 0, 0, 0)
    with pytest.raises(EpisodeError, match="no kind of defect has 2 photos"):
        episodes.draw(bare, options("naming", shots=[1]), 0, 0, 0)


def test_a_defect_is_located_by_its_mask() -> None:
    pool = opened("mvtec")
    for index in range(20):
        episode = episodes.draw(pool, options("localise", shots=[2]), 0, 0, index)
        part = pool.categories[episode.queries[0].class_index]
        masks = {s.picture: s for photos in part.defects.values() for s in photos}
        for query in episode.queries:
            specimen = masks[query.picture]
            region = next(r for regions in pool.regions.values() for r in regions if r.picture == query.picture)
            assert query.label == region_box(region).text()
            assert specimen.defect is not None


@pytest.mark.parametrize("name", ["class-folder-boxes", "manifest-coco", "mvtec"])
def test_support_and_queries_have_the_true_boxes(name: str) -> None:
    pool = opened(name)
    kind = InspectionOptions if isinstance(pool, InspectionPool) else EpisodeOptions
    for index in range(20):
        episode = episodes.draw(pool, kind(policy="locate", shots=[1, 2]), 0, 0, index)
        thing = list(pool.regions)[episode.queries[0].class_index]
        pictures = {r.picture: r for r in pool.regions[thing]}
        assert len({e.picture for e in (*episode.support, *episode.queries)}) == len(episode.support) + len(episode.queries)
        for example in (*episode.support, *episode.queries):
            box = parse(example.label)
            assert box is not None
            assert box.iou(region_box(pictures[example.picture])) > 0.9
        assert episode.wording is not None
        assert thing in episode.wording.instruction or thing in from_episode(episode, WORDINGS["short"]).shared[0].text


def test_nothing_to_locate_is_an_error() -> None:
    with pytest.raises(EpisodeError, match="nothing has boxes in 2 pictures"):
        episodes.draw(made_pool(3, 4, 0), EpisodeOptions(policy="locate", shots=[1]), 0, 0, 0)


def product(**more: object) -> EpisodeOptions:
    return EpisodeOptions.model_validate({"policy": "product", "shots": [1, 2], "queries": 4, **more})


@QUICK
@given(st.integers(0, 999), INDEX, st.sampled_from(["random", "real", "mixed"]), st.integers(0, 3))
def test_every_product_episode(seed: int, index: int, names: str, artists: int) -> None:
    pool = made_pool(9, 8, 0 if artists < 2 else 6)
    episode = episodes.draw(pool, product(names=names), seed, 0, index)
    assert episode == episodes.draw(pool, product(names=names), seed, 0, index)
    by_label = {e.label: e.class_index for e in episode.support}
    assert len(by_label) == 2
    assert set(episode.labels) == {*by_label, "neither"}
    counts = Counter(e.label for e in episode.support)
    assert len(set(counts.values())) == 1
    for query in episode.queries:
        if query.label == "neither":
            assert query.class_index not in by_label.values()
        else:
            assert by_label[query.label] == query.class_index
        assert query.picture in pool.classes[query.class_index].pictures
        assert query.picture.artist is None or query.picture.artist not in {e.picture.artist for e in episode.support}


def test_neither_is_half_and_near_as_often_as_far() -> None:
    pool = made_pool(30, 4, 0)
    drawn = [episodes.draw(pool, product(shots=[1], near_neither=0.5), 0, 0, i) for i in range(500)]
    pairs = [(e, q) for e in drawn for q in e.queries]
    neither = [(e, q) for e, q in pairs if q.label == "neither"]
    assert abs(len(neither) / len(pairs) - 0.5) < 0.05
    near = [q.class_index in {i for s in e.support for i in pool.siblings(s.class_index)} for e, q in neither]
    assert 0.4 < np.mean(near) < 0.65
    first = Counter(e.support[0].label == q.label for e, q in pairs if q.label != "neither")
    assert abs(first[True] / first.total() - 0.5) < 0.06, "the product shown first is no likelier"


def test_a_product_by_its_name_with_nothing_shown() -> None:
    episode = episodes.draw(made_pool(5, 3, 0), product(plain=1.0), 0, 0, 3)
    assert not episode.support
    assert all(q.label == f"thing {q.class_index}" for q in episode.queries)


def test_two_products_and_no_third() -> None:
    with pytest.raises(EpisodeError, match="a third is neither"):
        episodes.draw(made_pool(2, 4, 0), product(), 0, 0, 0)


@QUICK
@given(st.integers(0, 999), INDEX)
def test_references_name_the_querys_own_class(seed: int, index: int) -> None:
    """The published code lists the other class's images; the answer here is the query's own."""
    pool = made_pool(6, 9, 0)
    episode = episodes.draw(pool, EpisodeOptions(policy="2way-ref", shots=[5], queries=2), seed, 0, index)
    names = [e.label for e in episode.support]
    assert len(set(names)) == len(names)
    assert 3 <= len(names) // 2 <= 5
    for example in episode.support:
        others = [e for e in episode.support if e.class_index == example.class_index]
        assert len({e.label.split("_")[1] for e in others}) == 1, "the second half is the class's"
    for query in episode.queries:
        assert query.label == ", ".join(e.label for e in episode.support if e.class_index == query.class_index)


def test_reference_or_weight_is_half_and_half() -> None:
    pool = made_pool(6, 9, 0)
    drawn = [episodes.draw(pool, EpisodeOptions(policy="ref-or-weight", shots=[3]), 0, 0, i) for i in range(400)]
    assert 150 < sum("_" in e.support[0].label for e in drawn) < 250


def test_jigsaw_pieces_say_where_they_belong(tmp_path: Path) -> None:
    """A picture whose pixels are their own places: the answer's pairs are the pieces' true ones."""
    from dataclasses import replace

    rows, columns = np.mgrid[:48, :48]
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2).astype(np.uint8)).save(tmp_path / "ramp.png")
    pool = ClassPool("ramp", (replace(made_pool(1, 1, 0).classes[0], pictures=(Picture(tmp_path / "ramp.png"),)),))
    for index in range(30):
        episode = episodes.draw(pool, EpisodeOptions(policy="jigsaw"), 0, 0, index)
        pairs = eval(episode.queries[0].label)
        assert len(pairs) == len(episode.support) in {4, 6, 9, 12, 16}
        wide, high = 1 + max(c for c, _ in pairs), 1 + max(r for _, r in pairs)
        assert wide * high == len(pairs)
        for (column, row), piece in zip(pairs, episode.support, strict=True):
            image = read_image(piece.picture)
            assert image.size == (48 // wide, 48 // high)
            assert image.getpixel((0, 0))[:2] == (column * 48 // wide, row * 48 // high)
            assert Picture.parse(str(piece.picture)) == piece.picture


def test_knobs_of_another_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="`neither` belongs to policy product, not to n-way"):
        EpisodeOptions(neither=0.3)
    with pytest.raises(ValueError, match="an image is cut into 4, 6, 9, 12 or 16"):
        EpisodeOptions(policy="jigsaw", tiles=[5])
    with pytest.raises(ValueError, match="all `forms` are 0"):
        InspectionOptions(forms={"plain": 0})


def test_every_task_has_several_phrasings_in_both_languages() -> None:
    table = load()
    for task, languages in table.items():
        if task.startswith(("inspection", "product", "locate", "rec")):
            assert set(languages) == {"en", "ja"}, task
            assert len(languages["en"]) >= 2, task
        for phrasings in languages.values():
            for one in phrasings:
                assert one.query
                assert "<" not in one.query + one.question + one.instruction


def test_a_users_own_phrasings(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text('inspection.one-class:\n  en:\n    - {question: "Weld ok?", query: "And this weld?", good: fine, bad: cracked}\n')
    episode = episodes.draw(PARTS, options("one-class", templates=own), 0, 0, 0)
    assert set(episode.labels) == {"fine", "cracked"}
    assert phrase("product.plain", own, 0).query == "Which product is this?", "the other tasks stay as they ship"
    for text, message in (
        ("inspektion.plain: {en: [{query: x}]}", "did you mean 'inspection.plain'"),
        ("inspection.plain: {en: [{question: x}]}", "needs a `query`"),
        ("inspection.plain: {en: [{query: x, ansver: y}]}", "did you mean 'answer'"),
        ("inspection.plain: [x", "cannot be read"),
        ('inspection.plain: {en: [{query: x, answer: "It is so."}]}', "lacks {name}"),
        ("inspection.plain: {en: [{query: x, good: ok, bad: ok}]}", "are both 'ok'"),
        ('inspection.plain: {en: [{query: "Is this {thng} good?"}]}', r"unknown \{thng\} \(did you mean 'thing'\?\)"),
    ):
        other = tmp_path / f"{abs(hash(text))}.yaml"
        other.write_text(text)
        with pytest.raises(RecipeError, match=message):
            phrase("inspection.plain", other, 0)
    with pytest.raises(RecipeError, match="no phrasing in ja"):
        phrase("inspection.one-class", own, 0, ["ja"])


def test_pictures_alone_have_no_words() -> None:
    words = phrase("inspection.one-class", Path("photo:phrases.yaml"), 0)
    assert (words.instruction, words.question, words.query) == ("", "", "")
    assert (words.answered("x"), words.good, words.bad) == ("x", "good", "defective")


def test_names_of_other_classes_mean_something_else() -> None:
    pool = read_pocket("train")
    names = {c.name for c in pool.classes}
    drawn = [
        episodes.draw(pool, EpisodeOptions(names="real", other_names=share, shots=[1]), 0, 0, index) for share in (0.0, 1.0) for index in range(30)
    ]
    own = [all(pool.classes[e.class_index].name == e.label for e in episode.support) for episode in drawn]
    assert all(own[:30])
    assert not any(own[30:])
    assert all(label in names for episode in drawn for label in episode.labels)


def test_turned_parts_are_turned_alike(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", (1, 2, 3))
    turned = {episodes.draw(PARTS, options("one-class", turned=1.0), 0, 0, i).support[0].picture.turned for i in range(40)}
    assert turned == {0, 1, 2, 3}
    for index in range(20):
        episode: Episode = episodes.draw(PARTS, options("one-class", turned=1.0), 0, 0, index)
        assert len({e.picture.turned for e in (*episode.support, *episode.queries)}) == 1
