"""The run card: one Markdown page that says what was trained, on what, and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcl_adapter.base.adapter import read_manifest
from lcl_adapter.files import write_text
from lcl_adapter.report.table import figure


def write_card(run: Path) -> Path:
    """``README.md`` of the run's folder, from the manifest, the recipe and, where there is one, the report."""
    manifest = read_manifest(run)
    report = json.loads((run / "report.json").read_text(encoding="utf-8")) if (run / "report.json").exists() else None
    sections = [
        _head(run.name, manifest),
        _results(report),
        "## Use\n\n```\nlcl-adapter ask photos/ query.png --adapter "
        + run.name
        + "\n```\n\nWith plain PEFT:\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForImageTextToText\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), "{run.name}")\n```\n\n'
        "PEFT takes the base in Hugging Face's layout: `lcl-adapter convert` writes it from the original one.",
        _training(manifest) if "training_seconds" in manifest else "",
        "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items()),
        "## Recipe\n\n```yaml\n" + (run / "recipe.yaml").read_text(encoding="utf-8").strip() + "\n```",
    ]
    write_text(run / "README.md", "\n\n".join(s for s in sections if s) + "\n")
    return run / "README.md"


def _head(name: str, manifest: dict[str, Any]) -> str:
    made = "trained on Link-Context-Learning episodes" if "training_seconds" in manifest else f"imported from `{manifest['imported_from']}`"
    held = {n: len(names) for n, names in manifest.get("held_in", {}).items()}
    facts = {
        "base": f"`{manifest['base']}`, hash `{manifest['base_hash'][:16]}`",
        "layout, family": f"{manifest['layout']}, {manifest['family']} (prompt v{manifest['prompt_version']})",
        "precision": manifest["precision"],
        "classes seen": ", ".join(f"{n}: {count}" for n, count in held.items()),
    }
    lines = "\n".join(f"- {what}: {told}" for what, told in facts.items() if told)
    return f"# {name}\n\nA LoRA adapter for a LLaVA, {made} by lcl-adapter.\n\n{lines}"


def _results(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    head = "| suite | n | figure | chance | without training | base | adapter | 95 % | adapter's text |\n|---|---|---|---|---|---|---|---|---|\n"
    rows = []
    for row in report["suites"]:
        near, own = row["baseline"], row["adapter"]
        rows.append(
            f"| {row['name']} | {row['n']} | {row['metric']} | {row['chance']:.2f} | {figure(near and near['value'])} | {row['base']['value']:.3f} | "
            f"**{own['value']:.3f}** | {own['ci95'][0]:.3f} - {own['ci95'][1]:.3f} | {figure(own['greedy'])} |"
        )
    told = [(row["name"], ", ".join(f"{p['who']} {p['value']:.3f}" for p in row["published"])) for row in report["suites"] if row["published"]]
    others = "\n\nPublished by others, by the same protocol:\n\n" + "\n".join(f"- {name}: {figures}" for name, figures in told) if told else ""
    kept = "".join(
        f"\n\n{r['suite']}: {r['fell']:+.1f} points below the base, {r['allowed']:.1f} allowed: {'kept' if r['kept'] else '**not kept**'}."
        for r in report["retention"]
    )
    return "## Results\n\nMeasured together, on the same questions (`report.json`, `predictions.jsonl`).\n\n" + head + "\n".join(rows) + others + kept


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
    columns = ("source", "share asked", "realised", "of the tokens", "rows", "tokens", "learned", "gone through", "left out")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    images = manifest["images"]
    faults = "".join(f"\n- {count} x {fault}" for fault, count in manifest["bad_pictures"].items())
    hashes = "\n".join(f"- `{name}`: `{digest[:16]}`" for name, digest in manifest["data"].items())
    return (
        f"## Training\n\n{manifest['training_seconds']:.0f} s; rows of up to {manifest['longest_row']} tokens; {images['shown']:,} images shown, "
        f"{images['through_the_tower']:,} passed the vision tower.\n\n| part | parameters | trained |\n|---|---|---|\n{parts}\n\n"
        f"{head}\n{shares}\n\nData:\n\n{hashes}"
        + (f"\n\nConversations replaced because of a bad picture:\n{faults}" if faults else "")
        + "\n\n![loss](loss.png)"
    )


def _passes(manifest: dict[str, Any], name: str) -> str:
    passes = f"{manifest['passes'][name]:.1f} times" if name in manifest["passes"] else "-"
    return passes + (f", then ended ({manifest['ended'][name]})" if name in manifest["ended"] else "")
