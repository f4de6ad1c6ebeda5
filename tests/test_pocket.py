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

# 1,120 rows of the whole mixture show that it learns. The recipe itself trains 19,200; docs/results.md has its figures, and those of
# `make quickstart`, whose sources of episodes and replay are two of the mixture's.
# Measured with train.seed=0: 2-way 2-shot easy .945, hard .789 (base .594, .531); 1 shot, both .844; 4 shots .871; 5-way .792 (base .219);
# controls together .497; inspection with 2 references .700 (base .480), with none .653; products .623 (base .358, chance .333);
# captions .360 (base .425), vqa .570 (base .590).
SHARES = {"lcl": 0.15, "inspect": 0.3, "products": 0.25, "vqa": 0.3}
STEPS, ROWS = 280, 4
SMALL = [f"train.max_steps={STEPS}", f"train.per_device_train_batch_size={ROWS}", "train.warmup_steps=10", "train.learning_rate=3.0e-3"]
SMALL += [f"sources.{name}.share={share}" for name, share in SHARES.items()] + ["train.save_steps=1000"]
HELD_OUT = "source: {type: pocket, split: held_out}"
FEW = ["evaluate.suites.2way.episodes=128", "evaluate.suites.shuffled-names.episodes=128"]
FEW += [f"evaluate.suites.5way={{kind: lcl, {HELD_OUT}, ways: 5, shots: [2], neighbours: [easy], episodes: 96}}"]
FEW += [f"evaluate.suites.no-support={{kind: control, control: no-support, {HELD_OUT}, episodes: 64}}"]
FEW += ["evaluate.suites.product.episodes=150", "evaluate.suites.product.shots=2"]
FEW += ["evaluate.suites.inspection.references=[0, 2]", "evaluate.suites.inspection.limit=1"]
FEW += [f"evaluate.suites.{suite}.source.limit=200" for suite in ("captions", "vqa")]
FEW += ["orientations=1"]  # a merged model is asked once, and the minutes are a quarter
FEW += ["evaluate.validation.words.episodes=32", "evaluate.validation.parts.limit=1", "evaluate.validation.products.episodes=32"]
LOSS_ALLOWED = {"captions": 0.18, "vqa": 0.14}  # without replay nothing is left of captions (docs/lab.md)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture with a seventeenth of the recipe's rows, at a higher rate and with more replay; then every suite on fewer questions."""
    folder = tmp_path_factory.mktemp("pocket") / "run"
    retention = [f"evaluate.retention.{suite}={100 * allowed}" for suite, allowed in LOSS_ALLOWED.items()]
    result = CliRunner().invoke(main, ["train", "recipes/mix-pocket.yaml", f"output={folder}", *SMALL, *FEW, *retention])
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
    report = rows(run)
    assert report["captions"]["base"]["value"] > 0.4
    assert report["vqa"]["base"]["value"] > report["vqa"]["chance"] + 0.2
    for name in ("2way-2shot-easy", "2way-2shot-hard"):
        assert 0.4 < report[name]["base"]["value"] < 0.62


def test_the_adapter_learns_from_context_on_held_out_classes(run: Path) -> None:
    report = rows(run)
    base, adapter = ({name: row[side]["value"] for name, row in report.items()} for side in ("base", "adapter"))
    assert adapter["2way-2shot-easy"] > max(0.8, base["2way-2shot-easy"] + 0.25)
    assert adapter["2way-2shot-hard"] > max(0.68, base["2way-2shot-hard"] + 0.15)
    one, four = (adapter[f"2way-{shots}shot-easy"] + adapter[f"2way-{shots}shot-hard"] for shots in (1, 4))
    assert four / 2 > one / 2 - 0.02, "more photos do not hurt"
    assert adapter["5way-2shot-easy"] > max(0.5, base["5way-2shot-easy"] + 0.25)
    assert abs(report["2way-2shot-easy"]["adapter"]["greedy"] - adapter["2way-2shot-easy"]) < 0.05


def test_controls_fall_to_chance(run: Path) -> None:
    """Each one, and all of them together, where the interval is narrow."""
    controls = {name: row for name, row in rows(run).items() if row["control"]}
    assert {row["control"] for row in controls.values()} == {"shuffled-names", "no-support"}
    for name, row in controls.items():
        low, _ = row["adapter"]["ci95"]
        assert low <= row["chance"] + 0.02, name
    right = sum(row["n"] * (row["adapter"]["value"] - row["chance"]) for row in controls.values())
    assert abs(right) / sum(row["n"] for row in controls.values()) < 0.08


def test_nothing_is_forgotten(run: Path) -> None:
    report = rows(run)
    for name, allowed in LOSS_ALLOWED.items():
        assert report[name]["adapter"]["value"] > report[name]["base"]["value"] - allowed


def test_the_adapter_learns_the_other_tasks_on_held_out_data(run: Path) -> None:
    report = rows(run)
    inspected, plain = report["inspection-2ref"], report["inspection-0ref"]
    assert inspected["adapter"]["value"] > max(0.63, inspected["base"]["value"] + 0.1), "categories that were never trained on"
    assert inspected["adapter"]["value"] > plain["adapter"]["value"], "references are read"
    assert len(inspected["adapter"]["by_category"]) == 60
    product = report["product-2shot"]
    assert product["adapter"]["value"] > max(0.48, product["base"]["value"] + 0.1, product["chance"] + 0.1)
    assert all(recall > 0.37 for recall in product["adapter"]["recall"].values())
    assert product["adapter"]["near_neither_recall"] > 0.3, "near products too"


def test_the_manifest_states_what_was_trained_on(run: Path) -> None:
    manifest = json.loads((run / "lcl_adapter.json").read_text())
    assert manifest["shares"]["realised"] == pytest.approx(SHARES, abs=0.01)
    assert sum(t["rows"] for t in manifest["tokens"].values()) == STEPS * ROWS
    assert len(manifest["held_in"]["inspect"]) == 217, "240, less those that the judgement is weighed on"


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
    for index in range(120):
        episode = episodes.draw(pool, EpisodeOptions(shots=[2]), 3, 0, index)
        conversation = from_episode(episode, WORDINGS["short"])
        requests.append((conversation.shared, conversation.branches[0][0], episode.labels))
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

    from lcl_adapter.data.sources.mvtec import read_mvtec
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
