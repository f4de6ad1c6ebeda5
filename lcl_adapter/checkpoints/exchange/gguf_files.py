"""A LLaVA-1.5 as two GGUF files: the language model, and the vision tower with the projector (``mmproj``).

Names of tensors and fields come from the package gguf. What llama.cpp does with them is written in its
tools/mtmd/clip.cpp, tools/mtmd/models/llava.cpp and conversion/llama.py:

- The rows of ``q_proj`` and ``k_proj`` are in another order, because llama.cpp rotates neighbouring values.
- The tower ends at the layer whose output the projector reads. The norm behind its last layer is left out.
- Vectors are in fp32, matrices in the type that they are stored in. In ``mmproj`` bf16 becomes fp32, since its
  convolution does not compute in bf16.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.progress import track

from lcl_adapter.amounts import trim_heap
from lcl_adapter.base.layouts import Checkpoint, keys
from lcl_adapter.base.layouts.checkpoint import Weight
from lcl_adapter.base.layouts.tensors import PlannedTensor
from lcl_adapter.errors import MergeError, RunError
from lcl_adapter.files import whole_file
from lcl_adapter.terminal import console

Item = TypeVar("Item")
ClassToken = Literal["first", "last"]
CONVERTER = "convert_hf_to_gguf.py"
LAST_LINES = 8  # of a converter that failed
FEATURE_LAYER = "clip.vision.feature_layer"  # clip.cpp's KEY_FEATURE_LAYERS, for which gguf has no name
PROJECTOR_TYPE = "mlp"  # clip.cpp's name of two linear layers with GELU between them
PROJECTOR_LAYERS = {"linear_1": 0, "linear_2": 2}  # their numbers in upstream's Sequential, which GGUF uses
OUTTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}  # the converter's names of types; others are written as f32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file by its name there. ``read`` gives its value, in the type that it is stored in."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def require_gguf() -> ModuleType:
    """The package gguf, which is an optional dependency. Raises RunError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise RunError('GGUF files need the package gguf: pip install "lcl-adapter[gguf]".') from error
    return gguf  # type: ignore[no-any-return]


def language_tensors(planned: Sequence[PlannedTensor], text_config: Any) -> list[GgufTensor]:
    """The language model's tensors. planned: those of a plain Llama, by its names on disk (``model.layers.0…``)."""
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text_config.num_hidden_layers)
    heads = {"q_proj.weight": text_config.num_attention_heads, "k_proj.weight": text_config.num_key_value_heads}

    def reader(tensor: PlannedTensor) -> Callable[[], torch.Tensor]:
        count = next((number for end, number in heads.items() if tensor.key.endswith(end)), None)
        return lambda: interleaved(_whole(tensor), count) if count else _whole(tensor)

    return [GgufTensor(names.get_name(t.key, try_suffixes=(".weight",)), t.dtype, t.shape, reader(t)) for t in planned]


def _whole(tensor: PlannedTensor) -> torch.Tensor:
    return torch.cat([block.to(tensor.dtype) for block in tensor.make()])


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query's or a key's projection, [heads * 2 * half, width], in llama.cpp's order.

    transformers rotates value i of a head with value i + half, llama.cpp 2i with 2i + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def vision_tensors(checkpoint: Checkpoint, class_token: ClassToken = "first") -> list[GgufTensor]:
    """The tensors of tower and projector, without the layers behind the one that the projector reads.

    class_token: where llama.cpp puts it among the patches; the rows of the position embedding are in that order.
    """
    gguf = require_gguf()
    layers = feature_layer(checkpoint.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    tensors = []
    for name, weight in checkpoint.weights.items():
        if name.startswith(keys.PROJECTOR):
            layer, part = name.removeprefix(keys.PROJECTOR).split(".")
            gguf_name = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ].format(bid=PROJECTOR_LAYERS[layer])}.{part}"
        elif name.startswith(keys.TOWER) and "post_layernorm" not in name:
            gguf_name = names.get_name(keys.to_hugging_face(name), try_suffixes=(".weight", ".bias"))
        else:
            continue
        if gguf_name is not None:  # else of a layer behind
            dtype = torch.float16 if weight.dtype == torch.float16 else torch.float32
            read = partial(_rolled, weight) if class_token == "last" and "position_embedding" in name else weight.read
            tensors.append(GgufTensor(gguf_name, dtype, weight.shape, read))
    return tensors


def _rolled(weight: Weight) -> torch.Tensor:
    """The rows with the first one last."""
    return weight.read().roll(-1, 0)


