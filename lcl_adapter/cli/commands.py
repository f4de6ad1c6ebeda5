"""One function a command: the parts put together. Results are returned; what people read goes to standard error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcl_adapter import processes, report
from lcl_adapter.answering import ask as asking
from lcl_adapter.base import describe as describing
from lcl_adapter.base import neighbours as indexing
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints import convert as converting
from lcl_adapter.checkpoints import exchange
from lcl_adapter.checkpoints import merge as merging
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import read_image
from lcl_adapter.errors import RecipeError, RunError, did_you_mean
from lcl_adapter.evaluate import check_held_out, check_suites
from lcl_adapter.evaluate import evaluate as measure
from lcl_adapter.memory import plan as planning
from lcl_adapter.recipe import load
from lcl_adapter.terminal import console
from lcl_adapter.training import preflight as checking
from lcl_adapter.training import trainer as training
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.during import BEST, Watch, best_of


def train(recipe_path: str, overrides: Sequence[str] = (), force: bool = False) -> dict[str, Any]:
    """Train, then evaluate where the recipe has suites. ``resume=true`` among the overrides goes on with a stopped run.

    What the forecast says will not fit is not begun, unless ``force``.

    ``kept`` in the result is false where a suite under ``keep`` fell further than it may.
    """
    resume, kept = _resume(overrides)
    recipe = load(recipe_path, kept)
    processes.join()  # from here on this process has its own GPU
    mixture = Mixture(recipe)
    check_held_out(recipe, mixture)
    check_suites(recipe, load_encoder(BaseRef.of(recipe)))
    if not processes.sharded():  # the forecast is of one device that holds everything
        forecast = planning.make(recipe, mixture=mixture)
        if not forecast["fits"]:
            report.show_plan(forecast)
            if not force:
                raise RunError(
                    f"{recipe_path}: the forecast is more than this machine's free memory; change what is shown above, or insist with --force."
                )
    watching = (lambda base, save: Watch(recipe, base, save)) if recipe.evaluate.watched else None
    facts = training.train(recipe, resume, watching, mixture)
    if not processes.is_first():
        processes.leave()
        return {"run": str(recipe.output), "kept": True}  # the first writes and measures
    processes.leave()
    report.plot_loss(recipe.output / "metrics.jsonl", recipe.output / "loss.png")
    report.write_card(recipe.output)
    console.print(f"adapter saved in {recipe.output} after {facts['training_seconds']:.0f} s of training", style="bold")
    result: dict[str, Any] = {"run": str(recipe.output), "training_seconds": facts["training_seconds"], "shares": facts["shares"], "kept": True}
    if recipe.evaluate.suites:
        result |= evaluate(recipe.output)
        result["kept"] = all(one["kept"] for one in result["retention"])
        if not result["kept"]:
            result["best"] = best_of(recipe.output)
            _say_what_passes(recipe.output, result["best"])
    return result


def _say_what_passes(run: Path, best: dict[str, Any] | None) -> None:
    if best is None:
        hint = "no step that was measured passes; raise the share of what was lost, or measure during the run (`evaluate.every`)"
    else:
        hint = f"the best that passes is in {run / BEST} (step {best['step']}); `lcl-adapter eval {run / BEST}` measures it whole"
    console.print(f"THE RETENTION GATE DOES NOT PASS: {hint}", style="bold white on red", markup=False, highlight=False)


def evaluate(run: Path, **options: Any) -> dict[str, Any]:
    """Measure, then write the table, the plots, the page and the card. Options: those of ``lcl_adapter.evaluate.evaluate``."""
    found = measure(run, **options)
    if not found["suites"]:
        raise RecipeError([f"{run / 'recipe.yaml'}: no suites under `evaluate`, so there is nothing to measure"])
    report.show_table(found["suites"])
    for kept in found["retention"]:
        if not kept["kept"]:
            console.print(f"{kept['suite']} fell {kept['fell']:.1f} points below the base, {kept['allowed']:.1f} are allowed", style="bold red")
    out = Path(found["folder"])
    if not report.plot_accuracy(found["suites"], out / "accuracy.png"):
        (out / "accuracy.png").unlink(missing_ok=True)
    if not report.plot_roc(found["suites"], report.read_predictions(out), out / "roc.png"):
        (out / "roc.png").unlink(missing_ok=True)
    page = report.write_report_page(out)
    if out == run:
        report.write_card(run)
    console.print(f"report: {page}", highlight=False)
    return found


def ask(support: Path, queries: Sequence[Path], **options: Any) -> dict[str, Any]:
    """Judge pictures by class folders. Options: those of ``lcl_adapter.answering.ask.here``."""
    return asking.here(support, queries, **options)


def ask_endpoint(support: Path, queries: Sequence[Path], url: str, **options: Any) -> dict[str, Any]:
    """The same of a model behind a server. Options: those of ``lcl_adapter.answering.ask.behind``."""
    return asking.behind(support, queries, url, **options)


def ask_stored(name: str, queries: Sequence[Path], url: str, **options: Any) -> dict[str, Any]:
    """By a set that a server keeps. Options: those of ``lcl_adapter.answering.ask.stored``."""
    return asking.stored(name, queries, url, **options)


def merge(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Merge, and say how equal the result is. Options: those of ``lcl_adapter.checkpoints.merge.merge``."""
    result = merging.merge(run, out, **options)
    written = f"{result['layout']} layout, {result['dtype']}, {result['bytes'] / 1e9:.2f} GB in {result['shards']} file(s)"
    console.print(f"{out}: {written}", highlight=False)
    gap, effect = result["largest_layer_difference"], result["largest_layer_effect"]
    console.print(f"{result['layers']} layers, none further from the adapter's than {gap:.2g}; its own effect is up to {effect:.2g}", highlight=False)
    _say_probes(result)
    if "from_4_bit" in result:
        cost = result["from_4_bit"]
        console.print(
            f"against the 4-bit model that was trained: {cost['largest_logit_difference']:.2g}, greedy equal on {cost['greedy_equal']}",
            highlight=False,
        )
    return result


