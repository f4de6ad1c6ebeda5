"""Fewer tokens for the pictures of a support set: means over square blocks of a picture's grid of patches.

A grid of 24 x 24 becomes 12 x 12, 8 x 8 and so on down to one token, for every divisor of its side. There is no new weight.
The blocks of a smaller grid are joined blocks of a larger one where its side divides the larger side (Matryoshka multimodal
models, arXiv 2405.17430).

Shapes: N pictures, T tokens of a picture, G tokens of a pooled picture, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lcl_adapter.base.layouts.configs import LLAVA_TYPES, TILED_TYPES
from lcl_adapter.errors import ModelError


def reason_against(config: Any, tokens_an_image: int, tiles: bool = False) -> str | None:
    """Why the pictures of this base cannot be pooled; None where they are a square grid of patches behind a projector."""
    kind = config.model_type
    if kind not in LLAVA_TYPES:
        return f"a {kind!r} model has no projector of its own, and its grid of patches has positions or marks that belong to its size"
    if kind in TILED_TYPES:
        return f"a {kind!r} model {'cuts pictures into tiles' if tiles else 'is made for tiles'}, with a line-break vector among the patches"
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if tokens_an_image != side * side or side < 2:
        return f"the {tokens_an_image} tokens of its pictures are no square grid of patches"
    return None


def sizes_of(tokens_an_image: int) -> list[int]:
    """The numbers of tokens that a square grid can be pooled to, the whole grid first."""
    side = math.isqrt(tokens_an_image)
    return [(side // block) ** 2 for block in range(1, side + 1) if side % block == 0]


def support_tokens(config: Any, tokens_an_image: int, asked: int | None, tiles: bool, name: object) -> int | None:
    """The tokens of a support picture; None where it has all of them.

    asked: None if nothing was asked for. name: of the base, for errors.
    Raises ModelError where the base's pictures cannot be pooled, or not to this number.
    """
    if asked is None or asked == tokens_an_image:
        return None
    if reason := reason_against(config, tokens_an_image, tiles):
        raise ModelError(
            f"base {name}: support pictures of {asked} tokens are not possible: {reason}. Leave out `image_tokens.support` or --support-tokens, "
            "or use a LLaVA-1.5."
        )
    sizes = sizes_of(tokens_an_image)
    if asked not in sizes:
        side = math.isqrt(tokens_an_image)
        listed = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
        raise ModelError(
            f"base {name}: support pictures of {asked} tokens are not possible. A picture is a grid of {side} x {side}, which can be pooled to "
            f"{listed} tokens: set `image_tokens.support` or --support-tokens to one of these."
        )
    return asked


def pool(features_NTD: torch.Tensor, tokens: int) -> torch.Tensor:
    """[N, T, D] -> [N, G, D]: the mean of each block. T and G are squares, and the side of G divides that of T."""
    side, pooled_side = math.isqrt(features_NTD.shape[1]), math.isqrt(tokens)
    blocks = features_NTD.unflatten(1, (pooled_side, side // pooled_side, pooled_side, side // pooled_side))
    return blocks.mean((2, 4)).flatten(1, 2)
