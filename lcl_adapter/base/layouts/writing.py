"""Write a checkpoint in either layout, shard by shard, from another one: its weights, changed or not, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import CLIPImageProcessorPil, LlavaNextProcessor, LlavaProcessor

from lcl_adapter.amounts import trim_heap
from lcl_adapter.base.layouts import configs, keys
from lcl_adapter.base.layouts.checkpoint import Checkpoint, Layout, Weight, find_base
from lcl_adapter.base.layouts.tensors import PlannedTensor, Shards, StoredTensor, row_blocks, tensors_in_folder
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import MergeError, ModelError
from lcl_adapter.files import read_result, write_json
from lcl_adapter.terminal import console

SPARE = 64 * 2**20  # bytes for configs, tokenizer and the file system
Change = Callable[[Weight], Iterator[torch.Tensor]]  # a weight -> blocks of rows that are written instead of it
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
TOWER = "vision_tower"  # the vision tower's folder inside an original checkpoint that is written here


class PromptFormat(Protocol):
    """The part of a family (``lcl_adapter.base.families``) that writing needs."""

    @property
    def name(self) -> str: ...

    @property
    def both_layouts(self) -> bool: ...

    def chat_template(self, image_token: str) -> str: ...


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes ``source`` in layout ``to``.

    changes: the model's name of a weight -> a function that computes its new rows.
    dtype: of every weight; None leaves each weight its own type.
    tower: the value of ``mm_vision_tower`` in an original config; None writes the tower into a folder of its own.
    family: the base's family by name. chat_template: the family's prompt as Jinja.
    """

    source: Checkpoint
    to: Layout
    changes: dict[str, Change]
    dtype: torch.dtype | None = None
    shard_size: int = 5 * 10**9
    tower: str | None = None
    family: str = ""
    chat_template: str | None = None

    @classmethod
    def prepare(
        cls,
        source: Checkpoint,
        family: PromptFormat,
        to: Layout,
        out: Path,
        changes: dict[str, Change] | None = None,
        dtype: torch.dtype | None = None,
        shard_size: int = 5 * 10**9,
        tower: str | None = None,
    ) -> CheckpointWriter:
        """A writer into ``out``.

        Raises ModelError for a family without the other layout, or a folder name that upstream would misread.
        """
        if to != source.layout and not family.both_layouts:
            raise ModelError(f"base {source.folder}: a {family.name} model has no layout of haotian-liu's; write Hugging Face's (--to hf).")
        if to == "original":
            check_folder_name(out, adapter=False, mistral=source.config.text_config.model_type == "mistral")
        if out.absolute().is_relative_to(source.folder):
            raise ModelError(f"{out}: lies inside the base, which is never written to. Give another folder.")
        token = str(source.tokenizer.convert_ids_to_tokens(source.config.image_token_id))
        template = family.chat_template(token) if family.both_layouts else None
        return cls(source, to, changes or {}, dtype, shard_size, tower, family.name, template)

    @property
    def same_layout(self) -> bool:
        return self.source.layout == self.to

    @cached_property
    def names(self) -> dict[str, str]:
        """Key to write -> the model's own name of the weight, in the order of the source's files."""
        names: dict[str, str] = {}
        for name, weight in self._ordered():
            key = self._key_of(name, weight)
            if key is not None:
                names[key] = name
        if self.to == "original" and keys.HEAD not in names:
            names[keys.HEAD] = keys.EMBEDDING  # tied weights
        return names

    def _key_of(self, name: str, weight: Weight) -> str | None:
        """The key that a weight is written under; None where it is not written among these shards."""
        in_folder = weight.stored is not None and weight.stored.file.parent == self.source.folder
        if self.to == "hf":
            return weight.stored.key if self.same_layout and weight.stored is not None else keys.to_hugging_face(name)
        if self.same_layout:
            if weight.stored is not None and in_folder:
                return weight.stored.key
            # The tower has a folder of its own, and v1's second projector layer does not exist in this layout.
            outside = keys.DROPPED.search(name) or name.startswith((keys.TOWER, keys.PROJECTOR))
        else:
            outside = (name.startswith(keys.TOWER) and not self._is_next) or (self._linear and name.startswith(keys.PROJECTOR + "linear_2"))
        return None if outside else keys.to_original(name, self._linear)

    @cached_property
    def shards(self) -> Shards:
        return Shards([self._planned(key, name) for key, name in self.names.items()], self.shard_size)

    @cached_property
    def tower_shards(self) -> Shards | None:
        """The vision tower in a folder of its own, where no tower was named.

        Upstream reads it from there first, in 1.6 too.
        """
        if self.to != "original" or self.same_layout or self.tower is not None:
            return None
        names = [name for name in self.source.weights if name.startswith(keys.TOWER)]
        return Shards([self._planned("vision_model." + name.removeprefix(keys.TOWER), name) for name in names], self.shard_size)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self.shards.size + (self.tower_shards.size if self.tower_shards else 0)

    @property
    def space(self) -> int:
        """Bytes needed on the disk."""
        return self.size + SPARE

    def write_with_bar(self, folder: Path, final: Path) -> None:
        """:meth:`write`, resumed where it stopped, with a progress bar."""
        columns = (TextColumn(f"writing {final.name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        done = 0
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=self.size)
            for size in self.write(folder, final):
                bar.advance(task, size)
                done = trim_heap(done + size)

    def verify(self, folder: Path, skipped: frozenset[str] = frozenset()) -> int:
        """Read the written tensors and compare them, except the ``skipped`` weights; returns how many.

        Raises MergeError with the first tensor that differs.
        """
        written = [(tensor, folder) for tensor in self.shards.planned if self.names[tensor.key] not in skipped]
        if self.tower_shards is not None:
            written += [(tensor, folder / TOWER) for tensor in self.tower_shards.planned]
        on_disk = {parent: tensors_in_folder(parent) for parent in {parent for _, parent in written}}
        for tensor, parent in written:
            first = 0
            for block in tensor.make():
                expected = block.to(tensor.dtype).reshape(-1)
                actual = on_disk[parent][tensor.key].flat(first, first + len(expected))
                first += len(expected)
                if not torch.equal(expected, actual):
                    gap = float((expected.double() - actual.double()).abs().max())
                    raise MergeError(
                        f"{parent}: {tensor.key} on the disk differs from what was written by {gap:.3g}; the disk may be failing. It was removed."
                    )
        return len(written)

    def written(self, folder: Path) -> dict[str, StoredTensor]:
        """The tensors in ``folder`` by the model's own names."""
        tensors = {self.names[key]: tensor for key, tensor in tensors_in_folder(folder).items()}
        if self.tower_shards is not None:
            tensors |= {keys.TOWER + key.removeprefix("vision_model."): tensor for key, tensor in tensors_in_folder(folder / TOWER).items()}
        return tensors

    def ref(self, folder: Path) -> BaseRef | None:
        """A reference to the checkpoint in ``folder``; None where its vision tower is not on this machine."""
        tower = self._tower_folder(folder)
        if self.to == "hf":
            return BaseRef(str(folder))
        return None if tower is None else BaseRef(str(folder), tower=str(tower))

    def _tower_folder(self, folder: Path) -> Path | None:
        if (folder / TOWER).exists():
            return folder / TOWER
        if self.source.tower is not None:
            return self.source.tower
        try:
            return None if self.tower is None else find_base(self.tower)
        except ModelError:
            return None

    def write(self, folder: Path, final: Path, resume: bool = True) -> Iterator[int]:
        """Write everything into ``folder``, which will be renamed to ``final``; yields bytes as they are written.

        Raises RunError, ModelError.
        """
        if self.same_layout:
            copy_other_files(self.source.folder, folder, self.dtype)
        else:
            self.write_other_files(folder, final)
        for _, size in self.shards.write(folder, resume):
            yield size
        if self.tower_shards is not None:
            for _, size in self.tower_shards.write(folder / TOWER, resume):
                yield size

    def write_other_files(self, folder: Path, final: Path) -> None:
        """Config, tokenizer and processor in the other layout.

        Raises ModelError for what that layout cannot represent.
        """
        if self.to == "hf":
            self._write_hf_files(folder)
        else:
            self._write_original_files(folder, final)

    def _write_hf_files(self, folder: Path) -> None:
        source, config = self.source, self.source.config
        config.architectures = [type(keys.skeleton(config)).__name__]
        if self.dtype is not None:
            config.dtype = self.dtype
        config.save_pretrained(folder)
        processor_class = LlavaNextProcessor if config.model_type == configs.NEXT else LlavaProcessor
        processor_class(
            source.image_processor,
            source.tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
            chat_template=self.chat_template,
        ).save_pretrained(folder)
        sentencepiece = source.folder / "tokenizer.model"
        if sentencepiece.exists():
            shutil.copyfile(sentencepiece, folder / sentencepiece.name)  # converting back needs it
        write_json(folder / "generation_config.json", without_sampling(_read(source.folder / "generation_config.json")))

    def _write_original_files(self, folder: Path, final: Path) -> None:
        source = self.source
        if not (source.folder / "tokenizer.model").exists():
            raise ModelError(
                f"base {source.folder}: has no tokenizer.model, which upstream's slow tokenizer reads. Copy it beside the checkpoint "
                "(llava-hf's bases have it; Vicuna's or Mistral's own works too) and run the command again."
            )
        tower = self.tower
        if tower is None:
            write_json(folder / TOWER / "config.json", {**source.config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"]})
            tower = str((final / TOWER).absolute())
            self._tower_processor().save_pretrained(folder / TOWER)
        config = configs.to_original(source.config, tower, self._embedding_rows, self.family)
        write_json(folder / "config.json", {**config, "pad_token_id": source.tokenizer.unk_token_id})
        shutil.copyfile(source.folder / "tokenizer.model", folder / "tokenizer.model")
        write_json(folder / "tokenizer_config.json", slow_tokenizer(source.tokenizer))
        if self.family == "llava-v1":
            # All tokens added behind the vocabulary: upstream counts them, so a gap would shift the image tokens.
            words = len(source.tokenizer.get_vocab()) - len(source.tokenizer.get_added_vocab())
            added = {token: number for token, number in source.tokenizer.get_added_vocab().items() if number >= words}
            write_json(folder / "added_tokens.json", dict(sorted(added.items(), key=lambda item: item[1])))
        generation = without_sampling(_read(source.folder / "generation_config.json"))
        unknown = source.tokenizer.unk_token_id
        write_json(folder / "generation_config.json", {**generation, "pad_token_id": unknown} if "pad_token_id" in generation else generation)

    @property
    def _linear(self) -> bool:
        return bool(self.source.config.projector_hidden_act == "linear")

    @property
    def _is_next(self) -> bool:
        return bool(self.source.config.model_type == configs.NEXT)

    @property
    def _embedding_rows(self) -> int:
        """Rows of the embedding in the original layout: those before the image token, which upstream never reads."""
        rows = self.source.weights[keys.EMBEDDING].shape[0]
        return rows if self.family == "llava-v1" else min(rows, self.source.config.image_token_id)

    def _ordered(self) -> list[tuple[str, Weight]]:
        """The source's weights in the order of its files and of the offsets in them; computed weights first."""

        def order(item: tuple[str, Weight]) -> tuple[str, int]:
            stored = item[1].stored
            return ("", 0) if stored is None else (str(stored.file), stored.position)

        return sorted(self.source.weights.items(), key=order)

    def _planned(self, key: str, name: str) -> PlannedTensor:
        weight = self.source.weights[name]
        dtype = self.dtype or weight.dtype
        shape = weight.shape
        if self.to == "original" and name in {keys.EMBEDDING, keys.HEAD}:
            rows = weight.stored.shape[0] if self.same_layout and weight.stored is not None else self._embedding_rows
            shape = (rows, *shape[1:])

        def make() -> Iterator[torch.Tensor]:
            if self.joins_projector and name.startswith(keys.PROJECTOR + "linear_1"):
                yield from row_blocks(self._merged_layer(name))
                return
            remaining = shape[0] if shape else 1
            for block in self._rows_of(name):
                if remaining > 0:
                    yield block[:remaining] if block.ndim else block
                    remaining -= len(block) if block.ndim else 1

        return PlannedTensor(key, dtype, shape, make)

    @property
    def joins_projector(self) -> bool:
        """Whether v1's projector is written as the product of its two layers, in the original layout."""
        return self.to == "original" and self._linear

    def _merged_layer(self, name: str) -> torch.Tensor:
        """v1's projector has one layer.

        Two linear layers without an activation between them equal one, their product.
        """
        parts = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
        w1, b1, w2, b2 = (torch.cat(list(self._rows_of(keys.PROJECTOR + part))).double() for part in parts)
        return (w2 @ w1 if name.endswith("weight") else w2 @ b1 + b2).float()

    def _rows_of(self, name: str) -> Iterator[torch.Tensor]:
        weight = self.source.weights[name]
        return self.changes[name](weight) if name in self.changes else weight.blocks()

    def _tower_processor(self) -> Any:
        images = self.source.image_processor
        side = self.source.config.vision_config.image_size
        settings = {name: getattr(images, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **settings)


def copy_other_files(source: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy all files but the weights.

    Changes the config's type where ``dtype`` is given, and removes unused sampling options.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if (folder / "generation_config.json").exists():
        generation = _read(folder / "generation_config.json")
        if without_sampling(generation) != generation:
            write_json(folder / "generation_config.json", without_sampling(generation))
    if dtype is not None:
        config = _read(folder / "config.json")
        write_json(folder / "config.json", {**config, "dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")})


def without_sampling(config: dict[str, Any]) -> dict[str, Any]:
    """The config without sampling options where it does not sample: transformers refuses to save those."""
    if config.get("do_sample"):
        return config
    return {key: value for key, value in config.items() if key not in {"temperature", "top_p", "top_k", "do_sample"}}


def _read(file: Path) -> dict[str, Any]:
    return read_result(file) if file.exists() else {}


def slow_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json of the sentencepiece tokenizer."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.unk_token,
        "model_max_length": 4096,
        "padding_side": "right",
    }


def check_folder_name(out: Path, adapter: bool, mistral: bool = False) -> None:
    """Upstream recognises a folder by its name alone (llava/mm_utils.py, llava/model/builder.py).

    Raises ModelError for a name that it would misread.
    """
    name = out.name.lower()
    if name.startswith("checkpoint-"):
        raise ModelError(f"{out}: upstream uses the parent's name for a folder called checkpoint-…; choose another name, such as llava-lora-mine.")
    for word, wanted in (("llava", True), ("lora", adapter), ("mpt", False), ("mistral", mistral)):
        if wanted and word not in name:
            raise ModelError(
                f"{out}: upstream recognises a folder by its name, and this one needs {word!r} in it; for instance {_example(adapter, mistral)}."
            )
        if not wanted and word in name and not (word == "mistral" and adapter):
            raise ModelError(f"{out}: {word!r} in its name would make upstream load it as something else; for instance {_example(adapter, mistral)}.")


def _example(adapter: bool, mistral: bool) -> str:
    return "llava-lora-mine" if adapter else "llava-mistral-mine" if mistral else "llava-mine"
