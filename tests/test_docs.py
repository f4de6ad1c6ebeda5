"""The documents: their commands parse and the cheap ones run, their Python runs, their recipes load, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from click.testing import CliRunner

from lcl_adapter import recipe
from lcl_adapter.cli import main
from lcl_adapter.photo import build as photo_build
from tests.conftest import paint
from tests.live import serving
from tests.test_merge import adapter_on
from tests.tiny import save_original, save_tiny

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = [ROOT / folder / "README.md" for folder in ("benchmarks", "contrib/lmms-eval", "datasets")]
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *GUIDES, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "lcl_adapter/pocket/MODEL_CARD.md", ROOT / "lcl_adapter/pocket/data/ATTRIBUTION.md"]
# Programs that a document may call and that are not this project's.
OTHERS = {"accelerate", "curl", "docker", "echo", "git", "hf", "llama-server", "lmms-eval", "ollama", "pip", "sbatch", "torchrun", "vllm"}
WRITTEN_BY_EXPORT = {"exported/serve.sh", "llava-lora-mix/ask_upstream.py"}
# Groups of `lcl-adapter` and commands that take seconds on a tiny base, and what a command line may not need here.
CHEAP = {"ask", "convert", "data", "export", "inspect", "merge", "recipes", "support"}
# Data sets, servers, a hub, a run of 4 bits, a base in Hugging Face's layout, and a trained adapter, whose effect bf16 does not round away.
ELSEWHERE = ("data.root=/data", "--endpoint", "HuggingFaceTB/", "runs/qlora", "vllm", "bf16")


class Block(NamedTuple):
    document: Path
    line: int
    language: str
    text: str


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    every = [Block(document, text[: fence.start()].count("\n") + 1, fence[1], fence[2]) for fence in fences]
    return [block for block in every if block.language in languages]


def without_blocks(document: Path) -> str:
    """A document with each line of its fenced blocks left empty, so that line numbers stay."""
    text = document.read_text(encoding="utf-8")
    return re.sub(r"^```\w*\n.*?^```$", lambda fence: "\n" * fence[0].count("\n"), text, flags=re.S | re.M)


def commands(document: Path) -> list[list[str]]:
    """The command lines of its ``sh`` blocks as a shell would split them; a line that ends in a backslash goes on."""
    lines = [line for block in blocks(document, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_in_prose(document: Path) -> list[list[str]]:
    """Code spans that are whole commands; a span may go on in the next line."""
    spans = re.findall(r"(?<!`)`((?:lcl-adapter|make|python -m) [^`]+)`(?!`)", without_blocks(document))
    split = [shlex.split(re.sub(r"\s*\n\s*", " ", span)) for span in spans if "..." not in span and "…" not in span]
    return [words for words in split if words[0] != "lcl-adapter" or len(words) > 2]  # `lcl-adapter serve` names a command


def parse(words: list[str]) -> None:
    """A command line of ``lcl-adapter``: parsed by click without running it; the recipe it names accepts its overrides."""
    command, rest = main, words
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined, assignment]
    with command.make_context("lcl-adapter", list(rest)) as context:
        options = context.params
    if "recipe" in options:
        overrides = [override for override in options["overrides"] if not override.startswith("resume=")]
        assert recipe.load(options["recipe"], overrides).sources


def check(words: list[str]) -> None:
    """One command line of a document."""
    program, *rest = words
    if program == "lcl-adapter":
        parse(rest)
    elif program == "make":
        assert all(re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M) for target in rest), words
    elif program in {"python", ".venv/bin/python"} and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    elif program in {"python", ".venv/bin/python"}:
        assert rest[0] in WRITTEN_BY_EXPORT or (ROOT / rest[0]).is_file(), f"no script {rest[0]}"
    elif program == ".venv/bin/pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in rest if not word.startswith("-")), words
    elif program in WRITTEN_BY_EXPORT:
        assert (ROOT / "lcl_adapter/checkpoints/exchange").is_dir()
    elif program.startswith("tools/"):
        assert os.access(ROOT / program, os.X_OK), f"no script {program} that can be run"
    else:
        assert program in OTHERS, f"{program} is no known program: a typo, or an entry that OTHERS needs"
        files = [word for word in rest if word.startswith(("launch/", "recipes/"))]
        assert all((ROOT / file).is_file() for file in files), files
        if "lcl_adapter" in rest:
            parse(rest[rest.index("lcl_adapter") + 1 :])
        elif program == "sbatch":
            parse(["train", *rest[rest.index("launch/slurm.sh") + 1 :]])


def listed(find: Callable[[Path], list[list[str]]]) -> list[object]:
    """Test parameters: every different command line of every document."""
    different = {(named(document), shlex.join(words)): words for document in DOCUMENTS for words in find(document)}
    return [pytest.param(words, id=f"{document}: {line}") for (document, line), words in different.items()]


@pytest.mark.parametrize("words", listed(commands))
def test_a_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize("words", listed(commands_in_prose))
def test_a_command_in_a_sentence_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("lcl-adapter ask photos/ query.png --adaptor runs/pocket", "No such option"),
        ("lcl-adapter train recipes/pocket.yaml train.max_step=100", "unknown key"),
        ("lcl-adapter plan recipes/pocked.yaml", "pocked"),
        ("make quickstarts", "quickstarts"),
        ("python -m benchmarks.nothing", "no module"),
        (".venv/bin/pytest tests/test_nothing.py", "test_nothing"),
        ("tools/gpu/pak.sh", "no script"),
        ("dokcer compose up", "no known program"),
    ],
)
def test_a_wrong_command_is_noticed(wrong: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above rest on."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, Exception), match=error):
        check(shlex.split(wrong))


# What the documents' own commands and programs find in the current folder


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("docs") / "lcl")


@pytest.fixture(scope="module")
def models_and_runs(run_folder: Path, tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases and adapters under the names that the documents use."""
    folder = tmp_path_factory.mktemp("docs-models")
    llava, lcl = save_original(folder / "llava-v1.5-7b", "v1.5", tower_inside=48), save_original(folder / "lcl-7b", "v1")
    made = {"models/llava-v1.5-7b": llava, "models/lcl-7b": lcl, "models/clip-vit-large-patch14": folder / "lcl-7b-tower"}
    made |= {"runs/mix": adapter_on(llava, folder / "mix"), "runs/lcl-2way-weight": adapter_on(lcl, folder / "lcl-2way-weight")}
    made |= {f"runs/{name}": adapter_on(tiny_folder("llava-1.5"), folder / name, seed=seed) for seed, name in enumerate("ab")}
    photo = save_tiny(folder / "photo", "photo")
    (photo / "build.json").write_text("{}")
    made |= {"photo-base": photo, "photo-lcl": adapter_on(photo, folder / "photo-lcl")}
    return made | {"runs/pocket": run_folder, "runs/quickstart": run_folder}


