"""Write a checkpoint in either layout, shard by shard: the weights of another one, changed or not, and the files beside them."""

from __future__ import annotations

import json
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
from lcl_adapter.base.layouts.tensors import Planned, Shards, blocks_of, stored_in
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.errors import MergeError, ModelError
from lcl_adapter.files import write_json
from lcl_adapter.terminal import console

SPARE = 64 * 2**20  # bytes of configs, tokenizer, and what a file system needs
Change = Callable[[Weight], Iterator[torch.Tensor]]  # to the rows of what is written in its place
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
TOWER = "vision_tower"  # the folder beside the weights that holds it, in the original layout


class PromptFormat(Protocol):
    """What writing needs of a family (``lcl_adapter.base.families``)."""

    @property
    def name(self) -> str: ...

    @property
    def both_layouts(self) -> bool: ...

    def chat_template(self, image_token: str) -> str: ...


@dataclass(frozen=True)
class Writing:
    """What is to be written: ``source`` in layout ``to``, its weights passed through ``changes`` by the model's own names.

    dtype: of every weight, None to keep each one's own. tower: what ``mm_vision_tower`` will say in a config that is made
    here; None puts the tower's weights beside the others. family, chat_template: the base's, by name and as Jinja.
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
    def of(
        cls,
        source: Checkpoint,
        family: PromptFormat,
        to: Layout,
        out: Path,
        changes: dict[str, Change] | None = None,
        dtype: torch.dtype | None = None,
        shard_size: int = 5 * 10**9,
        tower: str | None = None,
    ) -> Writing:
        """A writing into ``out``. Raises ModelError for a family that the other layout cannot be, or a name that upstream would misread."""
        if to != source.layout and not family.both_layouts:
            raise ModelError(f"base {source.folder}: a {family.name} model has no layout of haotian-liu's; it stays in Hugging Face's (--to hf).")
        if to == "original":
            check_folder_name(out, adapter=False, mistral=source.config.text_config.model_type == "mistral")
        if out.absolute().is_relative_to(source.folder):
            raise ModelError(f"{out}: lies inside the base, which is never written to. Give another place.")
        token = str(source.tokenizer.convert_ids_to_tokens(source.config.image_token_id))
        template = family.chat_template(token) if family.both_layouts else None
        return cls(source, to, changes or {}, dtype, shard_size, tower, family.name, template)

    @property
    def same_layout(self) -> bool:
        return self.source.layout == self.to

    @cached_property
    def names(self) -> dict[str, str]:
        """Key to be written -> the model's own name of the weight, in the order of the source's files."""
        found: dict[str, str] = {}
        for name, weight in self._ordered():
            if self.to == "hf":
                key = weight.stored.key if self.same_layout and weight.stored is not None else keys.to_hugging_face(name)
            elif self.same_layout:
                if weight.stored is None or weight.stored.file.parent != self.source.folder:
                    if keys.DROPPED.search(name) or name.startswith((keys.TOWER, keys.PROJECTOR)):
                        continue  # the tower's own folder, and v1's second layer, which is none
                    key = keys.to_original(name, self._linear)
                else:
                    key = weight.stored.key
            else:
                if name.startswith(keys.TOWER) and not self._is_next:
                    continue
                if self._linear and name.startswith(keys.PROJECTOR + "linear_2"):
                    continue
                key = keys.to_original(name, self._linear)
            found[key] = name
        if self.to == "original" and keys.HEAD not in found:
            found[keys.HEAD] = keys.EMBEDDING  # tied
        return found

    @cached_property
    def shards(self) -> Shards:
        return Shards([self._planned(key, name) for key, name in self.names.items()], self.shard_size)

    @cached_property
    def tower_shards(self) -> Shards | None:
        """The vision tower as a folder of its own, where none was named; upstream reads it from there first, in 1.6 too."""
        if self.to != "original" or self.same_layout or self.tower is not None:
            return None
        named = {name: weight for name, weight in self.source.weights.items() if name.startswith(keys.TOWER)}
        return Shards([self._planned("vision_model." + n.removeprefix(keys.TOWER), n) for n in named], self.shard_size)

    @property
    def size(self) -> int:
        return self.shards.size + (self.tower_shards.size if self.tower_shards else 0)

    @property
    def space(self) -> int:
        """Bytes that it needs on the disk."""
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
        """Read every tensor again but the ``skipped`` weights, and compare; returns how many. Raises MergeError with the first that differs."""
        written = [(one, folder) for one in self.shards.planned if self.names[one.key] not in skipped]
        if self.tower_shards is not None:
            written += [(one, folder / TOWER) for one in self.tower_shards.planned]
        on_disk = {place: stored_in(place) for place in {place for _, place in written}}
        for one, place in written:
            first = 0
            for block in one.make():
                expected = block.to(one.dtype).reshape(-1)
                actual = on_disk[place][one.key].part(first, first + len(expected))
                first += len(expected)
                if not torch.equal(expected, actual):
                    gap = float((expected.double() - actual.double()).abs().max())
                    raise MergeError(f"{place}: {one.key} differs from what was to be written by {gap:.3g}; the disk may be failing. Not kept.")
        return len(written)

    def ref(self, folder: Path) -> BaseRef | None:
        """The checkpoint in ``folder``, which need not be its final place; None where its vision tower was named and is not on this machine."""
        tower = self._tower_beside(folder)
        if self.to == "hf":
            return BaseRef(str(folder))
        return None if tower is None else BaseRef(str(folder), tower=str(tower))

    def _tower_beside(self, folder: Path) -> Path | None:
        if (folder / TOWER).exists():
            return folder / TOWER
        if self.source.tower is not None:
            return self.source.tower
        try:
            return None if self.tower is None else find_base(self.tower)
        except ModelError:
            return None

    def write(self, folder: Path, final: Path, resume: bool = True) -> Iterator[int]:
        """Everything, into ``folder`` that will be ``final``; yields bytes as they are written. Raises RunError, ModelError."""
        if self.same_layout:
            copy_beside(self.source.folder, folder, self.dtype)
        else:
            self.write_beside(folder, final)
        for _, size in self.shards.write(folder, resume):
            yield size
        if self.tower_shards is not None:
            for _, size in self.tower_shards.write(folder / TOWER, resume):
                yield size

    def write_beside(self, folder: Path, final: Path) -> None:
        """Config, tokenizer and processor in the other layout. Raises ModelError for what it cannot say."""
        source = self.source
        if self.to == "hf":
            config = source.config
            config.architectures = [type(keys.skeleton(config)).__name__]
            if self.dtype is not None:
                config.dtype = self.dtype
            config.save_pretrained(folder)
            kind = LlavaNextProcessor if config.model_type == "llava_next" else LlavaProcessor
            kind(
                source.image_processor,
                source.tokenizer,
                patch_size=config.vision_config.patch_size,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                num_additional_image_tokens=1,
                chat_template=self.chat_template,
            ).save_pretrained(folder)
            slow = source.folder / "tokenizer.model"
            if slow.exists():
                shutil.copyfile(slow, folder / slow.name)  # for the way back
            write_json(folder / "generation_config.json", cleaned(_read(source.folder / "generation_config.json")))
            return
        if not (source.folder / "tokenizer.model").exists():
            raise ModelError(
                f"base {source.folder}: has no tokenizer.model, which upstream's slow tokenizer reads. Copy it beside the checkpoint "
                "(llava-hf's have it; Vicuna's and Mistral's own will do) and run the command again."
            )
        tower = self.tower
        if tower is None:
            write_json(folder / TOWER / "config.json", {**source.config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"]})
            tower = str((final / TOWER).absolute())
            self._tower_processor().save_pretrained(folder / TOWER)
        config = configs.to_original(source.config, tower, self._rows, self.family)
        write_json(folder / "config.json", {**config, "pad_token_id": source.tokenizer.unk_token_id})
        shutil.copyfile(source.folder / "tokenizer.model", folder / "tokenizer.model")
        write_json(folder / "tokenizer_config.json", _slow_tokenizer(source.tokenizer))
        if self.family == "llava-v1":
            # All that were added behind the words, for upstream counts them: a hole would move the image's own.
            words = len(source.tokenizer.get_vocab()) - len(source.tokenizer.get_added_vocab())
            added = {token: number for token, number in source.tokenizer.get_added_vocab().items() if number >= words}
            write_json(folder / "added_tokens.json", dict(sorted(added.items(), key=lambda item: item[1])))
        generation = cleaned(_read(source.folder / "generation_config.json"))
        unknown = source.tokenizer.unk_token_id
        write_json(folder / "generation_config.json", {**generation, "pad_token_id": unknown} if "pad_token_id" in generation else generation)

    @property
    def _linear(self) -> bool:
        return bool(self.source.config.projector_hidden_act == "linear")

    @property
    def _is_next(self) -> bool:
        return bool(self.source.config.model_type == "llava_next")

    @property
    def _rows(self) -> int:
        """Of the embedding in the original layout: without the image token, which upstream never reads, and what was padded behind it."""
        rows = self.source.weights[keys.EMBEDDING].shape[0]
        return rows if self.family == "llava-v1" else min(rows, self.source.config.image_token_id)

    def _ordered(self) -> list[tuple[str, Weight]]:
        def place(item: tuple[str, Weight]) -> tuple[str, int]:
            stored = item[1].stored
            return ("", 0) if stored is None else (str(stored.file), stored.begin)

        return sorted(self.source.weights.items(), key=place)

    def _planned(self, key: str, name: str) -> Planned:
        weight = self.source.weights[name]
        dtype = self.dtype or weight.dtype
        shape = weight.shape
        if self.to == "original" and name in {keys.EMBEDDING, keys.HEAD}:
            rows = weight.stored.shape[0] if self.same_layout and weight.stored is not None else self._rows
            shape = (rows, *shape[1:])

        def make() -> Iterator[torch.Tensor]:
            if self._folded(name):
                yield from blocks_of(self._one_layer(name))
                return
            left = shape[0] if shape else 1
            for block in self._rows_of(name):  # to its end, where a change notes what it has done
                if left > 0:
                    yield block[:left] if block.ndim else block
                    left -= len(block) if block.ndim else 1

        return Planned(key, dtype, shape, make)

    def _folded(self, name: str) -> bool:
        return self.to == "original" and name.startswith(keys.PROJECTOR + "linear_1") and self._linear

    def _one_layer(self, name: str) -> torch.Tensor:
        """v1 has one layer: two without anything between them are one again."""
        parts = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
        one = {part: torch.cat(list(self._rows_of(keys.PROJECTOR + part))).double() for part in parts}
        if name.endswith("weight"):
            return (one["linear_2.weight"] @ one["linear_1.weight"]).float()
        return (one["linear_2.weight"] @ one["linear_1.bias"] + one["linear_2.bias"]).float()

    def _rows_of(self, name: str) -> Iterator[torch.Tensor]:
        weight = self.source.weights[name]
        return self.changes[name](weight) if name in self.changes else weight.blocks()

    def _tower_processor(self) -> Any:
        images = self.source.image_processor
        side = self.source.config.vision_config.image_size
        same = {name: getattr(images, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **same)


def copy_beside(source: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """All but the weights, byte for byte; the config's type where it changes, and a generation config that can be saved again."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if (folder / "generation_config.json").exists():
        read = _read(folder / "generation_config.json")
        if cleaned(read) != read:
            write_json(folder / "generation_config.json", cleaned(read))
    if dtype is not None:
        config = _read(folder / "config.json")
        write_json(folder / "config.json", {**config, "dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")})


