"""Every shipped recipe loads, opens as a manual, and names sources that exist."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lcl_adapter import packaged, recipe
from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import main
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.recipe.shipped import recipes_folder
from lcl_adapter.training.collate import Collator, Readable
from tests import forked
from tests.conftest import EVERY, paint
from tests.test_formats import FIXTURES

SHIPPED = sorted(recipes_folder().glob("*.yaml"))


def short_answers(name: str) -> list[str]:
    """Overrides. Tiny random weights end no answer, so each would have as many tokens as a suite allows."""
    return [f"evaluate.suites.{s}.new_tokens=4" for s, suite in recipe.load(name).evaluate.suites.items() if hasattr(suite, "new_tokens")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_loads(path) -> None:  # type: ignore[no-untyped-def]
    assert recipe.load(path).sources


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_opens_as_a_manual(path) -> None:  # type: ignore[no-untyped-def]
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    assert f"lcl-adapter train recipes/{path.name}" in text, "the command that runs it"
    assert "emory" in text, "the memory it takes"


def test_own_photos_trains_on_a_users_folders(tmp_path: Path, pocket_tiny: Path) -> None:
    """The recipe as it stands, on made-up photos and a tiny base: train, measure on the classes held out."""
    for number in range(14):
        for index in range(4):
            paint(tmp_path / "photos" / f"part {number}" / f"{index}.png", (17 * number, 90, 250 - 17 * number), seed=100 * number + index)
    record = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a part"}]}
    paint(tmp_path / "images" / "a.png", (1, 2, 3))
    (tmp_path / "vqa.json").write_text(json.dumps([record] * 5))
    run = tmp_path / "run"
    changes = [f"data.root={tmp_path}", f"base={pocket_tiny}", "precision=fp32", f"output={run}", "sources.photos.hold_out=0.4"]
    changes += ["train.max_steps=2", "train.gradient_accumulation_steps=2", "train.logging_steps=1"]
    changes += ["evaluate.validation.new.source.hold_out=0.4", "evaluate.validation.new.episodes=4"]
    changes += ["sources.photos.validation=0.25", "evaluate.validation.new.source.validation=0.25"]
    for suite in ("2way", "shuffled-names"):
        changes += [f"evaluate.suites.{suite}.episodes=4", f"evaluate.suites.{suite}.source.hold_out=0.4"]
    result = CliRunner().invoke(main, ["train", "recipes/own-photos.yaml", *changes, *short_answers("own-photos"), "--json"])
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["suites"]] == [
        "2way-0shot-easy",
        "2way-1shot-easy",
        "2way-2shot-easy",
        "shuffled-names-easy",
    ]
    manifest = read_manifest(run)
    assert manifest["shares"]["realised"]["photos"] > 0
    assert manifest["judgement"]["fitted_on"] == [8, 0], "a user's photos are judged by model and tower too"


def test_photo_own_trains_on_a_users_folders(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """The recipe as it stands, on made-up photos and a tiny base of the photo family."""
    for number in range(14):
        for index in range(4):
            paint(tmp_path / "photos" / f"part {number}" / f"{index}.png", (17 * number, 90, 250 - 17 * number), seed=100 * number + index)
    run = tmp_path / "run"
    changes = [f"data.root={tmp_path}", f"base={tiny_folder('photo')}", "precision=fp32", f"output={run}", "sources.photos.hold_out=0.4"]
    changes += ["train.max_steps=2", "train.warmup_steps=1", "train.logging_steps=1", "sources.own.max_new_tokens=2"]
    changes += ["evaluate.validation.own.source.hold_out=0.4", "evaluate.validation.own.source.validation=0.0001"]
    for suite in ("2way", "own-shuffled"):
        changes += [f"evaluate.suites.{suite}.source.hold_out=0.4", f"evaluate.suites.{suite}.episodes=6"]
    result = CliRunner().invoke(main, ["train", "recipes/photo-own.yaml", *changes, "--json"])
    assert result.exit_code in {0, 3}, result.output  # 3: after two steps on random weights a suite may have fallen
    report = json.loads(result.stdout)
    assert {row["suite"] for row in report["suites"]} == {"2way", "own-shuffled", "page", "questions"}
    manifest = read_manifest(run)
    assert manifest["family"] == "photo"
    assert set(manifest["held_in"]) == {"photos"}
    assert "judgement" not in manifest, "no class falls into the validation suite's split"
    assert "evaluate.validation.own: left out" in result.stderr


def test_own_photos_without_data_to_replay(tmp_path: Path, pocket_tiny: Path) -> None:
    """The lines that the recipe's comment gives to users without VQA data: checked, trained on and measured."""
    text = (recipes_folder() / "own-photos.yaml").read_text(encoding="utf-8")
    own = next(line.lstrip("# ") for line in text.splitlines() if "type: self" in line)
    for number in range(14):
        for index in range(4):
            paint(tmp_path / "photos" / f"part {number}" / f"{index}.png", (17 * number, 90, 250 - 17 * number), seed=100 * number + index)
    changes = [f"data.root={tmp_path}", f"base={pocket_tiny}", "precision=fp32", f"output={tmp_path / 'run'}", "sources.photos.hold_out=0.4"]
    changes += ["evaluate.validation.new=null"]
    changes += [f"sources.replay={own.partition(': ')[2]}", "sources.replay.max_new_tokens=4", "sources.replay.pictures=6"]
    changes += ["train.max_steps=2", "train.gradient_accumulation_steps=4", "train.logging_steps=1"]
    suites = next(line for line in text.splitlines() if "preset: page" in line)
    assert "page: {preset: page}, questions: {preset: questions}; retention: {page: 5%, questions: 5}" in suites
    changes += ["evaluate.suites={page: {preset: page}, questions: {preset: questions}}", "evaluate.retention={page: 5%, questions: 5}"]
    checked = CliRunner().invoke(main, ["data", "check", "recipes/own-photos.yaml", *changes, "--json"])
    assert checked.exit_code == 0, checked.output
    result = CliRunner().invoke(main, ["train", "recipes/own-photos.yaml", *changes, "--json"])
    assert result.exit_code in {0, 3}, result.output
    assert {row["suite"] for row in json.loads(result.stdout)["retention"]} == {"page", "questions"}
    assert read_manifest(tmp_path / "run")["tokens"]["replay"]["learned"] > 0


