"""Compare this project with upstream LLaVA in both directions, for all families, on tiny random checkpoints.

    make interop                        # builds upstream's environment in build/upstream, then runs this
    python -m interop.check --store     # and writes benchmarks/results/interop.json

It prints a table, and exits with 1 if a bound is exceeded. This process is the project's side; ``upstream.py`` runs in
upstream's environment. A difference is the largest one of a logit over the probes, in fp32 unless the row says
otherwise. The effect is how much the adapter changes a logit.
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

from benchmarks.common import finish, options_of, parser
from lcl_adapter.answering.ask import ask_model
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

FOLDER = Path(__file__).parent
PYTHON = FOLDER.parent / "build" / "upstream" / "bin" / "python"
CLOSE = 1e-4
ROUNDINGS = 32  # roundings to fp16 of the largest logit, which the whole model may differ by
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
    """A row of the table. ``effect`` is the adapter's effect, if the row compares an adapter."""

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
    """Jobs for upstream's environment. They are collected and run in one process."""

    folder: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **job: Any) -> int:
        """Add a job; returns the index of its answer."""
        self.jobs.append({k: str(v) if isinstance(v, Path) else v for k, v in job.items()})
        return len(self.jobs) - 1

    def run(self) -> list[Any]:
        """Run all jobs; returns their answers."""
        jobs_file, answers_file = self.folder / "jobs.json", self.folder / "answers.json"
        jobs_file.write_text(json.dumps(self.jobs))
        finished = subprocess.run(
            [PYTHON, FOLDER / "upstream.py", jobs_file, answers_file], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if finished.returncode:
            raise SystemExit(f"upstream failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
        answers = json.loads(answers_file.read_text())
        self.jobs.clear()
        assert isinstance(answers, list)
        return answers


def pictures(folder: Path, count: int, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """Write ``count`` random pictures, of these sizes in turn."""
    rng = np.random.default_rng(7)
    files = []
    for number in range(count):
        wide, high = sizes[number % len(sizes)]
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (high, wide, 3), dtype=np.uint8)).save(path)
        files.append(path)
    return files


def probes(files: Sequence[Path]) -> list[Probe]:
    """2-way episodes of one and two shots, whose query has no answer yet."""
    wording, episodes = WORDINGS["short"], []
    for shots in (1, 2):
        turns: list[Turn] = []
        for place in range(2 * shots):
            turns.append(Turn("user", wording.support_question(place == 0), Picture(files[place])))
            turns.append(Turn("assistant", ("good", "bad")[place % 2]))
        turns.append(Turn("user", wording.query, Picture(files[2 * shots])))
        episodes.append((tuple(turns), list(files[: 2 * shots + 1])))
    return episodes


def prompts_of(episodes: Sequence[Probe], family: str) -> list[dict[str, Any]]:
    """The prompts and image files of the episodes, as upstream.py reads them."""
    return [{"text": FAMILIES[family].render(turns, opened=True).text, "images": [str(f) for f in files]} for turns, files in episodes]


@torch.no_grad()
def our_logits(base: Base, episodes: Sequence[Probe]) -> torch.Tensor:
    """Logits of the first new token, [probes, V]."""
    encoder, vision = base.encoder(), VisionFeatures(base)
    rows = []
    for turns, files in episodes:
        ids = encoder.turns(turns, opened=True)[0]
        features = vision.projected_features([Picture(f) for f in files])
        rows.append(base.model(input_ids=torch.tensor([ids]), mm_encoder_outputs=features, logits_to_keep=1).logits[0, -1])
    return torch.stack(rows).float()


def difference(ours: torch.Tensor, upstreams: Any) -> float:
    """Largest difference over the shared vocabulary. Only our vocabulary has a row for the image token."""
    theirs = torch.tensor(upstreams)
    vocabulary = min(ours.shape[1], theirs.shape[1])
    return float((ours[:, :vocabulary] - theirs[:, :vocabulary]).abs().max())


def fp16_rounding(logits: torch.Tensor) -> float:
    """How much a logit of this size may change when every weight is rounded to fp16."""
    return ROUNDINGS * torch.finfo(torch.float16).eps * float(logits.abs().max())


def check(version: str, root: Path) -> list[Line]:
    """All comparisons of one family.

    The checkpoint's name must contain `llava`, because upstream recognises it by that.
    """
    family, session = FAMILY_OF[version], Session(root)
    base = save_original(root / f"llava-{version}", version)
    wide = version != "v1.6"
    files = pictures(root / "pictures", 5, [(48, 40), (32, 32), (30, 50)] if wide else [(2 * SIDE, 2 * SIDE)])
    episodes = probes(files)
    pixel_kinds = {"v1": ["white"], "v1.5": ["upstream"], "v1.6": ["base tile", "upstream"]}[version]
    prompts = prompts_of(episodes, family)

    # Names of jobs: each is the index of its answer.
    base_jobs = {kind: session.add(do="logits", model=base, pixels=kind, prompts=prompts) for kind in pixel_kinds}
    train_job = session.add(do="train", model=base, out=root / f"llava-{version}-lora-theirs")
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, output=root / "ours", rslora=str(version == "v1.5").lower()))
    run.train(str(recipe))
    adapted, _ = load_adapter(root / "ours")
    run.export(root / "ours", root / f"llava-{version}-lora-ours")
    run.merge(root / "ours", root / f"llava-{version}-merged", to="original")
    run.merge(root / "ours", root / f"llava-{version}-merged-hf", to="hf", dtype="fp32")
    convert(str(base), root / "hf")
    convert(str(root / "hf"), root / f"llava-{version}-back")
    exported_job = session.add(do="logits", model=root / f"llava-{version}-lora-ours", base=base, pixels=pixel_kinds[0], prompts=prompts)
    theirs_job = session.add(do="logits", model=root / f"llava-{version}-lora-theirs", base=base, pixels=pixel_kinds[0], prompts=prompts)
    bare_language = save_language(root / "vicuna", base)
    bare_language_job = session.add(
        do="logits", model=root / f"llava-{version}-lora-theirs", base=bare_language, pixels=pixel_kinds[0], prompts=prompts
    )
    merged_job = session.add(do="logits", model=root / f"llava-{version}-merged", pixels=pixel_kinds[0], prompts=prompts)
    back_job = session.add(do="logits", model=root / f"llava-{version}-back", pixels=pixel_kinds[0], prompts=prompts)
    support, queries = photos(root / "photos")
    script_job = session.add(
        do="ask", adapter=root / f"llava-{version}-lora-ours", base=base, support=support, queries=[str(q) for q in queries], new_tokens=24
    )
    answers = session.run()

    bare = our_logits(load_base(str(base)), episodes)
    lines = [Line(version, "base, original layout read here", difference(bare, answers[base_jobs[pixel_kinds[0]]]), CLOSE)]
    if version == "v1.6":
        lines.append(
            Line(
                version,
                "the same, any-resolution tiles",
                difference(our_logits(load_base(BaseRef(str(base), tiles=True)), episodes), answers[base_jobs["upstream"]]),
                CLOSE,
            )
        )
    lines.append(
        Line(
            version,
            "base, converted to Hugging Face's",
            difference(our_logits(load_base(str(root / "hf")), episodes), answers[base_jobs[pixel_kinds[0]]]),
            CLOSE,
        )
    )
    lines.append(Line(version, "base, converted there and back", difference(bare, answers[back_job]), CLOSE))
    adapter_logits = our_logits(adapted, episodes)
    effect = float((adapter_logits - bare).abs().max())
    lines.append(Line(version, "adapter out: trained here, loaded upstream", difference(adapter_logits, answers[exported_job]), CLOSE, effect))
    run.import_adapter(root / f"llava-{version}-lora-theirs", root / "theirs", BaseRef(str(base)))
    imported, _ = load_adapter(root / "theirs", BaseRef(precision="fp32"))
    imported_logits = our_logits(imported, episodes)
    lines.append(
        Line(
            version,
            "adapter in: trained upstream, loaded here",
            difference(imported_logits, answers[theirs_job]),
            CLOSE,
            float((imported_logits - bare).abs().max()),
        )
    )
    if version != "v1":  # upstream does not save v1's start and end tokens
        run.import_adapter(root / f"llava-{version}-lora-theirs", root / "theirs-bare", BaseRef(str(bare_language)))
        on_language, _ = load_adapter(root / "theirs-bare", BaseRef(precision="fp32"))
        on_bare_language = our_logits(on_language, episodes)
        with on_language.without_adapter():
            own_effect = float((on_bare_language - our_logits(on_language, episodes)).abs().max())
        if version == "v1.5":
            lines.append(
                Line(version, "the same on a bare language model", difference(on_bare_language, answers[bare_language_job]), CLOSE, own_effect)
            )
        else:  # Upstream reads 1.6's tower only from the base and computes NaNs on a bare language model. Ours is in fp32, hence the rounding.
            lines.append(
                Line(
                    version,
                    "the same on a bare language model, both here",
                    float((on_bare_language - imported_logits).abs().max()),
                    fp16_rounding(on_bare_language),
                    own_effect,
                )
            )
    merged_logits = our_logits(load_base(str(root / f"llava-{version}-merged")), episodes)
    lines.append(Line(version, "merged here in fp16, loaded upstream and here", difference(merged_logits, answers[merged_job]), CLOSE, effect))
    lines.append(
        Line(version, "merged in fp16 against the adapter", difference(adapter_logits, answers[merged_job]), fp16_rounding(adapter_logits), effect)
    )
    merged_to_hf = load_base(str(root / f"llava-{version}-merged-hf"))
    lines.append(
        Line(version, "merged here to Hugging Face's, fp32", float((our_logits(merged_to_hf, episodes) - adapter_logits).abs().max()), CLOSE, effect)
    )
    our_answers = {a["query"]: a["answer"] for a in ask_model(support, queries, root / "ours", BaseRef(precision="fp32")).answers}
    wrong = [q for q, text in our_answers.items() if answers[script_job][q] != text]
    lines.append(Line(version, f"ask_upstream.py: answers that differ, of {len(our_answers)}", float(len(wrong)), 0.0))
    assert answers[train_job]
    return lines