@pytest.fixture
def folder(models_and_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader: photos of two classes, new photos, the recipes, bases, and finished runs."""
    for number, label in enumerate(("good", "scratched")):
        for index in (1, 2, 3):
            paint(tmp_path / "photos" / label / f"{index}.png", (40 + 150 * number, 160 - 100 * number, 60), seed=10 * number + index)
            (tmp_path / f"{label}-{index}.jpg").write_bytes((tmp_path / "photos" / label / f"{index}.png").read_bytes())
    for number, name in enumerate(("query.png", "new.jpg", "new-1.jpg", "new-2.jpg")):
        paint(tmp_path / "painted.png", (60, 150, 60), seed=70 + number).rename(tmp_path / name)
        paint(tmp_path / "new-photos" / f"{number}.png", (60, 150, 60), seed=80 + number)
    for name, place in models_and_runs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(place)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(photo_build, "base_folder", lambda: tmp_path / "photo-base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cheap(words: list[str]) -> bool:
    return words[0] == "lcl-adapter" and words[1] in CHEAP and not any(word.startswith(ELSEWHERE) for word in words)


def to_run(document: Path) -> list[list[str]]:
    """Its cheap commands. Those of seconds, whose results no later command reads, are run in the first document that has them."""
    earlier = {tuple(words) for other in DOCUMENTS[: DOCUMENTS.index(document)] for words in commands(other)}
    return [words for words in commands(document) if cheap(words) and not ({"merge", "check"} & {*words[1:3]} and tuple(words) in earlier)]


RUN = [document for document in DOCUMENTS if to_run(document)]


@pytest.mark.parametrize("document", RUN, ids=named)
def test_the_cheap_commands_run(document: Path, folder: Path) -> None:
    """One after the other, as a reader would enter them; ``/models`` is a folder here."""
    for words in to_run(document):
        result = CliRunner().invoke(main, [word.removeprefix("/") if word.startswith("/models/") else word for word in words[1:]])
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


def test_enough_commands_run() -> None:
    """The test above is not empty: of each cheap group at least one command, in four documents or more."""
    ran = [words for document in RUN for words in to_run(document)]
    assert {words[1] for words in ran} >= CHEAP
    assert len(RUN) >= 6


@pytest.fixture(scope="module")
def server(tiny_folder: Callable[[str], Path], run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``lcl-adapter serve pocket --adapter lcl=runs/pocket`` on a tiny base."""
    with serving(tiny_folder("pocket"), tmp_path_factory.mktemp("docs-store") / "store", lcl=run_folder) as url:
        yield url


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=named)
def test_the_python_runs(document: Path, folder: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A document's blocks in order, as one program, on the base they name; a server they name is a live one."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        program = "\n" * block.line + block.text.replace("http://127.0.0.1:8000", server)
        exec(compile(program, str(document), "exec"), names)
    for value in names.values():
        if not isinstance(value, type) and callable(close := getattr(value, "close", None)):
            close()  # an example leaves its client open
    printed = [ast.literal_eval(written) for written in re.findall(r"\{[^{}]*\}", capsys.readouterr().out)]
    probabilities = [values for values in printed if set(values) == {"good", "scratched"}]
    assert probabilities, "by label"
    assert all(sum(values.values()) == pytest.approx(1, abs=1e-3) for values in probabilities)


def test_python_is_called_python() -> None:
    """A program in a block of another language would not be run."""
    assert blocks(README, "python")
    for document in DOCUMENTS:
        for block in blocks(document, "", "text"):
            assert not re.search(r"^(import|from) \w+", block.text, re.M), f"{named(document)}, line {block.line}: tag it python"


@pytest.mark.parametrize("block", [b for d in DOCUMENTS for b in blocks(d, "yaml")], ids=lambda b: f"{named(b.document)}, line {b.line}")
def test_a_part_of_a_recipe_loads(block: Block, tmp_path: Path) -> None:
    """Added to a recipe that has nothing else, with a source of replay beside it."""
    keys = yaml.safe_load(block.text)
    keys.setdefault("base", "pocket")
    keys.setdefault("sources", {"lcl": {"type": "pocket"}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    assert recipe.load(tmp_path / "mine.yaml").sources


# Links and layout


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(document), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = next(n for n in range(100) if (f"{name}-{n}" if n else name) not in names)
        names.add(f"{name}-{number}" if number else name)
    return names


@pytest.mark.parametrize("document", LINKED, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(document))
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            path, _, anchor = target.partition("#")
            place = (document.parent / path).resolve() if path else document
            assert place.exists(), f"{named(document)}: {target}"
            assert place.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(place), f"{named(document)}: {target}; there are {sorted(anchors(place))}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_prose_wraps_at_100_columns(document: Path) -> None:
    """Tables, blocks, and what a link leads to may be longer. Figures' markers do not count (benchmarks/figures.py)."""
    lines = enumerate(without_blocks(document).splitlines(), 1)
    prose = [
        (number, re.sub(r"\]\([^)]*\)", "]()", re.sub(r"<!--.*?-->", "", line)))
        for number, line in lines
        if not line.lstrip().startswith(("|", "![")) and line[:4] != "    "
    ]
    assert not [f"{named(document)}, line {number}: {len(line)} columns" for number, line in prose if len(line) > 100]


def test_the_readme_is_short_and_leads_with_the_two_commands() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160
    assert commands(README)[:2] == [["make", "quickstart"], ["make", "test"]]


def test_every_document_is_reached_from_the_readme() -> None:
    """By links, in two steps or fewer."""

    def linked(document: Path) -> set[Path]:
        targets = re.findall(r"\]\(\s*([^)#\s]+\.md)(?:#[^)]*)?\s*\)", without_blocks(document))
        return {(document.parent / target).resolve() for target in targets if "://" not in target}

    first = linked(README)
    reached = first | {other for document in first if document.is_file() for other in linked(document)}
    assert not [named(document) for document in DOCUMENTS if document != README and document not in reached]


def test_every_recipe_has_its_row() -> None:
    table = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for name in recipe.shipped_recipes():
        assert re.search(rf"^\| *\[?`{name}`", table, re.M), f"{name} has no row in docs/recipes.md"