def test_every_recipe_file_is_listed() -> None:
    assert list(recipe.shipped_recipes()) == [p.stem for p in SHIPPED]
    assert all(recipe.shipped_recipes().values())


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """The layout of docs/data.md, filled from the fixtures: the categories and classes of the real sets stand in by name."""
    root, questions = tmp_path / "data", FIXTURES / "questions"
    shutil.copytree(FIXTURES / "imagenet-lcl" / "images", root / "imagenet")
    shutil.copytree(FIXTURES / "isekai", root / "isekai")
    shutil.copy(FIXTURES / "isekai" / "ISEKAI-10.json", root / "isekai" / "ISEKAI-pair.json")
    shutil.copytree(FIXTURES / "visa", root / "visa")
    (root / "imagenet-lcl").mkdir()
    for name in ("train900_pairs.jsonl", "test100_pairs.jsonl"):
        shutil.copy(FIXTURES / "imagenet-lcl" / name, root / "imagenet-lcl")
    categories = sorted(p.name for p in (FIXTURES / "mvtec").iterdir())
    for number, name in enumerate(("carpet", "hazelnut", "pill", "screw", "zipper", "tile", "bottle", "grid")):
        shutil.copytree(FIXTURES / "mvtec" / categories[number % 3], root / "mvtec" / name)
        for photo in sorted((root / "mvtec" / name).glob("t*/*/*.png")):  # a category of its own: the same file in two would be a fault
            Image.eval(Image.open(photo), lambda value, number=number: max(0, value - 3 * number)).save(photo)
    shutil.copytree(FIXTURES / "products" / "images", root / "products" / "images")
    rows = (FIXTURES / "products" / "products.csv").read_text().replace("photo,sku,family", "image,product,group")
    (root / "products" / "products.csv").write_text(rows)
    for split in ("train", "val"):
        shutil.copytree(questions / "images", root / "coco" / f"{split}2014")
        for picture in (root / "coco" / f"{split}2014").iterdir():
            picture.rename(picture.with_name(picture.name.replace("val2014", f"{split}2014")))
        for name in ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"):
            (root / "vqav2").mkdir(exist_ok=True)
            shutil.copy(questions / name, root / "vqav2" / name.replace("val2014", f"{split}2014"))
    shutil.copytree(questions / "images", root / "coco" / "train2017")
    (root / "llava").mkdir()
    shutil.copy(questions / "instruct.json", root / "llava" / "llava_instruct_150k.json")
    (root / "pope").mkdir()
    for kind in ("random", "popular", "adversarial"):
        shutil.copy(questions / "coco_pope_random.jsonl", root / "pope" / f"coco_pope_{kind}.json")
    (root / "shikra").mkdir()
    rec = (questions / "REC_val.jsonl").read_text()
    (root / "shikra" / "REC_ref3_train.jsonl").write_text(rec.replace("val2014", "train2014"))
    (root / "shikra" / "REC_refcoco_unc_val.jsonl").write_text(rec.replace("val2014", "train2014"))
    return root