def _say_probes(result: dict[str, Any]) -> None:
    if isinstance(result["probes"], int):
        told = (
            f"largest logit difference {result['largest_logit_difference']:.2g} on {result['probes']} probes, greedy answers equal on "
            f"{result['greedy_equal']}"
        )
    else:
        told = f"probes {result['probes']}"
    console.print(told, highlight=False, markup=False)


def convert(source: BaseRef | str, out: Path, **options: Any) -> dict[str, Any]:
    """Convert, and say how equal the result is. Options: those of ``lcl_adapter.checkpoints.convert.convert``."""
    result = converting.convert(source, out, **options)
    console.print(
        f"{out}: {result['from']} -> {result['to']}, {result['bytes'] / 1e9:.2f} GB in {result['shards']} file(s), "
        f"all {result['tensors_equal']} tensors read again and equal",
        highlight=False,
    )
    _say_probes(result)
    return result


def export(run: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """An adapter for upstream, and how to ask it there."""
    result = exchange.export_adapter(run, out, base)
    told = f"{result['layers']} layers{' and the projector' if result['projector'] else ''}, read again and equal"
    console.print(f"{out}: {told}; ask it in upstream's environment with {out / 'ask_upstream.py'}", highlight=False, markup=False)
    return result


def export_for_vllm(run: Path, out: Path, base: BaseRef = NOT_GIVEN, **options: Any) -> dict[str, Any]:
    """An adapter for vLLM, and the script that serves it there."""
    result = exchange.export_for_vllm(run, out, base, **options)
    console.print(f"{out}: {result['layers']} layers, read again and equal; {out / 'serve.sh'} BASE serves it", highlight=False, markup=False)
    return result


def import_adapter(folder: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """An adapter trained elsewhere, as a run."""
    result = exchange.import_adapter(folder, out, base)
    dropped = f"; {result['dropped']} weights left out that change nothing" if result["dropped"] else ""
    console.print(f"{out}: {result['layers']} layers{' and the projector' if result['projector'] else ''}{dropped}", highlight=False, markup=False)
    return result


def preview(
    recipe_path: str, overrides: Sequence[str], each: int, out: Path, png: bool, sources: Sequence[str] = (), policies: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the preview page of a recipe, of all its sources or of some."""
    recipe = load(recipe_path, overrides)
    unknown = [name for name in sources if name not in recipe.sources]
    if unknown:
        known = list(recipe.sources)
        raise RecipeError([f"no source {name!r}{did_you_mean(name, known)}; the recipe has {', '.join(known)}" for name in unknown])
    collator = Collator(Mixture(recipe), load_encoder(BaseRef.of(recipe)), check=read_image)
    written = report.write_preview(collator, each, f"{Path(recipe_path).stem}: what is learned", out, png, sources, policies)
    for path in written:
        console.print(f"wrote {path}", highlight=False)
    return {"written": [str(path) for path in written]}


def check(recipe_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Open everything a recipe names; the faults are in the result."""
    found = checking.check(load(recipe_path, overrides))
    report.show_check(found)
    return found


def plan(recipe_path: str, overrides: Sequence[str], memory: int | None = None, device: str | None = None, probe: bool = False) -> dict[str, Any]:
    """Forecast what a recipe takes, before any weight is loaded; ``probe`` loads them after all and times a step."""
    recipe = load(recipe_path, overrides)
    mixture = Mixture(recipe)
    found = planning.make(recipe, memory, device, mixture)
    if probe:
        found["probe"] = planning.probe(recipe, mixture)
    report.show_plan(found)
    return found


def inspect(base: BaseRef | str) -> dict[str, Any]:
    """Say what a path is."""
    return describing.describe(base)


def facts(found: dict[str, Any]) -> list[str]:
    """A fact a line, as people read them."""
    return report.lines_of(found)


def index(folder: Path, base: BaseRef | str, out: Path | None) -> dict[str, Any]:
    """Write which classes are near each other."""
    found = indexing.index(folder, base, out)
    console.print(f"wrote {found['written']}: {found['classes']} classes, {found['pictures']} pictures", highlight=False, markup=False)
    return found


def _resume(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """``resume=true`` is about this call and not part of the recipe."""
    resume = False
    kept = []
    for text in overrides:
        if text.startswith("resume="):
            if text not in {"resume=true", "resume=false"}:
                raise RecipeError([f"override {text!r}: true or false is expected"])
            resume = text == "resume=true"
        else:
            kept.append(text)
    return resume, kept
