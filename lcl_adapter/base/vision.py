"""Frozen vision features, computed once a picture instead of once a step.

What is cache is the projector's *input*: the tower is frozen, the projector may be trained. Pictures that are not cache
are read by a few threads, and pass the tower in batches.
"""

from __future__ import annotations

import inspect
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lcl_adapter import processes
from lcl_adapter.base.families.chat_template import process
from lcl_adapter.base.model import Base, side_of
from lcl_adapter.data.sources import Picture, read_image

BATCH = 32  # pictures that pass the tower at a time


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

    Without it the processor cuts the pair off, a defect near an edge with them, and boxes would be of another square.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    page = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


@cache
def blank() -> Picture:
    """What is looked at where there is nothing to look at."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(png, "PNG")
    return Picture(Path("blank.png"), data=png.getvalue())


class _CaughtError(Exception):
    """What would reach the projector, on its way out."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features


class VisionFeatures:
    """Pictures -> what the projector reads, [N, tiles, tokens, width], cache up to ``limit`` bytes, least recently used out first."""

    def __init__(self, base: Base, limit: int = 10**9, batch: int = BATCH, in_step: bool = False) -> None:
        """in_step: each process holds a part of the tower; whenever one of them runs it, all do."""
        self.base = base
        self.in_step = in_step
        self.limit = limit
        self.batch = batch
        self.cache: OrderedDict[Picture, torch.Tensor] = OrderedDict()
        self.bytes = 0
        self.asked = self.computed = 0

    def pixels(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """What the model's ``get_image_features`` takes, ``pixel_values`` first among it, by the base's own image processor.

        Pictures are padded to a square first. Raises DataError for a broken picture.
        """
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(self._square, pictures))
        processor, config = self.base.image_processor, self.base.llava.config
        if not self.base.own_projector:
            made = {k: v for k, v in process(processor, images).items() if isinstance(v, torch.Tensor)}
        elif config.model_type == "llava":
            made = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        else:
            side = side_of(config)
            grid = {} if self.base.tiles else {"image_grid_pinpoints": [[side, side]]}
            found = processor(images, return_tensors="pt", **grid)  # [N, tiles, 3, H, W], the whole picture first
            made = {"pixel_values": found["pixel_values"] if self.base.tiles else found["pixel_values"][:, :1], "image_sizes": found["image_sizes"]}
        return {k: v.to(self.base.device, self.base.dtype if v.is_floating_point() else None) for k, v in made.items()}

    def _square(self, picture: Picture) -> Image.Image:
        processor = self.base.image_processor
        image = squared(read_image(picture), (1, 1, 1) if self.base.family.padding == "white" else processor.image_mean)
        side = side_of(self.base.llava.config) * (2 if self.base.tiles else 1)
        # Where the number of tokens follows the picture's size, every picture is made the same.
        return image.resize((side, side), Image.Resampling.BICUBIC) if self.base.tiles or not self.base.own_projector else image

    def raw(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The projector's input for each picture, in order; [N, tiles, tokens, width], no gradient.

        Of a model without a projector of its own, what its whole vision part says; [N, 1, tokens, width].
        """
        self.asked += len(pictures)
        fresh = list(dict.fromkeys(p for p in pictures if p not in self.cache))
        local: dict[Picture, torch.Tensor] = {}
        passes = math.ceil(len(fresh) / self.batch)
        idle = max(processes.gather(passes)) - passes if self.in_step else 0  # asked before any pass, which is a talk between processes too
        for start in range(0, len(fresh), self.batch):
            part = fresh[start : start + self.batch]
            local.update(zip(part, self._tower(part), strict=True))
        for _ in range(idle):
            self._tower([blank()])
        self.computed += len(fresh)
        rows = []
        for picture in pictures:
            if picture in local:
                rows.append(local[picture])
            else:
                self.cache.move_to_end(picture)
                rows.append(self.cache[picture])
        for picture, features in local.items():
            self._cache_features(picture, features)
        return torch.stack(rows)

    def patches(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """:meth:`raw` as one list of patches a picture, [N, tiles * tokens, width]: for comparing pictures without the language model."""
        return self.raw(pictures).flatten(1, 2)

    def projected(self, pictures: Sequence[Picture], noise: float = 0.0) -> dict[str, BaseModelOutputWithPooling]:
        """``mm_encoder_outputs`` for the model's forward. Without noise, each different picture passes the projector once.

        noise: Gaussian, in standard deviations of each feature over this batch. A tower that knows the training classes
        makes their episodes easier than a new class's will be; noise makes up for that.
        """
        if not pictures:
            return {}
        different = list(dict.fromkeys(pictures))
        if noise:  # each showing has noise of its own
            different = list(pictures)
        raw = self.raw(different)
        projector = self.base.llava.model.multi_modal_projector if self.base.own_projector else None
        raw = raw.to(self.base.dtype if projector is None else _weight_type(projector))
        if noise:
            raw = raw + noise * raw.std((0, 1, 2)) * torch.randn_like(raw)
        features = self._packed(raw if projector is None else projector(raw))
        if not noise:
            places = {picture: i for i, picture in enumerate(different)}
            features = features[torch.tensor([places[p] for p in pictures], device=features.device)]
        features = features.to(self.base.dtype)  # a trained projector is fp32, whatever the base is
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}  # type: ignore[arg-type]

    def idle(self) -> torch.Tensor:
        """Zero, by way of tower and projector, uncounted: for a batch of text alone, so that no process does without what the others run."""
        counted = self.asked, self.computed
        features = self.projected([blank()])["image"].pooler_output
        self.asked, self.computed = counted
        return 0.0 * torch.stack(features).sum()  # type: ignore[arg-type]

    def _packed(self, features: torch.Tensor) -> torch.Tensor:
        """[N, tiles, tokens, width] -> [N, tokens an image, width], with line breaks where the model has them."""
        llava = self.base.llava
        newline = getattr(llava.model, "image_newline", None)
        if newline is None:
            return features[:, 0]
        side = side_of(llava.config) * 2
        sizes = torch.tensor([[side, side]] * len(features))
        chosen = {"vision_feature_select_strategy": llava.config.vision_feature_select_strategy} if llava.config.model_type == "llava_next" else {}
        packed, _ = llava.model.pack_image_features(list(features), sizes, image_newline=newline, **chosen)
        return torch.stack(packed)

    @torch.no_grad()
    def _tower(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Run the model's own feature code up to the projector, so that no choice of layers is repeated here."""
        made = self.pixels(pictures)
        if not self.base.own_projector:
            return self._whole(made, len(pictures))

        def catch(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _CaughtError(inputs[0])

        pixels = made["pixel_values"]
        sizes = {"image_sizes": made["image_sizes"]} if "image_sizes" in made else {}
        # First of its hooks: DeepSpeed's would fetch weights that are not given back where the forward ends here.
        hook = self.base.llava.model.multi_modal_projector.register_forward_pre_hook(catch, prepend=True)
        try:
            self.base.llava.get_image_features(pixels.flatten(0, -4), return_dict=True, **sizes)
        except _CaughtError as caught:
            return caught.features.unflatten(0, (len(pictures), -1))
        finally:
            hook.remove()
        raise AssertionError("the model read no features")

    def _whole(self, made: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """A model whose vision part is one: what it says of each picture, [N, 1, tokens, width]."""
        known = inspect.signature(self.base.llava.model.get_image_features).parameters
        found = self.base.llava.get_image_features(**{k: v for k, v in made.items() if k in known}, return_dict=True).pooler_output
        stacked = torch.stack([f.reshape(-1, f.shape[-1]) for f in found])
        if len(stacked) != count:
            raise AssertionError(f"{count} pictures gave {len(stacked)} sets of features")
        return stacked[:, None]

    def _cache_features(self, picture: Picture, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        while self.cache and self.bytes + size > self.limit:
            _, dropped = self.cache.popitem(last=False)
            self.bytes -= dropped.numel() * dropped.element_size()
        if size <= self.limit:
            self.cache[replace(picture, data=None)] = features.clone()  # equal to it, without the file's bytes
            self.bytes += size
