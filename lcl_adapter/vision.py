"""Frozen vision features, computed once a picture instead of once a step.

What is kept is the projector's *input*: the tower is frozen, the projector may be trained. Pictures that are not kept
are read by a few threads, and pass the tower in batches.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lcl_adapter.model import Base
from lcl_adapter.sources import Picture, read_image

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def memory_bytes(text: str) -> int:
    """``1.5 GB`` -> 1500000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text)
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; write for instance 500MB or 2GB")
    return int(float(match[1]) * UNITS[match[2]])


def _weight_type(projector: Any) -> torch.dtype:
    """The type the projector computes in: its trained copy's, where it has one and that is switched on."""
    trained = getattr(projector, "modules_to_save", None)
    if trained and not projector.disable_adapters:
        projector = trained[projector.active_adapters[0]]
    elif trained is not None:
        projector = projector.original_module
    kind: torch.dtype = next(projector.parameters()).dtype
    return kind


def squared(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Padded to a square with the processor's mean colour, the image in the middle, as LLaVA-1.5 was trained (`image_aspect_ratio: pad`).

    Without it the processor cuts the sides off, a defect near an edge with them, and boxes would be of another square.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    page = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


class _CaughtError(Exception):
    """What would reach the projector, on its way out."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features


class VisionFeatures:
    """Pictures -> what the projector reads, [N, tokens, width], kept up to ``limit`` bytes, least recently used out first."""

    def __init__(self, base: Base, limit: int = 10**9, batch: int = 32) -> None:
        self.base = base
        self.limit = limit
        self.batch = batch
        self.kept: OrderedDict[Picture, torch.Tensor] = OrderedDict()
        self.bytes = 0
        self.asked = self.computed = 0

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """[N, 3, H, W] as the base's own image processor makes them, after padding to a square. Raises DataError for a broken picture."""
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(lambda p: squared(read_image(p), self.base.processor.image_processor.image_mean), pictures))
        processed = self.base.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return processed.to(self.base.device, self.base.dtype)

    def raw(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The projector's input for each picture, in order; [N, tokens, width], no gradient."""
        self.asked += len(pictures)
        fresh = list(dict.fromkeys(p for p in pictures if p not in self.kept))
        local: dict[Picture, torch.Tensor] = {}
        for start in range(0, len(fresh), self.batch):
            part = fresh[start : start + self.batch]
            local.update(zip(part, self._tower(part), strict=True))
        self.computed += len(fresh)
        rows = []
        for picture in pictures:
            if picture in local:
                rows.append(local[picture])
            else:
                self.kept.move_to_end(picture)
                rows.append(self.kept[picture])
        for picture, features in local.items():
            self._keep(picture, features)
        return torch.stack(rows)

    def projected(self, pictures: Sequence[Picture], noise: float = 0.0) -> dict[str, BaseModelOutputWithPooling]:
        """``mm_encoder_outputs`` for the model's forward. Without noise, each different picture passes the projector once.

        noise: Gaussian, in standard deviations of each feature over this batch. A tower that knows the training classes
        makes their episodes easier than a new class's will be; noise makes up for that.
        """
        if not pictures:
            return {}
        projector = self.base.llava.model.multi_modal_projector
        kind = _weight_type(projector)
        if noise:
            raw = self.raw(pictures).to(kind)
            features = projector(raw + noise * raw.std((0, 1)) * torch.randn_like(raw))
        else:
            different = list(dict.fromkeys(pictures))
            places = {picture: i for i, picture in enumerate(different)}
            features = projector(self.raw(different).to(kind))
            features = features[torch.tensor([places[p] for p in pictures], device=features.device)]
        features = features.to(self.base.dtype)  # a trained projector is fp32, whatever the base is
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}  # type: ignore[arg-type]

    @torch.no_grad()
    def _tower(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Run the model's own feature code up to the projector, so that no choice of layers is repeated here."""

        def catch(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _CaughtError(inputs[0])

        hook = self.base.llava.model.multi_modal_projector.register_forward_pre_hook(catch)
        try:
            self.base.llava.get_image_features(self.pixels(pictures), return_dict=True)
        except _CaughtError as caught:
            return caught.features
        finally:
            hook.remove()
        raise AssertionError("the model read no features")

    def _keep(self, picture: Picture, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        while self.kept and self.bytes + size > self.limit:
            _, dropped = self.kept.popitem(last=False)
            self.bytes -= dropped.numel() * dropped.element_size()
        if size <= self.limit:
            self.kept[picture] = features.clone()
            self.bytes += size
