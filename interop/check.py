"""Interop with upstream LLaVA, both directions, all families, on tiny random checkpoints: a table, and exit code 1 where a bound is broken.

    make interop        # builds upstream's environment in build/upstream, then runs this

This process is the project's side; ``upstream.py`` is run by the other environment's Python. Differences are the largest
of a logit over the probes, in fp32 unless the line says otherwise; the effect is what the adapter changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.families import FAMILIES
from lcl_adapter.base.model import Base, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.checkpoints.convert import convert
from lcl_adapter.cli import commands as run
from lcl_adapter.data.conversations import WORDINGS, Turn
from lcl_adapter.data.sources import Picture
from tests.tiny import SIDE, VERSIONS, save_language, save_original

HERE = Path(__file__).parent
PYTHON = HERE.parent / "build" / "upstream" / "bin" / "python"
CLOSE = 1e-4
ROUNDINGS = 32  # of the largest logit, that fp16 may change in a whole model
FAMILY_OF = {"v1": "llava-v1", "v1.5": "llava-1.5", "v1.6": "llava-next-vicuna"}
CONVERSATION_OF = {"llava-v1": "vicuna_v1", "llava-1.5": "vicuna_v1", "llava-next-vicuna": "vicuna_v1", "llava-next-mistral": "mistral_instruct"}
Probe = tuple[tuple[Turn, ...], list[Path]]

RECIPE = """base: {base}
wording: short
output: {output}
adapter: {{rank: 4, alpha: 8, projector: true, rslora: {rslora}}}
sources:
  lcl: {{type: pocket, shots: [1]}}
train: {{max_steps: 12, learning_rate: 0.02, projector_learning_rate: 0.005, per_device_train_batch_size: 2, logging_steps: 4, threads: 2}}
"""


@dataclass
class Line:
    """One row of the table: what was compared, how far apart, what is allowed, and the adapter's effect where there is one."""

    version: str
    what: str
    difference: float
    allowed: float
    effect: float | None = None

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed and (self.effect is None or self.effect >= 100 * self.difference or self.allowed > CLOSE)


