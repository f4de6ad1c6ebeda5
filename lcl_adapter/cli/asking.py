"""The command ``ask``, and its body: answers from a model or a server, and the folder of results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcl_adapter.cli.common import ADAPTER, PATH, base_options, emit, json_option, main, scores_option

if TYPE_CHECKING:
    from lcl_adapter.answering.api_types import JudgeName
    from lcl_adapter.answering.client import ScoreSource
    from lcl_adapter.answering.judged import Judged
    from lcl_adapter.base.ref import BaseRef


def write_results(ask: Callable[[], Judged], out: Path) -> Judged:
    """The answers, and a folder with them: a table, the same as JSON, and a page (:mod:`lcl_adapter.report.judged`).

    The folder is complete or not there. Raises RunError, before anything is asked, if ``out`` exists and is neither empty
    nor an earlier result.
    """
    from lcl_adapter import report
    from lcl_adapter.answering.judged import summary
    from lcl_adapter.files import replaced_folder
    from lcl_adapter.terminal import results

    with replaced_folder(out, report.is_judged) as partial_folder:
        judged = ask()
        report.write_judged(judged, partial_folder)
    results().print(f"wrote {out / 'index.html'}, and beside it judged.csv and judged.json", highlight=False, markup=False)
    results().print(summary(judged.answers), highlight=False, markup=False)
    return judged


@main.command()
@click.argument("support", type=PATH)
@click.argument("queries", nargs=-1, required=True, type=PATH)
@click.option("--adapter", type=ADAPTER, help="A run's folder, or photo-lcl; without it, the base alone is asked.")
@base_options(
    "--base",
    "The base to ask [default: the adapter's own, or pocket].",
    precision="Precision of the base [default: the adapter's own, or auto].",
    support_tokens="Tokens of a photo of SUPPORT, pooled, for instance 64 of 576 [default: as the adapter was trained, or all].",
)
@click.option("--shots", type=click.IntRange(1), help="At most this many photos of each class.")
@click.option("--question", help="Ask this about the queries, instead of the recipe's question.")
@click.option("--out", type=PATH, help="A folder for the results: judged.csv, judged.json, and index.html with thumbnails by label.")
@click.option(
    "--judge",
    type=click.Choice(["model", "tower", "both"]),
    help="What decides: the model's scores, the tower's likeness, or both [default: both, where the adapter has weights for them].",
)
@click.option("--compare", is_flag=True, help="Also ask the base without the adapter.")
@click.option("--endpoint", metavar="URL", help="Ask a model behind this server instead. Its API key is read from LCL_API_KEY.")
@click.option("--model", help="The model's name on the server [default: its only one; with --stored, the server's choice].")
@click.option("--stored", is_flag=True, help="SUPPORT is the name of a support set stored on the `lcl-adapter serve` at --endpoint.")
@click.option(
    "--wording",
    type=click.Choice(["lcl", "short", "bare"]),
    default="lcl",
    show_default=True,
    help="The wording of the questions to --endpoint, as in a recipe.",
)
@click.option("--pad", is_flag=True, help="Make pictures square before they are sent to --endpoint; vLLM crops pictures that are not.")
@scores_option
@json_option
def ask(
    support: Path, queries: tuple[Path, ...], adapter: Path | None, base: BaseRef, shots: int | None, question: str | None,
    out: Path | None, judge: JudgeName | None, compare: bool, endpoint: str | None, model: str | None, stored: bool, wording: str, pad: bool,
    scores: ScoreSource, as_json: bool,
) -> None:  # fmt: skip
    """Classify QUERIES by labelled photos. SUPPORT holds a folder of photos for each class. A query is a photo, or a
    folder with photos at any depth.

    \b
    lcl-adapter ask photos/ query.png --adapter runs/pocket
    lcl-adapter ask photos/ new-photos/ --adapter runs/pocket --out judged/
    lcl-adapter ask photos/ query.png --endpoint http://127.0.0.1:8000 --model lcl --wording short
    lcl-adapter ask screws query.png --stored --endpoint http://127.0.0.1:8000

    Exits with 1 if some photos have no answer. Each of them is named with its reason.
    """
    from lcl_adapter.answering.ask import ask_endpoint, ask_model, ask_stored_set

    brief = out is not None
    answers: Callable[[], Judged]
    if endpoint is None:
        if stored or model:
            raise click.UsageError(f"{'--stored' if stored else '--model'} needs --endpoint.")
        if compare and adapter is None:
            raise click.UsageError("--compare needs --adapter: without one, the base alone is asked.")
        answers = partial(
            ask_model, support, queries, adapter=adapter, base=base, shots=shots, question=question, compare=compare, brief=brief, judge=judge
        )
    else:
        local: dict[str, object] = {
            "--adapter": adapter, "--base": base.name, "--vision-tower": base.tower, "--precision": base.precision,
            "--support-tokens": base.support_tokens, "--orientations": base.orientations,
            "--readings": base.readings,
        }  # fmt: skip
        if given := [name for name, value in local.items() if value is not None]:
            raise click.UsageError(f"{', '.join(given)}: with --endpoint, the model is the server's; name it with --model.")
        if judge not in {None, "model"} and not stored:
            raise click.UsageError(f"--judge {judge} cannot be used with --endpoint, which has no tower, but with a stored set: --stored.")
        if compare:
            raise click.UsageError("--compare cannot be used with --endpoint: ask the server's base too, with --model.")
        if stored and shots:
            raise click.UsageError("--shots cannot be used with --stored: a stored set is used as it is.")
        if stored:
            options: dict[str, Any] = {"model": model, "question": question, "judge": judge}
            answers = partial(ask_stored_set, str(support), queries, endpoint, **options, with_photos=brief, brief=brief)
        else:
            asked: dict[str, Any] = {"model": model, "shots": shots, "question": question, "wording": wording, "pad": pad, "scores": scores}
            answers = partial(ask_endpoint, support, queries, endpoint, **asked, brief=brief)
    judged = answers() if out is None else write_results(answers, out)
    emit(judged.result, as_json)
    if judged.failed:
        click.get_current_context().exit(1)
