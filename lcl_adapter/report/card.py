"""The run card: one Markdown page with what was trained, on what data, and the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.base.supports import orientations_of, readings_of, trained_shots, trained_supports, trained_tokens
from lcl_adapter.evaluate.runner import count_of
from lcl_adapter.files import read_result, read_settings, write_text
from lcl_adapter.report.table import format_chance, format_figure, format_judge, retention_line

SUPPORTS = {
    "ordered": "",
    "independent": "independent: a labelled picture sees no other",
    "compressed": "compressed: a labelled picture sees no other, and a question sees only the words beside it",
}


def write_card(run: Path) -> Path:
    """Write ``README.md`` in the run's folder, from the manifest, the recipe and, if it exists, the report."""
    manifest = read_manifest(run)
    report = read_result(run / "report.json") if (run / "report.json").exists() else None
    sections = [
        _head(run.name, manifest),
        _results(report),
        "## Use\n\n```\nlcl-adapter ask photos/ query.png --adapter "
        + run.name
        + "\n```\n\nWith plain PEFT:\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForImageTextToText\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), "{run.name}")\n```\n\n'
        "PEFT needs the base in Hugging Face's layout: `lcl-adapter convert` writes it from the original one.",
        _training(manifest) if "training_seconds" in manifest else "",
        "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items()),
        "## Recipe\n\n```yaml\n" + read_settings(run / "recipe.yaml").strip() + "\n```",
    ]
    write_text(run / "README.md", "\n\n".join(s for s in sections if s) + "\n")
    return run / "README.md"


def _head(name: str, manifest: dict[str, Any]) -> str:
    origin = "trained on Link-Context-Learning episodes" if "training_seconds" in manifest else f"imported from `{manifest['imported_from']}`"
    trained = {source: len(names) for source, names in manifest.get("held_in", {}).items()}
    facts = {
        "base": f"`{manifest['base']}`, hash `{manifest['base_hash'][:16]}`",
        "layout, family": f"{manifest['layout']}, {manifest['family']} (prompt v{manifest['prompt_version']})",
        "precision": manifest["precision"],
        "tokens of a picture shown with a label": f"{' or '.join(map(str, tokens))}, pooled" if (tokens := trained_tokens(manifest)) else "",
        "supports": SUPPORTS[trained_supports(manifest)],
        "photos of a label that were shown together": f"{shots} at most; more are read in parts" if (shots := trained_shots(manifest)) else "",
        "questions": f"asked {times} times, in as many orientations of their pictures" if (times := orientations_of(manifest)) > 1 else "",
        "support sets": f"read {readings} times before a question" if (readings := readings_of(manifest)) > 1 else "",
        "trained classes": ", ".join(f"{source}: {count}" for source, count in trained.items()),
    }
    lines = "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)
    return f"# {name}\n\nA LoRA adapter for a LLaVA, {origin} by lcl-adapter.\n\n{lines}"


def _results(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    columns = ("suite", "n", "figure", "chance", "without training", "base", "adapter", "95 %", "tower", "model and tower", "adapter's text")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    rows = []
    for row in report["suites"]:
        baseline, own = row["baseline"], row["adapter"]
        figures = (
            *(
                row["name"],
                count_of(row),
                row["metric"],
                format_chance(row),
                format_figure(baseline and baseline["value"]),
                f"{row['base']['value']:.3f}",
            ),
            *(f"**{own['value']:.3f}**", f"{own['ci95'][0]:.3f} - {own['ci95'][1]:.3f}"),
            *(format_judge(row, "tower"), format_judge(row, "both"), format_figure(own["greedy"])),
        )
        rows.append(f"| {' | '.join(map(str, figures))} |")
    published = [(row["name"], ", ".join(f"{p['who']} {p['value']:.3f}" for p in row["published"])) for row in report["suites"] if row["published"]]
    heading = "\n\nPublished by others, by the same protocol:\n\n"
    others = heading + "\n".join(f"- {name}: {figures}" for name, figures in published) if published else ""
    retention = "".join(f"\n\n{retention_line(row)}" for row in report["retention"])
    intro = "## Results\n\nMeasured together, on the same questions (`report.json`, `predictions.jsonl`).\n\n"
    return intro + head + "\n".join(rows) + others + retention


def _training(manifest: dict[str, Any]) -> str:
    parts = "\n".join(f"| {part} | {n['total']:,} | {n['trained']:,} |" for part, n in manifest["parameters"].items())
    nothing = {"rows": 0, "tokens": 0, "learned": 0}
    everything = max(1, sum(t["tokens"] for t in manifest["tokens"].values()))
    shares = "\n".join(
        f"| {name} | {share:.2f} | {manifest['shares']['realised'][name]:.2f} | {counts['tokens'] / everything:.2f} | {counts['rows']:,} | "
        f"{counts['tokens']:,} | {counts['learned']:,} | {_passes(manifest, name)} | "
        f"{', '.join(f'{v} x {k}' for k, v in manifest['skipped'].get(name, {}).items()) or '-'} |"
        for name, share in manifest["shares"]["requested"].items()
        for counts in [manifest["tokens"].get(name, nothing)]
    )
    columns = ("source", "share asked", "realised", "of the tokens", "rows", "tokens", "learned", "passes", "left out")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    images = manifest["images"]
    faults = "".join(f"\n- {count} x {fault}" for fault, count in manifest["bad_pictures"].items())
    stop, best = manifest.get("early_stop"), manifest.get("best_step")
    ended = f"Stopped at step {stop['step']:,} of {stop['of']:,}: {stop['reason']}. " if stop else ""
    ended = "\n\n" + ended + (f"The adapter is that of step {best:,}, the best that was measured." if best else "") if stop or best else ""
    hashes = "\n".join(f"- `{name}`: `{digest[:16]}`" for name, digest in manifest["data"].items())
    return (
        f"## Training\n\n{manifest['training_seconds']:.0f} s; rows of up to {manifest['longest_row']} tokens; {images['shown']:,} images shown, "
        f"{images['through_the_tower']:,} passed the vision tower.{ended}\n\n| part | parameters | trained |\n|---|---|---|\n{parts}\n\n"
        f"{head}\n{shares}\n\nData:\n\n{hashes}"
        + (f"\n\nConversations replaced because of a bad picture or sample:\n{faults}" if faults else "")
        + "\n\n![loss](loss.png)"
    )


def _passes(manifest: dict[str, Any], name: str) -> str:
    """How often a source's entries were used, and whether the source ended before training did."""
    passes = f"{manifest['passes'][name]:.1f} times" if name in manifest["passes"] else "-"
    return passes + (f", then ended ({manifest['ended'][name]})" if name in manifest["ended"] else "")