@dataclass
class Session:
    """Jobs for the other environment, gathered and done in one go."""

    folder: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **job: Any) -> int:
        self.jobs.append({k: str(v) if isinstance(v, Path) else v for k, v in job.items()})
        return len(self.jobs) - 1

    def done(self) -> list[Any]:
        asked, answered = self.folder / "jobs.json", self.folder / "answers.json"
        asked.write_text(json.dumps(self.jobs))
        finished = subprocess.run([PYTHON, HERE / "upstream.py", asked, answered], cwd=self.folder, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise SystemExit(f"upstream failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
        found = json.loads(answered.read_text())
        self.jobs.clear()
        assert isinstance(found, list)
        return found


def pictures(folder: Path, count: int, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    rng = np.random.default_rng(7)
    made = []
    for number in range(count):
        wide, high = sizes[number % len(sizes)]
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (high, wide, 3), dtype=np.uint8)).save(path)
        made.append(path)
    return made


def probes(files: Sequence[Path]) -> list[Probe]:
    """Episodes with the query open: 2-way, one shot and two."""
    wording, found = WORDINGS["short"], []
    for shots in (1, 2):
        turns: list[Turn] = []
        for place in range(2 * shots):
            turns.append(Turn("user", wording.support_question(place == 0), Picture(files[place])))
            turns.append(Turn("assistant", ("good", "bad")[place % 2]))
        turns.append(Turn("user", wording.query, Picture(files[2 * shots])))
        found.append((tuple(turns), list(files[: 2 * shots + 1])))
    return found


def asked(made: Sequence[Probe], family: str) -> list[dict[str, Any]]:
    return [{"text": FAMILIES[family].render(turns, opened=True).text, "images": [str(f) for f in files]} for turns, files in made]


@torch.no_grad()
def ours(base: Base, made: Sequence[Probe]) -> torch.Tensor:
    """[probes, V] logits of the first new token."""
    encoder, vision = base.encoder(), VisionFeatures(base)
    rows = []
    for turns, files in made:
        ids = encoder.turns(turns, opened=True)[0]
        features = vision.projected([Picture(f) for f in files])
        rows.append(base.model(input_ids=torch.tensor([ids]), mm_encoder_outputs=features, logits_to_keep=1).logits[0, -1])
    return torch.stack(rows).float()


def apart(one: torch.Tensor, other: Any) -> float:
    """Over the words that both have; the image's row is ours alone."""
    there = torch.tensor(other)
    words = min(one.shape[1], there.shape[1])
    return float((one[:, :words] - there[:, :words]).abs().max())


def half(logits: torch.Tensor) -> float:
    """What rounding every weight to fp16 may change in a logit of this size."""
    return ROUNDINGS * torch.finfo(torch.float16).eps * float(logits.abs().max())


def check(version: str, root: Path) -> list[Line]:
    """All of one family. The checkpoint's name has to have `llava` in it for upstream to know it."""
    family, session = FAMILY_OF[version], Session(root)
    base = save_original(root / f"llava-{version}", version)
    wide = version != "v1.6"
    files = pictures(root / "pictures", 5, [(48, 40), (32, 32), (30, 50)] if wide else [(2 * SIDE, 2 * SIDE)])
    made = probes(files)
    kinds = {"v1": ["white"], "v1.5": ["upstream"], "v1.6": ["base tile", "upstream"]}[version]
    prompts = asked(made, family)

    there = {kind: session.add(do="logits", model=base, pixels=kind, prompts=prompts) for kind in kinds}
    theirs = session.add(do="train", model=base, out=root / f"llava-{version}-lora-theirs")
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, output=root / "ours", rslora=str(version == "v1.5").lower()))
    run.train(str(recipe))
    adapted, _ = load_adapter(root / "ours")
    run.export(root / "ours", root / f"llava-{version}-lora-ours")
    run.merge(root / "ours", root / f"llava-{version}-merged", to="original")
    run.merge(root / "ours", root / f"llava-{version}-merged-hf", to="hf", dtype="fp32")
    convert(str(base), root / "hf")
    convert(str(root / "hf"), root / f"llava-{version}-back")
    out = session.add(do="logits", model=root / f"llava-{version}-lora-ours", base=base, pixels=kinds[0], prompts=prompts)
    taken = session.add(do="logits", model=root / f"llava-{version}-lora-theirs", base=base, pixels=kinds[0], prompts=prompts)
    bare_language = save_language(root / "vicuna", base)
    composed = session.add(do="logits", model=root / f"llava-{version}-lora-theirs", base=bare_language, pixels=kinds[0], prompts=prompts)
    merged = session.add(do="logits", model=root / f"llava-{version}-merged", pixels=kinds[0], prompts=prompts)
    back = session.add(do="logits", model=root / f"llava-{version}-back", pixels=kinds[0], prompts=prompts)
    support, queries = photos(root / "photos")
    script = session.add(
        do="ask", adapter=root / f"llava-{version}-lora-ours", base=base, support=support, queries=[str(q) for q in queries], new_tokens=24
    )
    answers = session.done()

    plain = load_base(str(base))
    bare = ours(plain, made)
    lines = [Line(version, "base, original layout read here", apart(bare, answers[there[kinds[0]]]), CLOSE)]
    if version == "v1.6":
        lines.append(
            Line(
                version,
                "the same, any-resolution tiles",
                apart(ours(load_base(BaseRef(str(base), tiles=True)), made), answers[there["upstream"]]),
                CLOSE,
            )
        )
    lines.append(Line(version, "base, converted to Hugging Face's", apart(ours(load_base(str(root / "hf")), made), answers[there[kinds[0]]]), CLOSE))
    lines.append(Line(version, "base, converted there and back", apart(bare, answers[back]), CLOSE))
    here = ours(adapted, made)
    effect = float((here - bare).abs().max())
    lines.append(Line(version, "adapter out: trained here, loaded upstream", apart(here, answers[out]), CLOSE, effect))
    run.import_adapter(root / f"llava-{version}-lora-theirs", root / "theirs", BaseRef(str(base)))
    imported, _ = load_adapter(root / "theirs", BaseRef(precision="fp32"))
    foreign = ours(imported, made)
    lines.append(
        Line(version, "adapter in: trained upstream, loaded here", apart(foreign, answers[taken]), CLOSE, float((foreign - bare).abs().max()))
    )
    if version != "v1":  # whose start and end tokens upstream does not save
        run.import_adapter(root / f"llava-{version}-lora-theirs", root / "theirs-bare", BaseRef(str(bare_language)))
        brought, _ = load_adapter(root / "theirs-bare", BaseRef(precision="fp32"))
        whole = ours(brought, made)
        with brought.without_adapter():
            own = float((whole - ours(brought, made)).abs().max())
        if version == "v1.5":
            lines.append(Line(version, "the same on a bare language model", apart(whole, answers[composed]), CLOSE, own))
        else:  # upstream reads 1.6's tower from the base alone, and answers in NaNs where that is a bare language model; the tower beside it is fp32
            lines.append(Line(version, "the same on a bare language model, both here", float((whole - foreign).abs().max()), half(whole), own))
    rounded = ours(load_base(str(root / f"llava-{version}-merged")), made)
    lines.append(Line(version, "merged here in fp16, loaded upstream and here", apart(rounded, answers[merged]), CLOSE, effect))
    lines.append(Line(version, "merged in fp16 against the adapter", apart(here, answers[merged]), half(here), effect))
    merged_here = load_base(str(root / f"llava-{version}-merged-hf"))
    lines.append(Line(version, "merged here to Hugging Face's, fp32", float((ours(merged_here, made) - here).abs().max()), CLOSE, effect))
    said = {a["query"]: a["answer"] for a in run.ask(support, queries, adapter=root / "ours", precision="fp32")["answers"]}
    wrong = [q for q, text in said.items() if answers[script][q] != text]
    lines.append(Line(version, f"ask_upstream.py: answers that differ, of {len(said)}", float(len(wrong)), 0.0))
    assert answers[theirs]
    return lines


