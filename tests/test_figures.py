"""Every figure in the documents is the stored one, and stored results are cited."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, figures, store
from benchmarks.figures import ROOT, FigureError, documents, figures_of, names_in, printed, rewritten
from benchmarks.gpu_page import page

DOCUMENTS = documents()
CHECKED_WHOLE = [ROOT / "README.md", ROOT / "docs" / "results.md"]
UNCITED = {"serve-pocket": "for information: benchmarks/README.md names it"}
NOT_MEASURED = {  # phrases with a decimal that no benchmark printed
    "Python 3.11": "a version",
    "LLaVA-1.5": "a model",
    "llava-1.5": "its page",
    "LLaVA 1.2.2": "a version",
    "v1, 1.5, 1.6": "versions of LLaVA",
    "Apache-2.0": "a licence",
    "CC BY 4.0": "a licence",
    "1.1 B parameters": "the size of a model",
    "1.3 times its largest shard": "a bound",
}
DIFFERENCE = "points report:2way-easy.prototype minus report:2way-easy.adapter"
DECIMAL = re.compile(r"(?<![\w.])\d*(?:\.\d+)+(?:e-?\d+)?(?!\w)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unmarked(line: str) -> list[str]:
    """The decimals of a line that no marker ties, outside code and links, and outside the phrases above."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", figures.MARKED.sub("", line))
    for phrase in NOT_MEASURED:
        plain = plain.replace(phrase, "")
    return DECIMAL.findall(plain)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_marked_figure_is_the_stored_one(document: Path) -> None:
    wrong = [
        f"{named(document)}, line {figure.line}: {figure.text} is {figure.stored} ({figure.path})"
        for figure in figures_of(document.read_text(encoding="utf-8"))
        if figure.text != figure.stored
    ]
    assert not wrong, "run `python -m benchmarks.figures`:\n" + "\n".join(wrong)


def test_every_stored_result_is_cited() -> None:
    cited = {name for document in DOCUMENTS for figure in figures_of(document.read_text(encoding="utf-8")) for name in names_in(figure.path)}
    assert set(figures.result_names()) - cited == set(UNCITED), "cite it in docs/results.md, or list it with a reason here"


