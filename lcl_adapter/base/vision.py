"""Frozen vision features, computed once for each picture instead of once for each step.

The cache holds the projector's *input*: the tower is frozen, the projector may be trained. Pictures that are not in the
cache are read by a few threads and go through the tower in batches.

Shapes: N pictures, S tiles of a picture (1 where it is read whole), P tokens of a tile, C width of the tower,
T tokens that a picture occupies in the prompt, D width of the language model.
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
from lcl_adapter.base.families.chat_template import preprocess
from lcl_adapter.base.layouts.configs import NEXT, TILED_TYPES
from lcl_adapter.base.model import Base, side_of
from lcl_adapter.base.pooling import pool
from lcl_adapter.data.sources import Picture, read_image

BATCH = 32  # pictures that go through the tower at a time
MEANS = 20_000  # mean patches that are remembered, a few kB each


def _projector_type(projector: Any) -> torch.dtype:
    """The type that the projector computes in: its trained copy's, where it has one and that is switched on."""
    trained = getattr(projector, "modules_to_save", None)
    # An adapter that trains no projector may be active beside one that does
    active = [trained[name] for name in projector.active_adapters if name in trained] if trained else []
    if active and not projector.disable_adapters:
        projector = active[0]
    elif trained is not None:
        projector = projector.original_module
    dtype: torch.dtype = next(projector.parameters()).dtype
    return dtype