def check_mistral(root: Path) -> list[Line]:
    """NeXT on Mistral. Upstream loads no adapters on it, so only the base and the merged model are compared."""
    family, session = "llava-next-mistral", Session(root)
    base = save_original(root / "llava-mistral", "v1.6-mistral")
    episodes = probes(pictures(root / "pictures", 5, [(2 * SIDE, 2 * SIDE)]))
    prompts = prompts_of(episodes, family)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, output=root / "ours", rslora="false"))
    run.train(str(recipe))
    run.merge(root / "ours", root / "llava-mistral-merged")
    base_job = session.add(do="logits", model=base, pixels="base tile", prompts=prompts)
    merged_job = session.add(do="logits", model=root / "llava-mistral-merged", pixels="base tile", prompts=prompts)
    answers = session.run()
    bare, adapter_logits = our_logits(load_base(str(base)), episodes), our_logits(load_adapter(root / "ours")[0], episodes)
    return [
        Line("v1.6 mistral", "base, original layout read here", difference(bare, answers[base_job]), CLOSE),
        Line(
            "v1.6 mistral",
            "merged in fp16 against the adapter",
            difference(adapter_logits, answers[merged_job]),
            fp16_rounding(adapter_logits),
            float((adapter_logits - bare).abs().max()),
        ),
    ]


