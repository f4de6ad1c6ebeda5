"""The run card: one Markdown page that says what was trained, on what, and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcl_adapter.adapter import read_manifest
from lcl_adapter.files import write_text


def write_card(run: Path) -> Path:
    """``README.md`` of the run's folder, from the manifest, the recipe and, where there is one, the report."""
    manifest = read_manifest(run)
    report = json.loads((run / "report.json").read_text(encoding="utf-8")) if (run / "report.json").exists() else None
    sections = [
        f"# {run.name}\n\nA LoRA adapter for `{manifest['base']}` (family {manifest['family']}, {manifest['precision']}), trained on "
        "Link-Context-Learning episodes by lcl-adapter.",
        _results(report),
        "## Use\n\n```\nlcl-adapter ask photos/ query.png --adapter "
        + run.name
        + "\n```\n\nWith plain PEFT:\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import LlavaForConditionalGeneration\n\n"
        f'model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(BASE), "{run.name}")\n```',
        _training(manifest),
        "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items()),
        "## Recipe\n\n```yaml\n" + (run / "recipe.yaml").read_text(encoding="utf-8").strip() + "\n```",
    ]
    write_text(run / "README.md", "\n\n".join(s for s in sections if s) + "\n")
    return run / "README.md"


def _results(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    head = "| suite | n | chance | prototype | base | adapter | 95 % | adapter's text |\n|---|---|---|---|---|---|---|---|\n"
    rows = []
    for row in report["suites"]:
        near, own = row["prototype"]["accuracy"], row["adapter"]
        rows.append(
            f"| {row['name']} | {row['n']} | {row['chance']:.2f} | {'-' if near is None else f'{near:.3f}'} | {row['base']['accuracy']:.3f} | "
            f"**{own['accuracy']:.3f}** | {own['ci95'][0]:.3f} - {own['ci95'][1]:.3f} | {own['greedy']:.3f} |"
        )
    kept = "".join(
        f"\n\n{r['suite']}: {r['fell']:+.1f} points below the base, {r['allowed']:.1f} allowed: {'kept' if r['kept'] else '**not kept**'}."
        for r in report["retention"]
    )
    return "## Results\n\nMeasured together, on the same questions (`report.json`, `predictions.jsonl`).\n\n" + head + "\n".join(rows) + kept


def _training(manifest: dict[str, Any]) -> str:
    parts = "\n".join(f"| {part} | {n['total']:,} | {n['trained']:,} |" for part, n in manifest["parameters"].items())
    shares = "\n".join(
        f"| {name} | {share:.2f} | {manifest['shares']['realised'][name]:.2f} | {manifest['passes'].get(name, 0) or '-'} | "
        f"{', '.join(f'{v} x {k}' for k, v in manifest['skipped'].get(name, {}).items()) or '-'} |"
        for name, share in manifest["shares"]["requested"].items()
    )
    images = manifest["images"]
    faults = "".join(f"\n- {count} x {fault}" for fault, count in manifest["bad_pictures"].items())
    hashes = "\n".join(f"- `{name}`: `{digest[:16]}`" for name, digest in manifest["data"].items())
    return (
        f"## Training\n\n{manifest['training_seconds']:.0f} s; rows of up to {manifest['longest_row']} tokens; {images['shown']:,} images shown, "
        f"{images['through_the_tower']:,} passed the vision tower.\n\n| part | parameters | trained |\n|---|---|---|\n{parts}\n\n"
        f"| source | share asked | realised | passes | left out |\n|---|---|---|---|---|\n{shares}\n\nData:\n\n{hashes}"
        + (f"\n\nConversations replaced because of a bad picture:\n{faults}" if faults else "")
        + "\n\n![loss](loss.png)"
    )
