"""contrib/lmms-eval: a recipe's suites as tasks of lmms-eval, and lcl-adapter as a model of it.

Everything but lmms-eval's own run is tested here. `make harness` installs lmms-eval, and then the last tests run too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from lcl_lmms_eval.__main__ import main
from lcl_lmms_eval.draw import draw
from lcl_lmms_eval.messages import turns_of
from PIL import Image

from lcl_adapter.answering.predict import Predictor, Reply
from lcl_adapter.base.model import load_base
from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import RecipeError, RequestError, RunError
from lcl_adapter.evaluate import build_cells, evaluate
from lcl_adapter.evaluate.cases import Cell
from lcl_adapter.recipe import load
from tests.conftest import paint
from tests.test_merge import adapter_on
from tests.test_suites import SUITES

NAMES = ("isekai-10", "open-mi", "mvtec", "product", "mine", "vqa")
LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not LMMS_EVAL, reason="lmms-eval is not installed here; `make harness` runs this test where it is")


def recipe_of(folder: Path, *names: str, base: str = "pocket", **suites: Any) -> Path:
    chosen = {**{name: SUITES[name] for name in names}, **suites}
    values = {"base": base, "wording": "short", "sources": {"a": {"type": "pocket"}}, "evaluate": {"suites": chosen}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(values, default=str))
    return folder / "recipe.yaml"


def cells_of(recipe: Path, **more: Any) -> dict[str, Cell]:
    built = build_cells(load(recipe), **more)
    return {f"lcl_{cell.name}".replace("-", "_"): cell for cell in built}


def tasks_in(folder: Path) -> Any:
    """The tasks' functions, as lmms-eval loads them: from the file."""
    spec = importlib.util.spec_from_file_location("lcl_tasks", folder / "lcl_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and the folder of its tasks."""
    folder = tmp_path_factory.mktemp("harness")
    recipe = recipe_of(folder, *NAMES)
    draw(str(recipe), folder / "tasks", limit=12)
    return recipe, folder / "tasks"


def test_tasks_hold_the_questions_of_eval_in_order(drawn: tuple[Path, Path]) -> None:
    recipe, folder = drawn
    cells = {name: cell for name, cell in cells_of(recipe, limit=12).items() if cell.suite != "vqa"}
    assert {path.stem for path in folder.glob("*.yaml")} == set(cells), "a suite without labels has no task"
    tasks = tasks_in(folder)
    for name, cell in cells.items():
        rows = rows_of(folder, name)
        assert [row["answer"] for row in rows] == [case.worded_gold for case in cell.cases]
        for row, case in zip(rows, cell.cases, strict=True):
            turns = [*case.support, case.query]
            messages = tasks.doc_to_messages(row)
            assert [message["role"] for message in messages] == [turn.role for turn in turns]
            shown = iter(tasks.doc_to_visual(row))
            for message, turn in zip(messages, turns, strict=True):
                images = [part["url"] for part in message["content"] if part["type"] == "image"]
                assert [part["text"] for part in message["content"] if part["type"] == "text"] == ([turn.text] if turn.text else [])
                assert len(images) == len(turn.pictures) == (turn.role == "user"), "one photo in each user turn"
                for image in images:
                    assert image.tobytes() == next(shown).tobytes() == read_image(turn.pictures[0]).tobytes()
            assert next(shown, None) is None


def test_one_text_for_models_without_turns(drawn: tuple[Path, Path]) -> None:
    _, folder = drawn
    row = rows_of(folder, "lcl_mine_1shot_easy")[0]
    first, second = (message["text"] for message in row["messages"] if message["role"] == "assistant")
    question = "What is this?"
    expected = f"<image>\nLearn the names. {question}\n{first}\n\n<image>\n{question}\n{second}\n\n<image>\nNow, what is this?"
    assert tasks_in(folder).doc_to_text(row) == expected


def read_texts(cell: Cell) -> list[str]:
    """Texts of all kinds: right, wrong, in a sentence, in another case, and empty."""
    kinds: tuple[Callable[[str, Sequence[str]], str], ...] = (
        lambda gold, _: gold,
        lambda gold, _: f"{gold.upper()}.",
        lambda _, answers: answers[0],
        lambda gold, _: f"{gold}\nThis is a",
        lambda gold, _: f"there is {gold} in the image",
        lambda _, __: "",
        lambda _, answers: answers[-1],
    )
    return [kinds[n % len(kinds)](case.worded_gold, case.answers) for n, case in enumerate(cell.cases)]


def test_figures_of_texts_are_those_of_eval(drawn: tuple[Path, Path]) -> None:
    """The same texts, judged by ``lcl-adapter eval`` and by the tasks' functions."""
    recipe, folder = drawn
    tasks = tasks_in(folder)
    compared = set()
    for name, cell in cells_of(recipe, limit=12).items():
        if cell.suite == "vqa":
            continue
        texts = read_texts(cell)
        replies = [Reply(text, (0.0,) * len(case.answers)) for text, case in zip(texts, cell.cases, strict=True)]
        figures = cell.judge(cell.cases, replies).figures
        template = yaml.load((folder / yaml_of(folder, name)["include"]).read_text(), Loader=functions())
        process = getattr(tasks, template["process_results"].rpartition(".")[2])
        results = [process(row, [text.strip()]) for row, text in zip(rows_of(folder, name), texts, strict=True)]
        means = {key: sum(r[key] for r in results) / len(results) for key in results[0] if key != "balanced_accuracy"}
        assert {metric["metric"] for metric in template["metric_list"]} == set(results[0])
        if cell.kind == "inspection":
            assert means["accuracy"] == pytest.approx(figures["greedy"], abs=1e-4)
            plain = [row["answer"] if n % 2 else row["answers"][0] for n, row in enumerate(rows_of(folder, name))]
            own = [Reply(text, tuple(float(text == a) for a in c.answers)) for text, c in zip(plain, cell.cases, strict=True)]
            items = [process(row, [text])["balanced_accuracy"] for row, text in zip(rows_of(folder, name), plain, strict=True)]
            assert tasks.balanced(items) == pytest.approx(cell.judge(cell.cases, own).figures["balanced_accuracy"], abs=1e-4)
        elif cell.kind == "open-mi":
            assert (means["accuracy"], means["exact"]) == (pytest.approx(figures["value"], abs=1e-4), pytest.approx(figures["greedy"], abs=1e-4))
            assert means["accuracy"] > means["exact"]
        else:
            assert means["accuracy"] == pytest.approx(figures["greedy"], abs=1e-4)
            if "lcl_rule" in figures:
                assert means["lcl_rule"] == pytest.approx(figures["lcl_rule"], abs=1e-4)
        compared.add(cell.kind)
    assert compared == {"isekai", "open-mi", "inspection", "product", "lcl"}


def functions() -> type[yaml.SafeLoader]:
    """A loader that reads ``!function NAME`` as the name."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return Loader


def yaml_of(folder: Path, task: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((folder / f"{task}.yaml").read_text())
    return read


def test_tasks_stand_alone(drawn: tuple[Path, Path], tmp_path: Path) -> None:
    """In another folder, and without lcl-adapter: any model's environment reads them."""
    moved = drawn[1].rename(tmp_path / "moved")
    try:
        script = (
            "import importlib.util, json, sys; sys.modules['lcl_adapter'] = None; sys.modules['torch'] = None\n"
            "spec = importlib.util.spec_from_file_location('lcl_tasks', 'lcl_tasks.py'); tasks = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(tasks); row = json.loads(open('lcl_mvtec_1ref.jsonl').readline())\n"
            "print(len(tasks.doc_to_visual(row)), tasks.process_inspection(row, [row['answer']])['accuracy'])"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=moved, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["2", "1.0"]
        for file in moved.glob("*.yaml"):
            task = yaml.safe_load(file.read_text())
            assert (moved / task["include"]).is_file()
            assert (moved / task["dataset_kwargs"]["data_files"]["test"]).is_file(), "relative to the YAML file, as lmms-eval reads it"
            for name in re.findall(r"!function lcl_tasks\.(\w+)", (moved / task["include"]).read_text()):
                assert callable(getattr(tasks_in(moved), name))
    finally:
        moved.rename(drawn[1])


def test_tags_stand_for_the_tasks_of_a_kind(drawn: tuple[Path, Path]) -> None:
    tags = {path.stem: yaml_of(drawn[1], path.stem)["tag"] for path in drawn[1].glob("*.yaml")}
    assert tags["lcl_mine_1shot_easy"] == ["lcl", "lcl_mine"]
    assert {task for task, own in tags.items() if "inspection" in own} == {"lcl_mvtec_0ref", "lcl_mvtec_1ref", "lcl_mvtec_2ref"}
    assert {task for task, own in tags.items() if "open_mi" in own} == {f"lcl_open_mi_{n}shot" for n in (0, 1, 2)}
    assert not {tag for own in tags.values() for tag in own} & set(tags), "no name is a task and a tag"


def test_photos_that_programs_read_differently_are_written_as_pixels(tmp_path: Path) -> None:
    """A turned photo, a transparent one and a cut-out one become PNG; a plain one is the file itself."""
    for number in range(4):
        paint(tmp_path / "photos" / "plain" / f"{number}.jpg", (200, 60, 50), seed=number)
    turned, see_through = tmp_path / "photos" / "turned", tmp_path / "photos" / "see-through"
    turned.mkdir()
    see_through.mkdir()
    for number in range(4):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(paint(tmp_path / "side.png", (40, 90, 200), seed=9 + number)).save(turned / f"{number}.jpg", exif=exif)
        Image.new("RGBA", (40, 40), (0, 200, 0, 60 * number)).save(see_through / f"{number}.png")
    source = {"type": "class-folder", "path": tmp_path / "photos", "split": "all"}
    recipe = recipe_of(tmp_path / "r", photos={"kind": "lcl", "source": source, "ways": 3, "shots": [2], "names": "real", "episodes": 6})
    draw(str(recipe), tmp_path / "tasks")
    tasks = tasks_in(tmp_path / "tasks")
    [cell] = cells_of(recipe).values()
    plain = {path.read_bytes() for path in (tmp_path / "photos" / "plain").iterdir()}
    for row, case in zip(rows_of(tmp_path / "tasks", "lcl_photos_2shot_easy"), cell.cases, strict=True):
        for image, turn in zip(tasks.doc_to_visual(row), [t for t in (*case.support, case.query) if t.picture], strict=True):
            assert (image.size, image.tobytes()) == (read_image(turn.pictures[0]).size, read_image(turn.pictures[0]).tobytes())
    written = list((tmp_path / "tasks" / "photos").iterdir())
    assert {path.read_bytes() for path in written if path.suffix == ".jpg"} <= plain


def test_messages_become_the_turns_that_eval_asks(drawn: tuple[Path, Path], pocket_tiny: Path) -> None:
    """Through files and messages, the predictor's replies are those of the cases themselves, score by score."""
    recipe, folder = drawn
    predictor, tasks = Predictor(load_base(str(pocket_tiny)), max_new_tokens=8), tasks_in(folder)
    for name in ("lcl_mine_1shot_easy", "lcl_open_mi_2shot", "lcl_mvtec_1ref"):
        cell = cells_of(recipe, limit=12)[name]
        pictures: dict[str, Picture] = {}
        asked = []
        for row in rows_of(folder, name):
            *support, query = turns_of(tasks.doc_to_messages(row), pictures)
            asked.append((tuple(support), query, tuple(row["answers"])))
        expected = predictor.run([(case.support, case.query, case.answers) for case in cell.cases])
        for reply, own in zip(predictor.run(asked), expected, strict=True):
            assert (reply.text, reply.log_likelihoods) == (own.text, pytest.approx(own.log_likelihoods, abs=1e-4))


def test_messages_of_other_tasks(tmp_path: Path) -> None:
    photo, red = paint(tmp_path / "a.png", (10, 200, 30)), Image.new("RGB", (8, 8), "red")
    text, image = {"type": "text", "text": "Compare."}, {"type": "image", "url": red}
    [turn] = turns_of([{"role": "system", "content": "Be short."}, {"role": "user", "content": [image, image, text]}], {})
    assert turn.text == "Be short.\n<image>\n<image>\nCompare."
    assert len(turn.pictures) == 2
    assert turn.pictures[0] == turn.pictures[1], "the same pixels are one picture, which is read once"
    assert read_image(turn.pictures[0]).tobytes() == red.tobytes()
    assert turns_of([{"role": "user", "content": [{"type": "image", "url": str(photo)}]}], {}) == [Turn("user", "", Picture(photo))]
    opened = Image.open(photo)
    assert turns_of([{"role": "user", "content": [{"type": "image", "url": opened}]}], {})[0].pictures == (Picture(photo),)
    opened.thumbnail((10, 10))  # in place: it is no longer what the file holds
    [small] = turns_of([{"role": "user", "content": [{"type": "image", "url": opened}]}], {})
    assert read_image(small.pictures[0]).size == opened.size
    for messages, expected in (
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "reads images and text; the task has video"),
        ([{"role": "assistant", "content": "yes"}], "not user and assistant in turn"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "no question"),
        ([], "no question"),
    ):
        with pytest.raises(RequestError, match=expected):
            turns_of(messages, {})


def test_mistakes_of_the_command_line(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "vqa")
    with pytest.raises(RecipeError, match="no suite with labels"):
        draw(str(recipe), tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()
    (tmp_path / "tasks").mkdir()
    with pytest.raises(RunError, match="exists"):
        draw(str(recipe), tmp_path / "tasks")
    result = CliRunner().invoke(main, [str(recipe), "--out", str(tmp_path / "new"), "--suite", "lcll"])
    assert result.exit_code == 2
    assert "no suite 'lcll'" in result.stderr
    result = CliRunner().invoke(main, [str(recipe_of(tmp_path / "r", "mine")), "--out", str(tmp_path / "new"), "--limit", "3"])
    assert (result.exit_code, result.stdout) == (0, "lcl_mine_1shot_easy: 3 questions\n")


# With lmms-eval


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A run on the pocket base, its tasks, and the rows of ``lcl-adapter eval``, by the task's name."""
    folder = tmp_path_factory.mktemp("measured")
    run = adapter_on(Path("pocket"), folder / "run")
    (run / "recipe.yaml").write_text(recipe_of(folder, "mine", "open-mi", "mvtec").read_text())
    report = evaluate(run, limit=16)
    draw(str(run), folder / "tasks", limit=16)
    return run, folder / "tasks", {f"lcl_{row['name']}".replace("-", "_"): row for row in report["suites"]}


def run_lmms_eval(tasks: Path, out: Path, names: str, model: str, arguments: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """lmms-eval's results by task, and its texts by task in the order of the records."""
    options = ["--model", model, "--model_args", arguments, "--tasks", names, "--include_path", str(tasks)]
    command = [sys.executable, "-m", "lmms_eval", *options, "--device", "cpu", "--batch_size", "8", "--log_samples", "--output_path", str(out)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [results] = out.rglob("*results.json")
    texts = {}
    for file in out.rglob("*samples*.jsonl"):
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        texts[file.stem.partition("samples_")[2]] = [sample["filtered_resps"] for sample in samples]
    return json.loads(results.read_text())["results"], texts


@needs_lmms_eval
@pytest.mark.parametrize("side", ["adapter", "base"])
def test_lmms_eval_prints_the_figures_of_eval(measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path, side: str) -> None:
    run, tasks, rows = measured
    arguments = f"run={run},adapter={side == 'adapter'}"
    generated, texts = run_lmms_eval(tasks, tmp_path / "generated", "lcl,open_mi,inspection", "lcl-adapter", arguments)
    scored, _ = run_lmms_eval(tasks, tmp_path / "scored", "lcl,open_mi,inspection", "lcl-adapter", f"{arguments},answer=likeliest")
    assert set(generated) == set(scored) == set(rows)
    predictions = [json.loads(line) for line in (run / "partial" / "predictions.jsonl").read_text().splitlines()]
    for task, row in rows.items():
        own = row[side]
        by_item = [line[side]["text"] for line in predictions if f"lcl_{line['cell']}".replace("-", "_") == task]
        assert [text.strip() for text in texts[task]] == [text.strip() for text in by_item], "item by item"
        assert generated[task]["exact,none" if row["kind"] == "open-mi" else "accuracy,none"] == pytest.approx(own["greedy"], abs=1e-4)
        value = own["scored"] if row["kind"] == "open-mi" else own["value"]
        if row["kind"] == "inspection":
            assert scored[task]["balanced_accuracy,none"] == pytest.approx(own["balanced_accuracy"], abs=1e-4)
        else:
            assert scored[task]["accuracy,none"] == pytest.approx(value, abs=1e-4)
    assert len({scored[task]["accuracy,none"] for task in rows}) > 1, "the figures differ between tasks"


@needs_lmms_eval
def test_other_models_of_lmms_eval_run_the_tasks(measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    """A model of lmms-eval's own that reads one text and a list of photos."""
    _, tasks, rows = measured
    results, texts = run_lmms_eval(tasks, tmp_path / "dummy", "inspection", "dummy", "response=good")
    assert {name for name, row in rows.items() if row["kind"] == "inspection"} == set(results)
    for name, figures in results.items():
        assert set(texts[name]) == {"good"}
        assert figures["balanced_accuracy,none"] == 0.5