def photos(folder: Path) -> tuple[Path, list[Path]]:
    """Two classes of two photos, and three queries."""
    rng = np.random.default_rng(11)
    for number in range(7):
        label = "good" if number < 2 else "scratched"
        path = folder / "support" / label / f"{number}.png" if number < 4 else folder / f"query{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(path)
    return folder / "support", sorted(folder.glob("query*.png"))


def check_prompts(root: Path) -> list[Line]:
    """Compare our prompt of an episode with upstream's own conversations, character by character."""
    session = Session(root)
    wording = WORDINGS["lcl"]
    picture = Picture(Path("a.png"))
    turns = [Turn("user", wording.support_question(True), picture), Turn("assistant", wording.answered("good")), Turn("user", wording.query, picture)]
    jobs = {}
    for family, conversation in CONVERSATION_OF.items():
        image = FAMILIES[family].image
        messages = [[t.role, (image if t.picture else "") + t.text] for t in turns]
        jobs[family] = session.add(do="prompts", conversation=conversation, turns=[[*messages, ["assistant", None]]])
    answers = session.run()
    lines = []
    for family, job in jobs.items():
        text = FAMILIES[family].render(turns, opened=True).text
        # In LLaMA-2's style the open answer adds nothing: [/INST] ends the question.
        lines.append(Line(family, "prompt: characters that differ", float(sum(a != b for a, b in zip(text, answers[job][0], strict=False)))
                          + abs(len(text) - len(answers[job][0])), 0.0))  # fmt: skip
    return lines