def squared(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Padded to a square with a colour, the image in the middle, as LLaVA-1.5 was trained (`image_aspect_ratio: pad`).

    Otherwise the processor would crop both ends and a defect near an edge, and boxes would refer to another square.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    page = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


@cache
def blank_picture() -> Picture:
    """A small grey picture, for a pass through the tower whose result is not used."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(png, "PNG")
    return Picture(Path("blank.png"), data=png.getvalue())


def _whole(picture: Picture) -> Picture:
    """The picture with all its tokens."""
    return picture if picture.tokens is None else replace(picture, tokens=None)


def _pooled(features_NTD: torch.Tensor, rows: Sequence[int], pictures: Sequence[Picture]) -> list[torch.Tensor]:
    """The features of each picture, pooled to its tokens. rows: the picture's place among the features."""
    features: list[torch.Tensor] = [features_NTD] * len(rows)
    for tokens in {picture.tokens for picture in pictures}:
        places = [place for place, picture in enumerate(pictures) if picture.tokens == tokens]
        chosen_NTD = features_NTD[torch.tensor([rows[place] for place in places], device=features_NTD.device)]
        for place, own_TD in zip(places, chosen_NTD if tokens is None else pool(chosen_NTD, tokens), strict=True):
            features[place] = own_TD
    return features


class _ProjectorReachedError(Exception):
    """Ends the model's own feature code at the projector, and carries the projector's input."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features


def read_side(base: Base) -> int:
    """Pixels of the longer side that a base reads of a picture: two tiles have twice as many as one."""
    return side_of(base.llava.config) * (2 if base.tiles else 1)


class VisionFeatures:
    """Features of pictures, cached up to ``limit`` bytes. The least recently used picture is dropped first.

    The cache is in main memory, pinned where the model is on CUDA, so that a GPU holds only the features in use.

    ``requested`` counts pictures that features were requested of, ``computed`` those that went through the tower.
    """

    def __init__(self, base: Base, limit: int = 10**9, batch: int = BATCH, synchronised: bool = False) -> None:
        """batch: pictures that go through the tower at a time. limit: of the cache, in bytes.

        synchronised: each process holds a part of the tower, so all run it together.
        """
        self.base = base
        self.synchronised = synchronised
        self.limit = limit
        self.batch = batch
        self.cache: OrderedDict[Picture, torch.Tensor] = OrderedDict()
        self.bytes = 0
        self._means: dict[Picture, torch.Tensor] = {}
        self.requested = self.computed = 0

    def pixels(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """Arguments of the model's ``get_image_features``, from the base's own image processor.

        Pictures are padded to a square first. Raises DataError for a broken picture.
        """
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(self._square, pictures))
        processor, config = self.base.image_processor, self.base.llava.config
        if not self.base.own_projector:
            arguments = {k: v for k, v in preprocess(processor, images).items() if isinstance(v, torch.Tensor)}
        elif config.model_type not in TILED_TYPES:
            arguments = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        else:
            side = side_of(config)
            grid = {} if self.base.tiles else {"image_grid_pinpoints": [[side, side]]}
            processed = processor(images, return_tensors="pt", **grid)
            pixels_NS3HW = processed["pixel_values"]  # the whole picture is the first tile
            arguments = {"pixel_values": pixels_NS3HW if self.base.tiles else pixels_NS3HW[:, :1], "image_sizes": processed["image_sizes"]}
        return {k: v.to(self.base.device, self.base.dtype if v.is_floating_point() else None) for k, v in arguments.items()}

    def _square(self, picture: Picture) -> Image.Image:
        processor = self.base.image_processor
        side = read_side(self.base)
        image = squared(read_image(picture, side), (1, 1, 1) if self.base.family.padding == "white" else processor.image_mean)
        # Where the number of tokens depends on the picture's size, all pictures are resized to the same size.
        return image.resize((side, side), Image.Resampling.BICUBIC) if self.base.tiles or not self.base.own_projector else image

    def tower_features(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The projector's input for each picture, in order: [N, S, P, C], without gradient. Blends are mixed here.

        For a model without a projector of its own: the output of its whole vision part, [N, 1, P, D].
        """
        pictures = [_whole(picture) for picture in pictures]
        blends = [(row, *picture.blend) for row, picture in enumerate(pictures) if picture.blend is not None]
        if not blends:
            return self._unblended_features(pictures)
        features = self._unblended_features([*(replace(picture, blend=None) for picture in pictures), *(partner for _, partner, _ in blends)])
        features_NSPC, partners_BSPC = features[: len(pictures)], features[len(pictures) :]
        rows_B = torch.tensor([row for row, _, _ in blends], device=features.device)
        weights_B111 = torch.tensor([weight for *_, weight in blends], device=features.device, dtype=features.dtype)[:, None, None, None]
        return features_NSPC.index_copy(0, rows_B, (1 - weights_B111) * features_NSPC[rows_B] + weights_B111 * partners_BSPC)

    def _unblended_features(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """:meth:`tower_features` of pictures that are no blends, through the cache."""
        self.requested += len(pictures)
        missing = list(dict.fromkeys(p for p in pictures if p not in self.cache))
        computed: dict[Picture, torch.Tensor] = {}
        passes = math.ceil(len(missing) / self.batch)
        # Before any pass, because a pass communicates between processes too.
        extra_passes = max(processes.gather(passes)) - passes if self.synchronised else 0
        for start in range(0, len(missing), self.batch):
            batch = missing[start : start + self.batch]
            computed.update(zip(batch, self._run_tower(batch), strict=True))
        for _ in range(extra_passes):
            self._run_tower([blank_picture()])
        self.computed += len(missing)
        features = []
        for picture in pictures:
            if picture in computed:
                features.append(computed[picture])
            else:
                self.cache.move_to_end(picture)
                features.append(self.cache[picture].to(self.base.device, non_blocking=True))
        for picture, features_SPC in computed.items():
            self._add_to_cache(picture, features_SPC)
        return torch.stack(features)

    @torch.inference_mode()
    def mean_patches(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Each picture's mean patch in fp32, [N, C], on the CPU. It is remembered when the picture's features are dropped.

        Raises DataError for a broken picture.
        """
        wanted = [_whole(picture) for picture in pictures]
        means = {picture: self._means[picture] for picture in wanted if picture in self._means}
        missing = list(dict.fromkeys(picture for picture in wanted if picture not in means))
        for start in range(0, len(missing), BATCH):
            chunk = missing[start : start + BATCH]
            means.update(zip(chunk, self.patches(chunk).float().mean(1).cpu(), strict=True))
        for picture in missing:
            if len(self._means) >= MEANS:
                self._means.pop(next(iter(self._means)))
            self._means[replace(picture, data=None)] = means[picture]
        return torch.stack([means[picture] for picture in wanted])

    def patches(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """:meth:`tower_features` with a picture's tiles joined, [N, S * P, C]: compares pictures by the tower only."""
        return self.tower_features(pictures).flatten(1, 2)

    def projected_features(self, pictures: Sequence[Picture], noise: float = 0.0) -> dict[str, BaseModelOutputWithPooling]:
        """``mm_encoder_outputs`` for the model's forward: [T, D] for each picture, fewer tokens where it is pooled.

        Without noise, each distinct picture is projected once.

        noise: Gaussian, in standard deviations of each feature over this batch. A tower that knows the training classes
        makes their episodes easier than those of a new class; noise compensates for that.
        """
        if not pictures:
            return {}
        # With noise, each occurrence of a picture gets noise of its own.
        inputs = list(pictures) if noise else list(dict.fromkeys(map(_whole, pictures)))
        features_NSPC = self.tower_features(inputs)
        projector = self.base.llava.model.multi_modal_projector if self.base.own_projector else None
        features_NSPC = features_NSPC.to(self.base.dtype if projector is None else _projector_type(projector))
        if noise:
            features_NSPC = features_NSPC + noise * features_NSPC.std((0, 1, 2)) * torch.randn_like(features_NSPC)
        features_NTD = self._join_tiles(features_NSPC if projector is None else projector(features_NSPC))
        row_of = {picture: row for row, picture in enumerate(inputs)}
        rows = list(range(len(pictures))) if noise else [row_of[_whole(picture)] for picture in pictures]
        features = [f.to(self.base.dtype) for f in _pooled(features_NTD, rows, pictures)]  # a trained projector is in fp32, whatever the base is in
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]

    def zero_term(self) -> torch.Tensor:
        """A scalar 0 that depends on tower and projector, for a batch without pictures.

        Each process then runs the same modules as those that have pictures. The pass is not counted.
        """
        counters = self.requested, self.computed
        features = self.projected_features([blank_picture()])["image"].pooler_output
        self.requested, self.computed = counters
        return 0.0 * torch.stack(features).sum()  # type: ignore[arg-type]

    def _join_tiles(self, features_NSPD: torch.Tensor) -> torch.Tensor:
        """[N, S, P, D] -> [N, T, D], with line-break vectors where the model has them."""
        llava = self.base.llava
        newline = getattr(llava.model, "image_newline", None)
        if newline is None:
            return features_NSPD[:, 0]
        side = side_of(llava.config) * 2
        sizes_N2 = torch.tensor([[side, side]] * len(features_NSPD))
        strategy = {"vision_feature_select_strategy": llava.config.vision_feature_select_strategy} if llava.config.model_type == NEXT else {}
        features, _ = llava.model.pack_image_features(list(features_NSPD), sizes_N2, image_newline=newline, **strategy)
        return torch.stack(features)

    @torch.no_grad()
    def _run_tower(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """[N, S, P, C] from the model's own feature code, which includes its choice of layers, up to the projector."""
        arguments = self.pixels(pictures)
        if not self.base.own_projector:
            return self._run_vision_part(arguments, len(pictures))

        def stop(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _ProjectorReachedError(inputs[0])

        pixels = arguments["pixel_values"]  # [N, 3, H, W], or [N, S, 3, H, W]
        sizes = {"image_sizes": arguments["image_sizes"]} if "image_sizes" in arguments else {}
        # First among the hooks: DeepSpeed's would gather weights that are not released when the forward ends here.
        hook = self.base.llava.model.multi_modal_projector.register_forward_pre_hook(stop, prepend=True)
        try:
            self.base.llava.get_image_features(pixels.flatten(0, -4), return_dict=True, **sizes)
        except _ProjectorReachedError as reached:
            return reached.features.unflatten(0, (len(pictures), -1))
        finally:
            hook.remove()
        raise AssertionError("the model's feature code never called the projector")

    def _run_vision_part(self, arguments: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """[N, 1, P, D] from a model whose vision part includes the projector."""
        accepted = inspect.signature(self.base.llava.model.get_image_features).parameters
        arguments = {name: value for name, value in arguments.items() if name in accepted}
        outputs = self.base.llava.get_image_features(**arguments, return_dict=True).pooler_output
        features_NPD = torch.stack([output.reshape(-1, output.shape[-1]) for output in outputs])
        if len(features_NPD) != count:
            raise AssertionError(f"{count} pictures gave {len(features_NPD)} sets of features")
        return features_NPD[:, None]

    def _add_to_cache(self, picture: Picture, features_SPC: torch.Tensor) -> None:
        size = self._size(features_SPC)
        while self.cache and self.bytes + size > self.limit:
            _, dropped = self.cache.popitem(last=False)
            self.bytes -= self._size(dropped)
        if size <= self.limit:
            # A key equal to the picture, without the file's bytes
            self.cache[replace(picture, data=None)] = self._in_main_memory(features_SPC)
            self.bytes += size

    def _size(self, features_SPC: torch.Tensor) -> int:
        """Bytes that a picture takes in the cache. torch rounds a pinned allocation up to a power of two."""
        size = features_SPC.numel() * features_SPC.element_size()
        return 1 << (size - 1).bit_length() if self.base.device.type == "cuda" else size

    def _in_main_memory(self, features_SPC: torch.Tensor) -> torch.Tensor:
        """A copy; of features on CUDA a pinned one, from which a copy back does not wait."""
        if self.base.device.type != "cuda":
            return features_SPC.detach().to("cpu", copy=True)
        pinned = torch.empty(features_SPC.shape, dtype=features_SPC.dtype, pin_memory=True)
        return pinned.copy_(features_SPC)
