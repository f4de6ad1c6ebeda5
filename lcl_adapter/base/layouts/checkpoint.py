"""A base on disk in either layout, its weights by the model's own names, read one by one.

original          haotian-liu's: `mm_vision_tower` in config.json, the vision tower a folder of its own (inside in 1.6)
hugging face      transformers': `vision_config` in config.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaNextImageProcessorPil,
    PreTrainedTokenizerFast,
)

from lcl_adapter.base.layouts import configs, keys
from lcl_adapter.base.layouts.tensors import Stored, blocks_of, digest, stored_in
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import ModelError, did_you_mean
from lcl_adapter.files import read_object
from lcl_adapter.pocket import BASE as POCKET_BASE

Layout = Literal["hf", "original"]
POCKET = "pocket"  # the name of the base that ships
MARKED_IMAGE = "<im_patch>", "<im_start>", "<im_end>"  # v1's tokens, in the order upstream adds them
WHOLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """One weight of the model: its type and shape, where it is stored if it is, and how it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stored: Stored | None = None

    def blocks(self) -> Iterator[torch.Tensor]:
        """Its rows, some at a time."""
        return self.stored.blocks() if self.stored is not None and self.stored.shape == self.shape else blocks_of(self.read())


@dataclass(frozen=True)
class Checkpoint:
    """A base that was found and understood; nothing is loaded until it is asked for. ``tower``: the folder outside, where there is one."""

    folder: Path
    layout: Layout
    raw: dict[str, Any]
    tower: Path | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """As the checkpoint's own code tokenises. Raises ModelError where it cannot be loaded."""
        try:
            if self.layout == "hf":
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            # AutoTokenizer takes `llava` for another model and gives wrong ids.
            named = {"image_token": MARKED_IMAGE[0] if self.raw.get("mm_use_im_start_end") else "<image>"}
            slow = (self.folder / "tokenizer.model").exists()  # without it a Llama 3's, which LlamaTokenizer would misread
            kind = LlamaTokenizer if slow else PreTrainedTokenizerFast
            tokenizer = kind.from_pretrained(self.folder, extra_special_tokens=named)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"base {self.folder}: its tokenizer cannot be loaded ({error}).") from error
        if self.raw.get("mm_use_im_start_end"):
            tokenizer.add_tokens([t for t in MARKED_IMAGE if t not in tokenizer.get_vocab()], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        return tokenizer

    @cached_property
    def config(self) -> Any:
        """In Hugging Face's terms, whatever the layout. Raises ModelError for what they cannot say."""
        if self.layout == "hf":
            try:
                return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"base {self.folder}: its config cannot be read ({error}).") from error
        assert self.tower is not None
        try:
            return configs.from_original(self.raw, CLIPVisionConfig.from_pretrained(self.tower), self._rows, self._image_token_id)
        except ModelError as error:
            raise ModelError(f"base {self.folder}: {error}") from error

    @cached_property
    def image_processor(self) -> Any:
        """The Pillow one. Raises ModelError where it cannot be loaded."""
        try:
            if self.layout == "hf":
                return AutoImageProcessor.from_pretrained(self.folder, backend="pil", trust_remote_code=False)
            clip = CLIPImageProcessorPil.from_pretrained(self.tower)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"base {self.folder}: its image processor cannot be loaded ({error}).") from error
        if not configs.is_next(self.raw):
            return clip
        same = {name: getattr(clip, name) for name in ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")}
        return LlavaNextImageProcessorPil(**same, image_grid_pinpoints=self.config.image_grid_pinpoints)

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """The folder's own tensors by the model's names. Raises ModelError: a key of another layout or kind."""
        on_disk = stored_in(self.folder)
        llava = self.layout == "original" or str(self.raw.get("model_type")).startswith("llava")
        kinds = {_layout_of_key(key) for key in on_disk} - {None} if llava else set()
        if len(kinds) > 1:
            raise ModelError(f"{self.folder}: weights of both layouts lie mixed in it; keep one checkpoint a folder.")
        if kinds and kinds != {self.layout}:
            raise ModelError(f"{self.folder}: config.json is of the {self.layout} layout, the weights are of the other; one of them is another's.")
        if self.layout == "original":
            try:
                named: dict[str, str | None] = {key: keys.from_original(key) for key in on_disk}
            except ModelError as error:
                raise ModelError(f"{self.folder}: {error}") from error
        else:
            named = dict(keys.from_hugging_face(on_disk, keys.skeleton(self.config)))
        found: dict[str, Stored] = {}
        for key, name in named.items():
            if name in found:
                raise ModelError(f"{self.folder}: {found[name].key} and {key} are one and the same weight; two checkpoints lie mixed in it.")
            if name is not None:
                found[name] = on_disk[key]
        return found

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Every weight of the model by its own name, from the folder, the tower, or made (v1's second layer, the image token's row).

        Raises ModelError: a weight missing, of another shape, unknown, or already quantised.
        """
        found = {name: Weight(s.dtype, s.shape, s.read, s) for name, s in self.stored.items()}
        if self.layout == "original":
            found |= self._tower_weights(inside=any(name.startswith(keys.TOWER) for name in found))
            found |= self._made(found)
        self._check(found)
        return found

    @property
    def ref(self) -> BaseRef:
        """A reference to this folder, and to its tower where that lies outside."""
        return BaseRef(str(self.folder), tower=None if self.tower is None else str(self.tower))

    def hash(self) -> str:
        """What tells one base from another, the same in both layouts, for any sharding and type: shapes and edges of all weights.

        Of the embedding and the head only the first row counts: layouts differ in how many rows they add.
        """
        lone = {keys.EMBEDDING, keys.HEAD}
        if str(self.raw.get("model_type")) not in configs.LLAVA_TYPES and self.layout == "hf":
            # Some of these are rebuilt when they are read, so that what is on the disk is hashed by its own names.
            return digest({key: stored.fingerprint() for key, stored in stored_in(self.folder).items()})
        fingerprints = {
            n: w.stored.fingerprint(1 if n in lone else None) for n, w in self.weights.items() if w.stored is not None and n not in self._second
        }
        return digest(fingerprints)

    @property
    def _second(self) -> set[str]:
        """v1's second projector layer, which is the identity where it is stored and nowhere in the original layout."""
        linear = getattr(self.config, "projector_hidden_act", None) == "linear"
        return {keys.PROJECTOR + "linear_2.weight", keys.PROJECTOR + "linear_2.bias"} if linear else set()

    @cached_property
    def _rows(self) -> int:
        return max(self.stored[keys.EMBEDDING].shape[0], self._image_token_id + 1) if keys.EMBEDDING in self.stored else self._image_token_id + 1

    @cached_property
    def _image_token_id(self) -> int:
        token: int = self.tokenizer.convert_tokens_to_ids(MARKED_IMAGE[0] if self.raw.get("mm_use_im_start_end") else "<image>")
        return token

    def _tower_weights(self, inside: bool) -> dict[str, Weight]:
        if inside:
            return {}
        assert self.tower is not None
        found = {}
        for key, stored in stored_in(self.tower).items():
            bare = key.removeprefix("vision_model.")
            if bare.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")) and not keys.DROPPED.search(key):
                found[keys.TOWER + bare] = Weight(stored.dtype, stored.shape, stored.read, stored)
        return found

    def _made(self, found: dict[str, Weight]) -> dict[str, Weight]:
        made = {}
        for name in (keys.EMBEDDING, keys.HEAD):
            if name in found and found[name].shape[0] < self._rows:
                made[name] = _grown(found[name], self._rows, self.tokenizer.unk_token_id or 0)
        if configs.projector_type(self.raw) == "linear":
            if keys.PROJECTOR + "linear_2.weight" in found:
                raise ModelError(f"base {self.folder}: its config says a linear projector, its weights have two layers; one of them is another's.")
            first = found.get(keys.PROJECTOR + "linear_1.weight")
            if first is not None:
                width, kind = first.shape[0], first.dtype
                made[keys.PROJECTOR + "linear_2.weight"] = Weight(kind, (width, width), lambda: torch.eye(width, dtype=kind))
                made[keys.PROJECTOR + "linear_2.bias"] = Weight(kind, (width,), lambda: torch.zeros(width, dtype=kind))
        return made

    def _check(self, found: dict[str, Weight]) -> None:
        model = keys.skeleton(self.config)
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if self.config.tie_word_embeddings else set()
        missing = sorted(wanted.keys() - found.keys() - tied)
        extra = sorted(found.keys() - wanted.keys())
        lacking = f"{len(missing)} weights are missing, for instance {missing[0]}" if missing else ""
        if extra:
            near = did_you_mean(extra[0], missing or list(wanted))
            raise ModelError(f"base {self.folder}: {extra[0]!r} is no weight of this model{near}{'; ' if lacking else ''}{lacking}.")
        if missing:
            raise ModelError(f"base {self.folder}: {lacking}.")
        for name, weight in found.items():
            if weight.shape != wanted[name]:
                raise ModelError(f"base {self.folder}: mismatched keys: {name} is {list(weight.shape)}, its config says {list(wanted[name])}.")
            if weight.dtype not in WHOLE:
                raise ModelError(f"base {self.folder}: {name} is {weight.dtype}, not a float; give the base before it was quantised.")


def _grown(weight: Weight, rows: int, like: int) -> Weight:
    """With rows for added tokens, equal to the unknown token's: the model never reads them, and never prefers them."""

    def read() -> torch.Tensor:
        value = weight.read()
        return torch.cat([value, value[like].expand(rows - value.shape[0], -1)])

    return replace(weight, shape=(rows, *weight.shape[1:]), read=read)


def _layout_of_key(key: str) -> Layout | None:
    if key.startswith(("model.mm_projector.", "model.vision_tower.vision_tower.", "model.layers.", "model.embed_tokens.")):
        return "original"
    return "hf" if "language_model." in key or "multi_modal_projector." in key else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises ModelError where there is none, or it is not JSON."""
    try:
        return read_object(folder / "config.json")
    except FileNotFoundError as error:
        raise ModelError(f"base {folder}: no config.json in it, so it is no checkpoint.") from error
    except ValueError as error:
        raise ModelError(f"base {folder}: {error}.") from error


def layout_of(raw: dict[str, Any]) -> Layout | None:
    """By the config's own fields; its ``model_type`` differs between upstream's versions. None for what is neither."""
    if raw.get("mm_vision_tower") and "vision_config" not in raw:
        return "original"
    return "hf" if "vision_config" in raw else None


def find_base(name: str) -> Path:
    """``pocket``, a folder, or a name in the local Hugging Face cache. Nothing is downloaded.

    Raises ModelError where there is none.
    """
    if name == POCKET:
        return POCKET_BASE
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise ModelError(f"base {name!r}: a file; the folder that it lies in is wanted, {str(folder.parent)!r}.")
    if folder.is_absolute() or name.startswith(("./", "../")) or name.count("/") > 1:
        raise ModelError(f"base {name!r}: no such folder.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # what it raises differs from version to version
        raise ModelError(
            f"base {name!r}: no such folder, and not in the local Hugging Face cache. Give a folder, or fetch it first: `hf download {name}`."
        ) from error


def open_checkpoint(base: BaseRef | str) -> Checkpoint:
    """Find a base and recognise its layout.

    Raises ModelError: no such base, no image-text model, a vision tower that is not here.
    """
    ref = BaseRef.of(base).defaulting_to(name=POCKET)
    folder = find_base(str(ref.name))
    raw = read_config(folder)
    layout = layout_of(raw)
    if layout is None:
        raise ModelError(f"base {folder}: a {raw.get('model_type')!r} model without a vision tower, not a LLaVA.")
    if layout == "hf":
        return Checkpoint(folder, layout, raw)
    return Checkpoint(folder, layout, raw, _find_tower(folder, str(raw["mm_vision_tower"]), ref.tower))


def _find_tower(folder: Path, named: str, given: str | None) -> Path:
    beside = [str(folder / "vision_tower"), str(folder / named), str(folder.parent / Path(named).name)]
    for place in [given] if given else [named, *beside]:
        if (Path(place).expanduser() / "config.json").exists():
            return Path(place).expanduser().resolve()
    if given or not Path(named).is_absolute():
        try:
            found = find_base(given or named)
            if (found / "config.json").exists():
                return found
        except ModelError:
            pass
    fetch = f"`hf download {named}`" if named.count("/") == 1 else "the tower it was trained with, for LCL openai/clip-vit-large-patch14"
    where = f"{given!r} is no folder with a config.json" if given else f"its config says {named!r}, which is not here"
    raise ModelError(
        f"base {folder}: the original layout keeps its vision tower in a folder of its own; {where}. Give it with vision_tower=FOLDER "
        f"(--vision-tower FOLDER), or fetch it: {fetch}."
    )
