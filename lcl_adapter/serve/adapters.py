"""Checks of an adapter that is to be served: that it belongs to the base, and that it changes the base's answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lcl_adapter.base.adapter import checkpoint_of, read_manifest
from lcl_adapter.base.model import Base
from lcl_adapter.base.ref import NOT_GIVEN, BaseRef
from lcl_adapter.base.supports import asked_otherwise, most_tokens, orientations_of, readings_of, trained_shots, trained_supports
from lcl_adapter.checkpoints.probe import probe, probe_turns
from lcl_adapter.errors import AdapterError
from lcl_adapter.serve.pictures.images import digest_of
from lcl_adapter.terminal import show_notes


def matching_manifest(folder: Path, base: Base) -> dict[str, Any]:
    """The manifest of an adapter's folder.

    Raises AdapterError if the adapter is for another base or prompt, or other tiles.
    """
    manifest = read_manifest(folder)
    checkpoint_of(folder, manifest, base.checkpoint.ref)
    if (base.family.name, base.family.version) != (manifest["family"], manifest["prompt_version"]):
        raise AdapterError(f"{folder}: trained with prompt {manifest['family']} v{manifest['prompt_version']}, which is not this base's.")
    if manifest["tiles"] != base.tiles:
        trained, served = ("on", "off") if manifest["tiles"] else ("off", "on")
        raise AdapterError(f"{folder}: trained with tiles {trained}, but the server has tiles {served}.")
    return manifest


def identity_of(manifest: dict[str, Any], form: Base | None = None) -> str:
    """A hash of the weights, base's and adapter's, of those of its judgements, and of the form in which support sets are read."""
    judgement = [manifest["judgement"]] if manifest.get("judgement") else []
    reading = form.support_reading if form is not None else []
    return digest_of(json.dumps([manifest["base_hash"], manifest["files"], *judgement, *reading], sort_keys=True).encode())


def in_its_form(name: str, manifest: dict[str, Any], base: Base, asked: BaseRef = NOT_GIVEN) -> Base:
    """The base as an adapter reads support sets: as its manifest says, except for the tokens, orientations and readings in ``asked``.

    Prints a note where that is another form than it was trained in.
    """
    tokens = asked.support_tokens or most_tokens(manifest)
    times = (asked.orientations or orientations_of(manifest), asked.readings or readings_of(manifest))
    form = base.with_supports(tokens, trained_supports(manifest), trained_shots(manifest), *times)
    notes = asked_otherwise(manifest, form)
    if (asked.readings or 1) > form.readings:
        notes.append("its labelled photos do not see each other, so a set is read once")
    show_notes([f"{name}: {note}" for note in notes])
    return form


def base_identity(base: Base) -> str:
    """A hash of the base's weights, and of the form in which support sets are read."""
    weights = base.checkpoint.hash()
    return digest_of(" ".join(map(str, [weights, *base.support_reading])).encode()) if base.support_reading else weights


def check_effect(base: Base, peft_name: str, folder: Path) -> None:
    """Compare the adapter with the base on a test prompt. Afterwards the model has the adapter.

    Raises AdapterError if nothing changes, or the answer is not finite.
    An adapter whose weights match no layer changes nothing; other servers serve it as if it worked (vllm#34186).
    """
    turns = probe_turns("lcl")[:1]
    base.model.set_adapter(peft_name, inference_mode=True)
    adapted = probe(base, turns)
    with base.without_adapter():
        change = adapted.distance(probe(base, turns))
    if not math.isfinite(change):
        raise AdapterError(f"{folder.name}: its answers are not finite (NaNs or infinities); the adapter is broken.")
    if change == 0.0:
        raise AdapterError(f"{folder.name}: changes nothing in the base's answers, so it is not served under a name of its own.")