def check_mistral(root: Path) -> list[Line]:
    """NeXT on Mistral: upstream loads no adapters on it, so the base and what was merged."""
    family, session = "llava-next-mistral", Session(root)
    base = save_original(root / "llava-mistral", "v1.6-mistral")
    made = probes(pictures(root / "pictures", 5, [(2 * SIDE, 2 * SIDE)]))
    prompts = asked(made, family)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, output=root / "ours", rslora="false"))
    run.train(str(recipe))
    run.merge(root / "ours", root / "llava-mistral-merged")
    there = session.add(do="logits", model=base, pixels="base tile", prompts=prompts)
    merged = session.add(do="logits", model=root / "llava-mistral-merged", pixels="base tile", prompts=prompts)
    answers = session.done()
    bare, here = ours(load_base(str(base)), made), ours(load_adapter(root / "ours")[0], made)
    return [
        Line("v1.6 mistral", "base, original layout read here", apart(bare, answers[there]), CLOSE),
        Line("v1.6 mistral", "merged in fp16 against the adapter", apart(here, answers[merged]), half(here), float((here - bare).abs().max())),
    ]


def photos(folder: Path) -> tuple[Path, list[Path]]:
    """Two classes of two photos, and three queries."""
    rng = np.random.default_rng(11)
    for number in range(7):
        place = folder / "support" / ("good" if number < 2 else "scratched") / f"{number}.png" if number < 4 else folder / f"query{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(place)
    return folder / "support", sorted(folder.glob("query*.png"))


def check_prompts(root: Path) -> list[Line]:
    """Our text for an episode against upstream's own conversations, letter by letter."""
    session = Session(root)
    wording = WORDINGS["lcl"]
    picture = Picture(Path("a.png"))
    turns = [Turn("user", wording.support_question(True), picture), Turn("assistant", wording.answered("good")), Turn("user", wording.query, picture)]
    places = {}
    for family, conversation in CONVERSATION_OF.items():
        image = FAMILIES[family].image
        told = [[t.role, (image if t.picture else "") + t.text] for t in turns]
        places[family] = session.add(do="prompts", conversation=conversation, turns=[[*told, ["assistant", None]]])
    answers = session.done()
    lines = []
    for family, place in places.items():
        text = FAMILIES[family].render(turns, opened=True).text
        # LLaMA-2's style leaves the open answer out, and [/INST] is the end of the question.
        lines.append(Line(family, "prompt: characters that differ", float(sum(a != b for a, b in zip(text, answers[place][0], strict=False)))
                          + abs(len(text) - len(answers[place][0])), 0.0))  # fmt: skip
    return lines


def check_pixels(root: Path) -> list[Line]:
    """Our pixels against upstream's `process_images`, for pictures of every shape that both treat alike."""
    lines = []
    for version in VERSIONS:
        session = Session(root)
        base = save_original(root / f"llava-pixels-{version}", version)
        files = pictures(
            root / f"pixels-{version}", 3, {"v1": [(40, 40), (32, 32)], "v1.5": [(48, 40), (30, 50)], "v1.6": [(2 * SIDE, 2 * SIDE)]}[version]
        )
        place = session.add(do="pixels", model=base, pixels="upstream", images=[str(f) for f in files])
        theirs = torch.tensor(session.done()[place])
        found = VisionFeatures(load_base(BaseRef(str(base), tiles=version == "v1.6"))).pixels([Picture(f) for f in files])["pixel_values"]
        lines.append(Line(version, "pixels", float((theirs - found.reshape(theirs.shape)).abs().max()), 1e-6))
    return lines


def main() -> None:
    torch.set_num_threads(2)
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: `make interop` builds upstream's environment first.")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in (check_prompts, check_pixels):
            lines += part(root)
        for version in VERSIONS:
            (root / version).mkdir()
            lines += check(version, root / version)
        (root / "mistral").mkdir()
        lines += check_mistral(root / "mistral")
    table = Table("family", "what", "largest difference", "allowed", "effect", "", box=box.SIMPLE)
    for line in lines:
        effect = "" if line.effect is None else f"{line.effect:.2f}"
        table.add_row(
            line.version,
            line.what,
            f"{line.difference:.2g}",
            f"{line.allowed:.0e}" if line.allowed <= CLOSE else f"{line.allowed:.2f}",
            effect,
            "" if line.holds else "BROKEN",
        )
    Console(width=120).print(table)
    broken = [line for line in lines if not line.holds]
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