def check_pixels(root: Path) -> list[Line]:
    """Compare our pixels with upstream's `process_images`, for pictures of every shape that both process alike."""
    lines = []
    for version in VERSIONS:
        session = Session(root)
        base = save_original(root / f"llava-pixels-{version}", version)
        files = pictures(
            root / f"pixels-{version}", 3, {"v1": [(40, 40), (32, 32)], "v1.5": [(48, 40), (30, 50)], "v1.6": [(2 * SIDE, 2 * SIDE)]}[version]
        )
        job = session.add(do="pixels", model=base, pixels="upstream", images=[str(f) for f in files])
        theirs = torch.tensor(session.run()[job])
        ours = VisionFeatures(load_base(BaseRef(str(base), tiles=version == "v1.6"))).pixels([Picture(f) for f in files])["pixel_values"]
        lines.append(Line(version, "pixels", float((theirs - ours.reshape(theirs.shape)).abs().max()), 1e-6))
    return lines


def summary(lines: Sequence[Line]) -> dict[str, float]:
    """The largest difference of each direction over v1, 1.5 and 1.6, and the span of the adapters' effects."""
    whole = [line for line in lines if line.version in VERSIONS]
    kinds = {"base": "base,", "adapter out": "adapter out", "adapter in": "adapter in", "merged": "merged here in fp16, loaded upstream"}
    figures = {name: max(line.difference for line in whole if line.what.startswith(start)) for name, start in kinds.items()}
    effects = [line.effect for line in whole if line.effect is not None and line.what.startswith(("adapter out", "adapter in"))]
    return {**figures, "smallest effect": min(effects), "largest effect": max(effects)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(parser(__doc__, small=False), "interop.check", arguments)
    torch.set_num_threads(2)
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: `make interop` builds upstream's environment first.")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lines += check_prompts(root) + check_pixels(root)
        for version in VERSIONS:
            (root / version).mkdir()
            lines += check(version, root / version)
        (root / "mistral").mkdir()
        lines += check_mistral(root / "mistral")
    rows = [
        (
            line.version,
            line.what,
            f"{line.difference:.2g}",
            f"{line.allowed:.0e}" if line.allowed <= CLOSE else f"{line.allowed:.2f}",
            "" if line.effect is None else f"{line.effect:.2f}",
            "" if line.holds else "BROKEN",
        )
        for line in lines
    ]
    finish(options, "interop", ("family", "what", "largest difference", "allowed", "effect", ""), rows, {}, summary(lines))
    sys.exit(0 if all(line.holds for line in lines) else 1)


if __name__ == "__main__":
    main()