def cleaned(config: dict[str, Any]) -> dict[str, Any]:
    """Without what only sampling reads, where nothing is sampled: transformers refuses to save such a one again."""
    return config if config.get("do_sample") else {k: v for k, v in config.items() if k not in {"temperature", "top_p", "top_k", "do_sample"}}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _slow_tokenizer(tokenizer: Any) -> dict[str, Any]:
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
    """Upstream tells what a folder is by its name alone (llava/mm_utils.py, llava/model/builder.py).

    Raises ModelError for one that it would take for something else.
    """
    name = out.name.lower()
    if name.startswith("checkpoint-"):
        raise ModelError(
            f"{out}: upstream takes the parent's name for a folder called checkpoint-…; choose a name of its own, such as llava-lora-mine."
        )
    for word, wanted in (("llava", True), ("lora", adapter), ("mpt", False), ("mistral", mistral)):
        if wanted and word not in name:
            raise ModelError(
                f"{out}: upstream tells what a folder is by its name, and this needs {word!r} in it; for instance {_example(adapter, mistral)}."
            )
        if not wanted and word in name and not (word == "mistral" and adapter):
            raise ModelError(f"{out}: {word!r} in its name would make upstream load it as something else; for instance {_example(adapter, mistral)}.")


def _example(adapter: bool, mistral: bool) -> str:
    return "llava-lora-mine" if adapter else "llava-mistral-mine" if mistral else "llava-mine"
