"""End to end on the shipped base: what it can do, what it cannot, and that a short training adds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import load_base, parameters_by_part
from lcl_adapter.cli import main
from lcl_adapter.data import episodes
from lcl_adapter.data.conversations import WORDINGS, Turn, from_episode
from lcl_adapter.data.sources import read_image, read_llava_json, read_pocket
from lcl_adapter.pocket import BASE, DATA
from lcl_adapter.recipe.sources import EpisodeOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shorter training than the recipe's, 250 steps of 16 rows, in which every replayed question comes once; then all suites on fewer episodes."""
    folder = tmp_path_factory.mktemp("pocket") / "run"
    few = [f"evaluate.suites.{s}.episodes=256" for s in ("2way", "2way-more", "5way", "shuffled-names", "no-support")]
    steps = ["train.max_steps=250", "train.per_device_train_batch_size=16"]
    result = CliRunner().invoke(main, ["train", "recipes/pocket.yaml", f"output={folder}", *steps, *few, "evaluate.suites.captions.source.limit=300"])
    assert result.exit_code == 0, result.output
    return folder


def rows(run: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return {row["name"]: row for row in json.loads((run / "report.json").read_text())["suites"]}


def test_the_base_is_small_and_real() -> None:
    assert (BASE / "model.safetensors").stat().st_size < 25_000_000
    base = load_base("pocket")
    assert type(base.llava).__name__ == "LlavaForConditionalGeneration"
    assert base.image_processor.__class__.__name__.startswith("CLIPImageProcessor")
    assert parameters_by_part(base.model)["vision tower"]["total"] > 1_000_000
    tokenizer = base.tokenizer
    for name in ("qxvz", "日本語", "🙂", "naïve café", 'a"b'):
        assert tokenizer.decode(tokenizer.encode(name, add_special_tokens=False)) == name


def test_the_base_binds_keys_to_values_in_text() -> None:
    """Text alone: "fox ... -> qxv; tree ... -> bim; fox ... -> ?"""
    base = load_base("pocket")
    short = WORDINGS["short"]
    cases = []
    words = ["fox", "tree", "bus", "moon", "fish", "hand", "star", "cake"]
    for n, (one, two) in enumerate(zip(words, words[1:] + words[:1], strict=True)):
        support = []
        for key, value in ((one, "qxv"), (two, "bim")):
            support += [Turn("user", f" {key}\n{short.question}"), Turn("assistant", value)]
        cases.append((tuple(support), Turn("user", f" {(one, two)[n % 2]}\n{short.question}"), ("qxv", "bim")))
    replies = Predictor(base).run(cases)
    right = [("qxv", "bim")[n % 2] == r.text for n, r in enumerate(replies)]
    assert sum(right) >= 7


def test_the_base_names_training_classes_and_cannot_learn_pictures_from_context(run: Path) -> None:
    found = rows(run)
    assert found["captions"]["base"]["value"] > 0.4
    assert found["vqa"]["base"]["value"] > found["vqa"]["chance"] + 0.2
    for name in ("2way-2shot-easy", "2way-2shot-hard"):
        assert 0.4 < found[name]["base"]["value"] < 0.62


def test_the_adapter_learns_from_context_on_held_out_classes(run: Path) -> None:
    found = rows(run)
    assert found["2way-2shot-easy"]["adapter"]["value"] > 0.85
    assert found["2way-2shot-hard"]["adapter"]["value"] > 0.72
    assert found["2way-4shot-easy"]["adapter"]["value"] > found["2way-1shot-easy"]["adapter"]["value"] - 0.02
    assert found["5way-2shot-easy"]["adapter"]["value"] > 0.55
    assert abs(found["2way-2shot-easy"]["adapter"]["greedy"] - found["2way-2shot-easy"]["adapter"]["value"]) < 0.05


def test_controls_fall_to_chance(run: Path) -> None:
    for name, row in rows(run).items():
        if row["control"]:
            low, _ = row["adapter"]["ci95"]
            assert low <= row["chance"] + 0.02, name


def test_nothing_is_forgotten(run: Path) -> None:
    found = rows(run)
    for name in ("captions", "vqa"):
        assert found[name]["adapter"]["value"] > found[name]["base"]["value"] - 0.04


def test_ask_judges_photos_on_disk(run: Path, tmp_path: Path) -> None:
    """Held-out drawings saved as files, asked through the command line with real words as labels."""
    pool = read_pocket("held_out", min_pictures=5)
    right = 0
    for index in range(12):
        episode = episodes.draw(pool, EpisodeOptions(shots=[3], hard=0.0), 5, 0, index)
        photos = tmp_path / str(index) / "photos"
        for number, example in enumerate(episode.support):
            (photos / example.label).mkdir(parents=True, exist_ok=True)
            read_image(example.picture).save(photos / example.label / f"{number}.png")
        query = tmp_path / str(index) / "query.png"
        read_image(episode.queries[0].picture).save(query)
        result = CliRunner().invoke(main, ["ask", str(photos), str(query), "--adapter", str(run), "--json"])
        assert result.exit_code == 0, result.output
        right += json.loads(result.stdout)["answers"][0]["label"] == episode.queries[0].label
    assert right >= 9


def test_a_merged_model_gives_the_adapters_answers(run: Path, tmp_path: Path) -> None:
    """fp32: within one episode in a thousand, as the report's own question asks them."""
    from lcl_adapter.base.adapter import load_adapter

    merged = tmp_path / "merged"
    assert CliRunner().invoke(main, ["merge", str(run), "--out", str(merged), "--dtype", "fp32"]).exit_code == 0
    pool = read_pocket("held_out", min_pictures=5)
    requests = []
    for index in range(200):
        episode = episodes.draw(pool, EpisodeOptions(shots=[2]), 3, 0, index)
        spoken = from_episode(episode, WORDINGS["short"])
        requests.append((spoken.shared, spoken.branches[0][0], episode.labels))
    ours = Predictor(load_adapter(run)[0]).run(requests)
    theirs = Predictor(load_base(str(merged))).run(requests)
    assert sum(a.best != b.best for a, b in zip(ours, theirs, strict=True)) == 0
    assert sum(a.text != b.text for a, b in zip(ours, theirs, strict=True)) <= 1


def test_questions_about_training_classes_only_are_replayed() -> None:
    train = {p.member for c in read_pocket("train").classes for p in c.pictures}
    held = {p.member for c in read_pocket("held_out").classes for p in c.pictures}
    for name, expected in (("vqa_train", train), ("captions_eval", train), ("vqa_eval", held)):
        pool = read_llava_json(DATA / f"{name}.json", DATA / "drawings.zip")
        assert {e.picture.member for d in pool.dialogues for e in d.exchanges if e.picture} <= expected


def test_drawn_data_is_the_same_every_time(tmp_path: Path) -> None:
    """Parts and products are drawn from the shipped emoji, with masks, in MVTec's layout; classes keep their split."""
    import zipfile

    from lcl_adapter.data.sources.inspection import read_mvtec
    from lcl_adapter.pocket import parts, shipped

    archives = {split: tmp_path / f"{split}.zip" for split in ("train", "held_out")}
    counts = parts.TRAIN, parts.HELD_OUT
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts, "TRAIN", 2)
        patched.setattr(parts, "HELD_OUT", 2)
        parts.write(DATA, archives)
    for split, name in (("train", "inspection-train.zip"), ("held_out", "inspection-held-out.zip")):
        with zipfile.ZipFile(archives[split]) as few, zipfile.ZipFile(shipped(name)) as whole:
            assert len(few.namelist()) == 2 * (parts.REFERENCES + parts.GOOD + 2 * parts.EACH * len(parts.DEFECTS))
            assert all(few.read(n) == whole.read(n) for n in few.namelist())
        classes = {c.name for c in read_pocket(split).classes}
        pool = read_mvtec(shipped(name))
        assert {p.name for p in pool.categories} <= {c.replace("_", " ") for c in classes}
        assert len(pool.categories) == counts[split == "held_out"]
        assert set(pool.categories[0].defects) == set(parts.DEFECTS)
