"""A recipe's suites -> a folder of tasks for lmms-eval: the very questions that ``lcl-adapter eval`` asks, in its order.

    FOLDER/lcl_2way_2shot_easy.yaml     a task for each line of the report
    FOLDER/lcl_2way_2shot_easy.jsonl    its questions: messages, answers, and files of photos
    FOLDER/photos/                      the photos, upright and cut out as lcl-adapter reads them
    FOLDER/lcl_tasks.py, lcl_rules.py   the functions that the tasks name; they import nothing of lcl-adapter
    FOLDER/_lcl_yaml, ...               what the tasks of a kind have in common

So any model of lmms-eval runs the tasks, also where lcl-adapter is not installed. The folder can be moved.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lcl_adapter.data.conversations import Turn
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.data.sources.images import is_plain, is_whole, read_bytes
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.evaluate import build_cells, rules
from lcl_adapter.evaluate.cases import Case, Cell
from lcl_adapter.evaluate.runner import drop_unreadable
from lcl_adapter.files import whole_folder, write_text
from lcl_adapter.recipe import Recipe, load, presets
from lcl_adapter.terminal import console

TASKS = Path(__file__).parent / "tasks"
# Kind of cell -> what its tasks have in common, and the tag that stands for them all
TEMPLATES = {
    "lcl": ("_lcl_yaml", "lcl"),
    "control": ("_lcl_yaml", "lcl_control"),
    "naming": ("_lcl_yaml", "inspection_naming"),
    "product": ("_lcl_yaml", "product"),
    "imagenet-100": ("_lcl_yaml", "lcl_published"),
    "isekai": ("_lcl_yaml", "lcl_published"),
    "open-mi": ("_open_mi_yaml", "open_mi"),
    "inspection": ("_inspection_yaml", "inspection"),
}


def draw(
    recipe: str, out: Path, suites: tuple[str, ...] = (), limit: int | None = None, seed: int | None = None, overrides: Sequence[str] = ()
) -> dict[str, int]:
    """Write the tasks into a new folder. Returns how many questions each has, by its name.

    recipe: a file, a shipped recipe's name, or a run's folder. suites, limit, seed: as of ``lcl-adapter eval``. Suites whose answer is no label are
    left out, with a note. Raises RecipeError, DataError; RunError where ``out`` exists.
    """
    if out.exists():
        raise RunError(f"{out} exists; give a new folder, or remove it first.")
    cells = build_cells(*_recipe_of(recipe, suites, overrides, limit), suites, seed)
    counts: dict[str, int] = {}
    with whole_folder(out) as folder:
        (folder / "photos").mkdir(parents=True)
        files: dict[Picture, str] = {}
        used = set()
        for cell in cells:
            if cell.kind not in TEMPLATES or not all(case.labels for case in cell.cases):
                console.print(f"{cell.name}: left out, because its answers are no labels", style="yellow", markup=False, highlight=False)
                continue
            readable, _ = drop_unreadable(cell, None)
            name = f"lcl_{cell.name}".replace("-", "_")
            rows = [_row(number, case, folder, files) for number, case in enumerate(readable.cases)]
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_text(folder / f"{name}.yaml", _task(name, cell))
            used.add(TEMPLATES[cell.kind][0])
            counts[name] = len(rows)
        if not counts:
            raise RecipeError(["no suite with labels as answers; lmms-eval's tasks need one, for instance `kind: lcl`"])
        for file in ("lcl_tasks.py", *sorted(used)):
            shutil.copyfile(TASKS / file, folder / file)
        shutil.copyfile(str(rules.__file__), folder / "lcl_rules.py")
    return counts


def _recipe_of(recipe: str, suites: tuple[str, ...], overrides: Sequence[str], limit: int | None) -> tuple[Recipe, int | None]:
    """The recipe, with shipped suites added that it lacks; and ``limit``, as ``build_cells`` reads both."""
    run = Path(recipe) / "recipe.yaml"
    file, resolved = (run, True) if run.is_file() else (Path(recipe), False)
    loaded = load(file, overrides, resolved=resolved)
    added = [name for name in suites if name not in loaded.evaluate.suites and name in presets()]
    if added:
        loaded = load(file, [*overrides, *(f"evaluate.suites.{name}={{preset: {name}}}" for name in added)], resolved=resolved)
    return loaded, limit


def _row(number: int, case: Case, folder: Path, files: dict[Picture, str]) -> dict[str, Any]:
    """A question as a record: its messages in order, one photo in each of the user's."""
    return {
        "id": number,
        "messages": [_message(turn, folder, files) for turn in (*case.support, case.query)],
        "answer": case.worded_gold,
        "answers": list(case.answers),
        "label": case.gold,
        "labels": list(case.labels),
        "group": case.group,
    }


def _message(turn: Turn, folder: Path, files: dict[Picture, str]) -> dict[str, Any]:
    assert len(turn.pictures) <= 1, "an episode has one photo in a turn"
    image = None
    if turn.picture is not None:
        if turn.picture not in files:
            files[turn.picture] = _write_photo(turn.picture, folder)
        image = files[turn.picture]
    return {"role": turn.role, "text": turn.text, "image": image}


def _write_photo(picture: Picture, folder: Path) -> str:
    """The file as it is, where every program reads it alike; else the picture as lcl-adapter reads it, as PNG."""
    image = read_image(picture)
    data = read_bytes(picture)
    with Image.open(io.BytesIO(data)) as opened:
        suffix = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[str(opened.format)] if is_whole(picture) and is_plain(opened) else None
    if suffix is None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data, suffix = buffer.getvalue(), ".png"
    name = f"photos/{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
    (folder / name).write_bytes(data)
    return name


def _task(name: str, cell: Cell) -> str:
    template, tag = TEMPLATES[cell.kind]
    tags = dict.fromkeys([tag, f"lcl_{cell.suite}".replace("-", "_")])
    tags.pop(name, None)  # a task and a tag cannot have the same name
    return f"""include: {template}
task: {name}
tag: [{", ".join(tags)}]
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
generation_kwargs: {{max_new_tokens: {cell.new_tokens}, do_sample: false, temperature: 0, until: []}}
metadata: {{version: 1, kind: {cell.kind}, shots: {json.dumps(cell.shots)}, chance: {json.dumps(cell.chance)}}}
"""