@pytest.fixture
def all_data(data_root: Path) -> Path:
    """Also the user's photos and questions of own-photos.yaml."""
    for number in range(14):
        for index in range(4):
            paint(data_root / "photos" / f"part {number}" / f"{index}.png", (17 * number, 90, 250 - 17 * number), seed=100 * number + index)
    shutil.copy(FIXTURES / "questions" / "instruct.json", data_root / "vqa.json")
    shutil.copytree(FIXTURES / "questions" / "images", data_root / "images")
    return data_root


class NoTensors(pickle.Pickler):
    """Pickles anything but tensors and models."""

    def reducer_override(self, value: object) -> object:
        assert not isinstance(value, torch.Tensor | torch.nn.Module), type(value)
        return NotImplemented


UNPICKLE = """
import pickle, sys
for name in sys.argv[1:]:
    collator = pickle.load(open(name, "rb"))
    print([len(collator.row(index)) for index in range(3)])
"""


@pytest.fixture
def photo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training photos of `photo:train.csv`, the products and the parts, made up: 12 of each, of 5 photos."""
    folder = tmp_path / "photo-data"
    folder.mkdir()
    lines = ["image,class,group,split"]
    places = ["train/good/0", "train/good/1", "train/good/2", "train/good/3", "test/good/0", "test/crack/0", "test/crack/1"]
    with zipfile.ZipFile(folder / "train.zip", "w") as archive, zipfile.ZipFile(folder / "inspection-train.zip", "w") as parts:
        for number in range(12):
            for index, place in enumerate(places):
                picture = paint(tmp_path / "painted.png", (20 * number, 90, 250 - 20 * number), seed=10 * number + index)
                archive.write(picture, f"{number}/{index}.png")
                parts.write(picture, f"part {number}/{place}.png")
                lines.append(f"{number}/{index}.png,part {number},group {number // 4},train")
    shutil.copy(folder / "train.zip", folder / "products.zip")
    for name in ("train.csv", "products.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(packaged, "photo_data_folder", lambda: folder)


@pytest.mark.usefixtures("photo_data")
def test_every_recipes_collator_can_be_sent_to_another_process(all_data: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """To one that is not forked from this one, without the model: it reads the same rows from files that it opens itself."""
    lengths, files = [], []
    for number, path in enumerate(SHIPPED):
        family = EVERY[number % len(EVERY)]
        changes = [f"data.root={all_data}", f"base={tiny_folder(family)}"]
        changes += [
            f"sources.{name}.hold_out=0.4" for name in ("products", "photos") if name in recipe.load(path).sources and path.stem != "mix-pocket"
        ]
        made = recipe.load(path, changes)
        encoder = load_encoder(BaseRef.of(made))
        encoder.context = 10**6
        collator = Collator(Mixture(made), encoder, Readable())
        lengths.append(str([len(collator.row(index)) for index in range(3)]))
        files.append(tmp_path / f"{path.stem}.pickle")
        with files[-1].open("wb") as file:
            NoTensors(file).dump(collator)
    assert forked.run(UNPICKLE, *files).splitlines() == lengths


MIX = ["evaluate.suites.imagenet-100.queries=1", "evaluate.suites.product.episodes=6", "sources.products.hold_out=0.4"]
MIX += ["evaluate.suites.product.source.hold_out=0.4", "evaluate.validation.new-products.source.hold_out=0.4"]
MIX += ["evaluate.suites.mvtec.references=[0, 1]", "evaluate.validation.parts.references=1"]
# What each recipe needs on a few fixtures and a tiny base; the shipped bf16 stays, nf4 becomes fp32.
BIG = {
    "mix": ["precision=fp32", "wording=short", *MIX],
    "mix-24gb": ["evaluate.suites.imagenet-100.shots=1", "evaluate.suites.isekai-10.shots=1", "evaluate.suites.mvtec.limit=1", *MIX],
    "lcl-mix": ["precision=fp32", "wording=short", "evaluate.suites.imagenet-100.queries=1"],
    "lcl-2way-weight": ["evaluate.suites.imagenet-100.shots=[0, 1]", "evaluate.suites.imagenet-100.queries=1", "evaluate.suites.isekai-pair.shots=1"],
    "mvtec": [
        "precision=fp32", "wording=short", "evaluate.suites.mvtec.references=[0, 1]", "evaluate.suites.visa.references=1",
        "evaluate.suites.locate.episodes=4", "evaluate.validation.parts.references=1",
    ],
    "products": [
        "precision=fp32", "sources.products.hold_out=0.4", "evaluate.suites.product.source.hold_out=0.4", "evaluate.suites.product.episodes=6",
        "evaluate.validation.new-products.source.hold_out=0.4",
    ],
    "vqa": ["precision=fp32"],
}  # fmt: skip


@pytest.mark.parametrize("name", BIG)
def test_the_big_recipes_run_on_the_documented_layout(name: str, data_root: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """Checked, trained for two steps and measured on every suite, as they stand but for base, precision, steps and counts."""
    shipped = recipe.load(name)
    changes = [f"data.root={data_root}", f"base={tiny_folder('llava-1.5')}", *BIG[name]]
    checked = CliRunner().invoke(main, ["data", "check", f"recipes/{name}.yaml", *changes, "--json"])
    assert checked.exit_code == 0, checked.output
    rows = json.loads(checked.stdout)["rows"]
    assert set(rows["longest"]) == set(shipped.sources)
    changes += [f"output={tmp_path / 'run'}", "train.max_steps=2", "train.gradient_accumulation_steps=8", "train.logging_steps=1"]
    changes += ["train.dataloader_num_workers=0", "evaluate.every=1", "evaluate.during_limit=4"]
    changes += [f"evaluate.retention.{s}=101" for s in shipped.evaluate.retention]
    changes += short_answers(name)
    result = CliRunner().invoke(main, ["train", f"recipes/{name}.yaml", *changes, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["suite"] for row in report["suites"]} == set(shipped.evaluate.suites)
    assert all(row["published"] for row in report["suites"] if row["suite"] == "mvtec" and row["shots"] in {0, 1, 4})
    if "parts" in shipped.evaluate.validation:
        assert all(row["both"] for row in report["suites"] if row["suite"] == "mvtec" and row["shots"])
    assert (tmp_path / "run" / "best" / "lcl_adapter.json").exists()
    manifest = read_manifest(tmp_path / "run")
    assert sum(counts["rows"] for counts in manifest["tokens"].values()) == 16
    assert manifest["precision"] == ("fp32" if "precision=fp32" in changes else shipped.precision)


def test_the_four_bit_recipe_runs(tmp_path: Path) -> None:
    """pocket-qlora as it stands, on the shipped base, for two steps and a few questions: trained in nf4, and measured."""
    few = [f"evaluate.suites.{s}.episodes=2" for s in ("2way", "2way-more", "5way", "shuffled-names", "no-support")]
    few += ["evaluate.validation.words.episodes=4", *short_answers("pocket-qlora")]
    few += [f"evaluate.suites.{s}.source.limit=4" for s in ("captions", "vqa")] + ["evaluate.retention={}"]
    steps = [f"output={tmp_path / 'run'}", "train.max_steps=2", "train.per_device_train_batch_size=2", "train.logging_steps=1"]
    result = CliRunner().invoke(main, ["train", "recipes/pocket-qlora.yaml", *steps, *few, "--json"])
    assert result.exit_code == 0, result.output
    assert {row["suite"] for row in json.loads(result.stdout)["suites"]} == set(recipe.load("pocket-qlora").evaluate.suites)
    assert read_manifest(tmp_path / "run")["precision"] == "nf4"


def commands_of(path: Path) -> list[list[str]]:
    """The commands of a recipe's header, as a shell would read them; a line that ends in a backslash goes on."""
    head = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    joined = "\n".join(head).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in joined if line.startswith("lcl-adapter ")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_headers_commands_are_understood(path: Path) -> None:
    """Parsed by click itself, and every override of a command on a recipe is a key of that recipe."""
    commands = commands_of(path)
    assert commands
    for words in commands:
        command, rest = main, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined, assignment]
        context = command.make_context("lcl-adapter", list(rest), resilient_parsing=False)
        if "recipe" in context.params:
            overrides = [o for o in context.params["overrides"] if not o.startswith("resume=")]
            assert recipe.load(context.params["recipe"], overrides).sources, words
        context.close()
