"""EfficientNet-Lite as a vision tower of transformers, with batch norms folded into the convolutions.

Architecture: tensorflow/tpu, models/official/efficientnet/lite (Apache-2.0): MBConv blocks with ReLU6 and TensorFlow's
"SAME" padding, no squeeze-and-excite; the stem, the head and the repeats of the first and last stage are not scaled.

A picture's tokens are one for its name and one for each cell, its keys. In its name's token stand the tower's class
probabilities, which the projector turns into the language model's own words. In a key stand the standardised class logits
of a cell, which the projector turns into directions of those words, and the standardised features, by which pictures are
compared without a language model.

Shapes: N pictures, G cells a side, C channels, K classes, H = 2 K + C width of the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SCALES = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260)}  # variant -> width, depth, side in pixels
STAGES = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, FEATURES, CLASSES = 32, 1280, 1000
NORM_EPSILON = 1e-3


class EfficientNetLiteConfig(PreTrainedConfig):
    """The tower's config.

    variant: 0, 1 or 2. grid: cells a side; a picture has 1 + grid x grid tokens. softmax_temperature: divides the class logits
    before the softmax of the name's token.
    """

    model_type = "efficientnet_lite"

    def __init__(self, variant: int = 0, grid: int = 1, softmax_temperature: float = 1.0, initializer_range: float = 0.02, **kwargs: Any) -> None:
        self.variant = variant
        self.grid = grid
        self.softmax_temperature = softmax_temperature
        self.initializer_range = initializer_range
        self.image_size = kwargs.pop("image_size", None) or SCALES[variant][2]
        self.patch_size = kwargs.pop("patch_size", None) or self.image_size // grid  # of a token, for LLaVA's counting
        self.hidden_size = 2 * CLASSES + FEATURES
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)


def scaled_channels(channels: int, width: float) -> int:
    """Channels of a stage, rounded to a multiple of 8 and by at most a tenth downwards, as upstream does."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


class SamePadConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: an odd remainder goes right and below."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if rows % 2 == 0 and columns % 2 == 0:
            return functional.conv2d(x, self.weight, self.bias, self.stride, (rows // 2, columns // 2), 1, self.groups)
        x = functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Block(nn.Module):
    """MBConv: expand, depthwise, project, with a residual where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = SamePadConv(channels_in, inner, 1) if expansion > 1 else None
        self.depthwise = SamePadConv(inner, inner, kernel, stride, groups=inner)
        self.project = SamePadConv(inner, channels_out, 1)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else functional.relu6(self.expand(x))
        y = self.project(functional.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite(PreTrainedModel):
    """The tower. Its output is ``[N, 1 + G * G, H]``: class probabilities, standardised logits, standardised features."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it has no attention, so any kind will do

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        width, depth, _ = SCALES[config.variant]
        self.stem = SamePadConv(3, STEM, 3, 2)
        blocks, channels = [], STEM
        for number, (repeats, kernel, stride, expansion, out) in enumerate(STAGES):
            edge = number in (0, len(STAGES) - 1)
            for repeat in range(repeats if edge else math.ceil(repeats * depth)):
                blocks.append(Block(channels, scaled_channels(out, width), kernel, stride if repeat == 0 else 1, expansion))
                channels = scaled_channels(out, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = SamePadConv(channels, FEATURES, 1)
        self.classifier = nn.Linear(FEATURES, CLASSES)
        # Over training pictures
        self.feature_mean = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.feature_deviation = nn.Parameter(torch.ones(FEATURES), requires_grad=False)
        self.logit_mean = nn.Parameter(torch.zeros(CLASSES), requires_grad=False)
        self.logit_deviation = nn.Parameter(torch.ones(CLASSES), requires_grad=False)
        self.post_init()

    def feature_map(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        """The features of every place, ``[N, C, H / 32, W / 32]``."""
        x = functional.relu6(self.stem(pixels_N3HW.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return functional.relu6(self.head(x))

    def tokens(self, cells_NGC: torch.Tensor) -> torch.Tensor:
        """The tokens of pictures by the features of their cells, ``[N, G * G, C]`` -> ``[N, 1 + G * G, H]``."""
        probabilities_N1K = (self.classifier(cells_NGC.mean(1, keepdim=True)) / self.config.softmax_temperature).softmax(-1)
        # Of unit length on average, so that the features decide where pictures are compared
        logits_NGK = (self.classifier(cells_NGC) - self.logit_mean) / self.logit_deviation / math.sqrt(CLASSES)
        features_NGC = (cells_NGC - self.feature_mean) / self.feature_deviation
        name_N1H = functional.pad(probabilities_N1K, (0, CLASSES + FEATURES))
        keys_NGH = functional.pad(torch.cat([logits_NGK, features_NGC], -1), (CLASSES, 0))
        return torch.cat([name_N1H, keys_NGH], 1)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """pixel_values: ``[N, 3, H, W]``, (value - 127) / 128."""
        cells_NCGG = functional.adaptive_avg_pool2d(self.feature_map(pixel_values), self.config.grid)
        tokens_NTH = self.tokens(cells_NCGG.flatten(2).transpose(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=tokens_NTH, pooler_output=tokens_NTH.mean(1), hidden_states=(tokens_NTH,))  # type: ignore[arg-type]


def folded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published weights under this module's names, with each batch norm folded into the convolution before it.

    Raises KeyError where the weights are not an EfficientNet-Lite's.
    """
    names = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project", "_conv_stem": "stem", "_conv_head": "head"}
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    result = {"classifier.weight": weights["_fc.weight"], "classifier.bias": weights["_fc.bias"]}
    for key, weight in weights.items():
        path, _, conv = key.removesuffix(".weight").rpartition(".")
        if conv not in names:
            continue
        norm = f"{path}.{norms[conv]}".lstrip(".")
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPSILON).sqrt()
        ours = f"{path.replace('_blocks', 'blocks')}.{names[conv]}".lstrip(".")
        result[f"{ours}.weight"] = weight * scale[:, None, None, None]
        result[f"{ours}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return result