@pytest.mark.parametrize("name", figures.result_names())
def test_every_stored_result_says_what_it_was_measured_with(name: str) -> None:
    stored = figures.result(name)["stored"]
    assert stored["command"].split()[0] in {"python", "make", "lcl-adapter"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
    assert re.match(r"[0-9a-f]{7}", stored["commit"]), "store it again in a checkout with git"
    assert stored["machine"]["cores"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_a_table_with_commands_has_no_figure_without_a_marker(document: Path) -> None:
    wrong, checked = [], False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            checked = False
        elif re.search(r"\|\s*(printed by|command)\s*\|", line, re.I):
            checked = True
        elif checked and unmarked(line):
            wrong.append(f"{named(document)}, line {number}: {', '.join(unmarked(line))}")
    assert not wrong, "put a marker behind each (benchmarks/figures.py says how):\n" + "\n".join(wrong)


@pytest.mark.parametrize("document", CHECKED_WHOLE, ids=named)
def test_the_pages_of_results_have_no_figure_without_a_marker(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", lambda fence: "\n" * fence[0].count("\n"), document.read_text(encoding="utf-8"), flags=re.S | re.M)
    wrong = [
        f"line {n}: {', '.join(unmarked(line))}" for n, line in enumerate(text.splitlines(), 1) if not line.startswith("    ") and unmarked(line)
    ]
    assert not wrong, "put a marker behind each (benchmarks/figures.py says how):\n" + "\n".join(wrong)


def test_the_gpu_page_is_its_json() -> None:
    text = ROOT / "docs" / "gpu-results.md"
    made = [page(json.loads(file.read_text(encoding="utf-8"))) for file in common.RESULTS.glob("gpu-*.json")]
    if text.exists() or made:
        assert text.exists(), "benchmarks/results has a result of a GPU, docs/gpu-results.md is missing"
        assert text.read_text(encoding="utf-8") in made, "docs/gpu-results.md is not what benchmarks/gpu_page.py makes of a stored result"


# The tool


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stored results of a benchmark and of a report, and no others."""
    row: dict[str, Any] = {"name": "2way-easy", "n": 1024, "chance": 0.5, "baseline": {"value": 0.9668}, "base": {"value": 0.5078}}
    row["adapter"] = {"value": 0.9512, "ci95": [0.937, 0.9641], "greedy": 0.95}
    bare = {**row, "name": "captions", "baseline": None}
    speed = {"ratios": {"a / b: time": 8.1219, "share": 0.845}, "figures": {"asked": 28352, "gap": 6.31e-6}}
    report = {"suites": [row, bare]}
    stored = {"commit": "abc1234", "date": "2026-11-26", "training_seconds": 222.6}
    for name, content in {"speed": speed, "report": report}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "stored": stored}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.result.cache_clear()
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_result_stays() -> Any:
    yield
    figures.result.cache_clear()


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("7.9<!-- speed:a / b: time --> times", "8.1<!-- speed:a / b: time --> times"),
        ("| **0.9**<!-- report:2way-easy.adapter --> |", "| **1.0**<!-- report:2way-easy.adapter --> |"),
        ("**0.900**<!-- report:2way-easy.adapter -->.", "**0.951**<!-- report:2way-easy.adapter -->."),
        ("0.1<!-- report:2way-easy.low -->–0.2<!-- report:2way-easy.high -->", "0.9<!-- report:2way-easy.low -->–1.0<!-- report:2way-easy.high -->"),
        ("1,000<!-- report:2way-easy.n -->/9<!-- report:2way-easy.n -->", "1,024<!-- report:2way-easy.n -->/1024<!-- report:2way-easy.n -->"),
        ("of 9,800<!-- speed:asked -->", "of 28,352<!-- speed:asked -->"),
        ("of 98<!-- speed:asked -->", "of 28,352<!-- speed:asked -->"),
        ("(1.0e-5<!-- speed:gap -->)", "(6.3e-6<!-- speed:gap -->)"),
        ("80<!-- percent speed:share --> %", "84<!-- percent speed:share --> %"),
        (".80<!-- speed:share -->", ".84<!-- speed:share -->"),
        ("`a\nb` .80<!-- speed:share -->", "`a\nb` .84<!-- speed:share -->"),
        ("\n```sh\na\n```\n.80<!-- speed:share -->", "\n```sh\na\n```\n.84<!-- speed:share -->"),
        ("+0.8<!-- speed:share -->", "+0.8<!-- speed:share -->"),
        (f"1.0<!-- {DIFFERENCE} -->", f"1.6<!-- {DIFFERENCE} -->"),
        ("0.500<!-- report:captions.prototype -->", "-<!-- report:captions.prototype -->"),
        ("commit 0000000<!-- report:commit -->", "commit abc1234<!-- report:commit -->"),
        ("9<!-- report:training_seconds --> s", "223<!-- report:training_seconds --> s"),
        ("`1.0<!-- no:such -->` is an example", "`1.0<!-- no:such -->` is an example"),
    ],
)  # fmt: skip
def test_figures_are_rewritten_in_the_form_of_the_document(before: str, after: str) -> None:
    assert rewritten(before) == after
    assert rewritten(after) == after


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n1.0<!-- nothing:x -->", "line 2: .*there is no nothing.json"),
        ("1.0<!-- speed:other -->", "has no 'other'; it has a / b: time"),
        ("1.0<!-- report:2way-easy.other -->", "has no '2way-easy.other'"),
        ("about<!-- speed:share -->", "'about' is not a number"),
        ("1.0 <!-- speed:share -->", "stands behind no figure"),
        ("1.0<!-- a note -->", "is not RESULT:PATH"),
        ("1.0<!-- points report:2way-easy.adapter minus report:captions.prototype -->", "is not a number, or a difference"),
    ],
)
def test_a_marker_that_names_nothing_is_an_error(text: str, message: str) -> None:
    with pytest.raises(FigureError, match=message):
        rewritten(text)


@pytest.mark.parametrize("line", ["| 4.2 times | `python -m x` |", "0.951, 3.0<!-- a:b -->", "gives .95"])
def test_a_figure_without_a_marker_is_noticed(line: str) -> None:
    assert unmarked(line)


def test_versions_and_code_are_no_figures() -> None:
    assert not unmarked("| LLaVA-1.5 | Python 3.11, `0.5` | [it](../results-0.4.md) | 5.2<!-- a:b --> / **5.4**<!-- a:c --> |")


def test_a_report_is_stored_with_what_it_was_measured_with(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    monkeypatch.setattr(store, "read_manifest", lambda folder: {"training_seconds": 12.5})
    with pytest.raises(SystemExit):
        store.main([str(run), "--command", "make quickstart"])
    (run / "report.json").write_text((made_up / "report.json").read_text())
    written = store.main([str(run), "--as", "again", "--command", "make quickstart"])
    stored = json.loads(written.read_text())["stored"]
    assert written == made_up / "again.json"
    assert (stored["command"], stored["training_seconds"]) == ("make quickstart", 12.5)
    assert stored["machine"]["cores"]
    assert stored["versions"]["torch"]
    assert rewritten("1<!-- again:training_seconds --> s, 0.1<!-- again:2way-easy.base -->") == (
        "12<!-- again:training_seconds --> s, 0.5<!-- again:2way-easy.base -->"
    )


def test_a_benchmark_is_stored_on_request_only(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = common.parser("what it does")
    for given in ([], ["--store"]):
        options = common.options_of(parser, "benchmarks.mine", given)
        common.finish(options, "mine", ("measure", "ratio"), [("speed", "2.0")], {"speed": 2.00000001}, {"asked": 5})
        printed_lines = capsys.readouterr().out.splitlines()
        assert json.loads(printed_lines[-1]) == {"name": "mine", "ratios": {"speed": 2.0}}
        assert "speed" in "\n".join(printed_lines[:-1])
        assert (made_up / "mine.json").exists() == bool(given)
    result = json.loads((made_up / "mine.json").read_text())
    assert result["stored"]["command"] == "python -m benchmarks.mine"
    assert (result["ratios"], result["figures"], result["rows"]) == ({"speed": 2.0}, {"asked": 5}, [["speed", "2.0"]])
    assert figures.value_of("mine:speed") == 2
    with pytest.raises(SystemExit):
        common.options_of(parser, "benchmarks.mine", ["--store", "--small"])


def test_rounding_is_that_of_the_printed_decimals() -> None:
    assert [printed(v, "0.951") for v in (0.95051, 0.9504, -0.0001, 1)] == ["0.951", "0.950", "-0.000", "1.000"]