def feature_layer(config: Any) -> int:
    """The number of the tower's layers that run before the projector."""
    layer: int = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def write_language(path: Path, name: str, text_config: Any, tensors: Sequence[GgufTensor], tokenizer: Path) -> None:
    """Write the language model. tokenizer: the folder of its ``tokenizer.model``, configs and chat template.

    Raises RunError as :func:`lcl_adapter.files.whole_file`.
    """
    gguf = require_gguf()
    with whole_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_context_length(text_config.max_position_embeddings)
        writer.add_embedding_length(text_config.hidden_size)
        writer.add_block_count(text_config.num_hidden_layers)
        writer.add_feed_forward_length(text_config.intermediate_size)
        writer.add_head_count(text_config.num_attention_heads)
        writer.add_head_count_kv(text_config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(text_config.rms_norm_eps)
        writer.add_rope_freq_base(rope_theta(text_config))
        writer.add_rope_dimension_count(text_config.head_dim)
        writer.add_key_length(text_config.head_dim)
        writer.add_value_length(text_config.head_dim)
        rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
        writer.add_vocab_size(rows)
        _add_vocabulary(writer, tokenizer, rows)
        _write(writer, unfinished, tensors)


def rope_theta(text_config: Any) -> float:
    return float((getattr(text_config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))


def _add_vocabulary(writer: Any, folder: Path, rows: int) -> None:
    """The tokens of ``tokenizer.model``, the special tokens, and the chat template. rows: of the embedding."""
    gguf = require_gguf()
    from gguf.vocab import SentencePieceVocab

    tokens = list(SentencePieceVocab(folder).all_tokens())[:rows]
    tokens += [(f"[PAD{n}]".encode(), -10000.0, gguf.TokenType.UNUSED) for n in range(len(tokens), rows)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    gguf.SpecialVocab(folder, n_vocab=rows).add_to_gguf(writer, quiet=True)


def write_vision(path: Path, name: str, checkpoint: Checkpoint, tensors: Sequence[GgufTensor]) -> None:
    """Write tower and projector. Raises RunError as :func:`lcl_adapter.files.whole_file`."""
    gguf = require_gguf()
    config, tower, images = checkpoint.config, checkpoint.config.vision_config, checkpoint.image_processor
    layers = feature_layer(config)
    with whole_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name(name)
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
        writer.add_clip_projector_type(PROJECTOR_TYPE)
        writer.add_vision_projection_dim(config.text_config.hidden_size)
        writer.add_vision_image_size(tower.image_size)
        writer.add_vision_patch_size(tower.patch_size)
        writer.add_vision_embedding_length(tower.hidden_size)
        writer.add_vision_feed_forward_length(tower.intermediate_size)
        writer.add_vision_block_count(layers)
        writer.add_vision_head_count(tower.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
        writer.add_vision_use_gelu(tower.hidden_act == "gelu")  # else quick_gelu
        writer.add_vision_image_mean(list(images.image_mean))
        writer.add_vision_image_std(list(images.image_std))
        writer.add_array(FEATURE_LAYER, [layers])
        _write(writer, unfinished, tensors)


def _write(writer: Any, path: Path, tensors: Sequence[GgufTensor]) -> None:
    """Write the fields and then tensor after tensor, so that one is in memory at a time."""
    gguf = require_gguf()
    largest = max(tensors, key=lambda tensor: len(tensor.shape))
    writer.add_file_type({"F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16}.get(_kind(largest).name, 0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        kind = _kind(tensor)
        item = 4 if kind.name == "F32" else 2  # bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), item * int(np.prod(tensor.shape)), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    written = 0
    for tensor in _with_bar(tensors, f"writing {path.name.partition('.gguf')[0]}.gguf"):
        data = gguf.quants.quantize(tensor.read().float().numpy(), _kind(tensor))
        writer.write_tensor_data(np.ascontiguousarray(data))
        written = trim_heap(written + data.nbytes)
    writer.close()


def _with_bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def _kind(tensor: GgufTensor) -> Any:
    """The type in the file: vectors are always in fp32."""
    gguf = require_gguf()
    name = OUTTYPES.get(tensor.dtype, "f32").upper() if len(tensor.shape) > 1 else "F32"
    return gguf.GGMLQuantizationType[name]


def check_written(path: Path, tensors: Sequence[GgufTensor]) -> int:
    """Read a GGUF file and compare every tensor; returns how many.

    Raises MergeError for one that is missing, differs, or does not belong there. Nothing may be rounded.
    """
    gguf = require_gguf()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = {tensor.name: tensor for tensor in tensors}
    if different := sorted(stored.keys() ^ expected.keys()):
        where = "is in the file and not in the model" if different[0] in stored else "is missing"
        raise MergeError(f"{path.name}: {different[0]} {where}. Nothing was saved.")
    for name, values in _with_bar(_values(stored), f"comparing {path.name}", len(stored)):
        wanted = expected[name].read().float().numpy()
        if values.shape != wanted.shape or not np.array_equal(values, wanted):
            raise MergeError(f"{path.name}: {name} differs from the merged model's. Nothing was saved.")
    return len(stored)


def _values(stored: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    gguf = require_gguf()
    for name, tensor in stored.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def find_converter(llama_cpp: Path) -> Path:
    """llama.cpp's own converter in a checkout. Raises RunError where there is none."""
    converter = llama_cpp.expanduser() / CONVERTER
    if not converter.is_file():
        what = "is no folder" if not llama_cpp.expanduser().is_dir() else f"has no {CONVERTER}"
        raise RunError(
            f"--llama-cpp {llama_cpp}: {what}. Give a checkout of llama.cpp's sources (git clone https://github.com/ggml-org/llama.cpp), "
            "or leave it out: the file is then written without llama.cpp."
        )
    return converter.resolve()


def run_converter(converter: Path, model: Path, out: Path, dtype: torch.dtype) -> None:
    """Run llama.cpp's converter on the plain Llama in ``model``. Raises RunError, with its last lines, where it fails."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(out), "--outtype", OUTTYPES.get(dtype, "f32")]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if ended.returncode == 0 and out.is_file():
        return
    lines = ended.stdout.decode("utf-8", "replace").strip().splitlines()[-LAST_LINES:]
    status = f"ended with {ended.returncode}" if ended.returncode else f"wrote no {out.name}"
    raise RunError(
        f"{converter}: {status}. Nothing was saved. Its last lines:\n" + "\n".join(f"  {line}" for line in lines or ["(none)"]) + "\n"
        "It needs the packages of llama.cpp's requirements.txt. Without --llama-cpp the file is written without it."
    )
