"""The pocket base's vision tower: a small CLIP-style ViT that learns which drawings show the same thing.

It is trained with the supervised contrastive loss (Khosla et al., arXiv 2004.11362) on the batch-normalised mean patch
token, on training classes only. 40 % of the batches come from few subcategories, so that it learns to separate similar
things. Images are never flipped: a hand that points left is another emoji than a hand that points right.

Shapes: B images in a batch, N images, H and W pixels, P patches of an image, C width of the tower.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from lcl_adapter.files import whole_file
from tools.pocket import drawings

PIXEL_MEAN, PIXEL_STD = 0.8, 0.3  # most pixels of an emoji are white


def tower_config(hidden: int = 256, layers: int = 4, patch: int = 21) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        image_size=drawings.SIZE,
        patch_size=patch,
        hidden_act="gelu",
        attention_dropout=0.0,
        initializer_factor=1.0,
    )


def new_tower(config: CLIPVisionConfig) -> CLIPVisionModel:
    """A tower with random weights, except that its position embeddings start as sines and cosines of row and column."""
    tower = CLIPVisionModel(config)
    side, dim = config.image_size // config.patch_size, config.hidden_size // 2

    def sinusoids(position: np.ndarray) -> np.ndarray:
        angles = np.outer(position * 1.5, 100.0 ** (-np.arange(dim // 2) / (dim / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    rows, columns = np.mgrid[:side, :side]
    table = np.concatenate([sinusoids(rows.ravel()), sinusoids(columns.ravel())], 1) * 0.3
    with torch.no_grad():
        tower.get_parameter("embeddings.position_embedding.weight")[1:] = torch.tensor(table, dtype=torch.float32)
    return tower


def augment(pixels_B3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rotation, scale, shear, shift, colour, noise and cut-out.

    uint8 [B, 3, H, W] -> normalised float [B, 3, H, W].
    """
    batch, height = pixels_B3HW.shape[0], pixels_B3HW.shape[2]

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def symmetric(width: float, *shape: int) -> torch.Tensor:
        """Uniform between -width and width."""
        return (rand(*shape) - 0.5) * 2 * width

    x_B3HW = pixels_B3HW.float() / 255
    angle_B = symmetric(0.3, batch)
    scale_B2 = (1 + symmetric(0.2, batch, 2)) * torch.exp(symmetric(0.25, batch, 1))
    shear_B, shift_B2 = symmetric(0.15, batch), symmetric(0.125, batch, 2)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    matrix_B23 = torch.stack(
        [
            torch.stack([cos_B * scale_B2[:, 0], -sin_B * scale_B2[:, 0] + shear_B, shift_B2[:, 0]], 1),
            torch.stack([sin_B * scale_B2[:, 1], cos_B * scale_B2[:, 1], shift_B2[:, 1]], 1),
        ],
        1,
    )
    grid_BHW2 = functional.affine_grid(matrix_B23, list(x_B3HW.shape), align_corners=False)
    x_B3HW = 1 - functional.grid_sample(1 - x_B3HW, grid_BHW2, align_corners=False, mode="bilinear")  # white outside the image
    grey_B1HW = x_B3HW.mean(1, keepdim=True)
    saturation_B111 = 1 + symmetric(0.5, batch, 1, 1, 1)
    saturation_B111 = torch.where(rand(batch, 1, 1, 1) < 0.15, torch.zeros_like(saturation_B111), saturation_B111)
    x_B3HW = grey_B1HW + (x_B3HW - grey_B1HW) * saturation_B111
    x_B3HW = x_B3HW * (1 + symmetric(0.15, batch, 3, 1, 1))
    x_B3HW = (x_B3HW - 0.5) * (1 + symmetric(0.25, batch, 1, 1, 1)) + 0.5 + symmetric(0.1, batch, 1, 1, 1)
    x_B3HW = x_B3HW + torch.randn(x_B3HW.shape, generator=generator) * (rand(batch, 1, 1, 1) * 0.06)
    centre_2B111 = torch.randint(0, height, (2, batch, 1, 1, 1), generator=generator)
    half_B111 = torch.randint(4, 12, (batch, 1, 1, 1), generator=generator)
    ruler = torch.arange(height)
    rows_inside = (ruler.view(1, 1, -1, 1) - centre_2B111[0]).abs() < half_B111
    columns_inside = (ruler.view(1, 1, 1, -1) - centre_2B111[1]).abs() < half_B111
    cut_B1HW = rows_inside & columns_inside & (rand(batch, 1, 1, 1) < 0.4)
    x_B3HW = torch.where(cut_B1HW, rand(batch, 3, 1, 1), x_B3HW)
    return (x_B3HW.clamp(0, 1) - PIXEL_MEAN) / PIXEL_STD


def class_batches(groups: dict[str, list[str]], rng: np.random.Generator, classes: int, hard: float) -> Iterator[list[str]]:
    """Yields the class ids of one batch after another. A share ``hard`` of the batches is drawn from few subcategories.

    groups: subcategory -> its class ids.
    """
    everything = [c for members in groups.values() for c in members]
    names = sorted(groups)
    while True:
        if rng.random() < hard:
            chosen: list[str] = []
            for name in rng.permutation(names):
                chosen += list(rng.permutation(groups[name]))[:16]
                if len(chosen) >= classes:
                    break
            yield chosen[:classes]
        else:
            yield list(rng.choice(everything, classes, replace=False))


def contrastive_loss(vectors_BC: torch.Tensor, labels_B: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Supervised contrastive loss over one batch. The vectors may have any length."""
    unit_BC = functional.normalize(functional.batch_norm(vectors_BC, None, None, training=True), dim=1)
    scores_BB = unit_BC @ unit_BC.T / temperature
    diagonal_BB = torch.eye(len(scores_BB), dtype=torch.bool)
    scores_BB = scores_BB.masked_fill(diagonal_BB, -1e9)
    same_BB = (labels_B[:, None] == labels_B[None, :]) & ~diagonal_BB
    return -(scores_BB.log_softmax(1) * same_BB).sum(1).div(same_BB.sum(1)).mean()


def train(
    work: Path,
    data: Path,
    steps: int = 6000,
    classes: int = 32,
    drawings_per_class: int = 3,
    rate: float = 5e-4,
    seed: int = 0,
    name: str = "tower",
    **shape: int,
) -> Path:
    """Train on the training classes. Returns the tower's folder.

    A checkpoint is saved every 500 steps, and training continues from it. shape: options of :func:`tower_config`.
    """
    out = work / name
    if (out / "done").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    records = {r["id"]: r for r in json.loads((data / "classes.json").read_text())}
    pixels, ids, sets = drawings.load_work(work / "drawings.npz")
    drawings_of: dict[str, list[int]] = defaultdict(list)  # class id -> indices into ``pixels``
    for index, (class_id, _) in enumerate(zip(ids, sets, strict=True)):
        if class_id in records and records[class_id]["split"] == "train":
            drawings_of[class_id].append(index)
    groups: dict[str, list[str]] = defaultdict(list)
    for class_id in drawings_of:
        groups[f"{records[class_id]['kind']}/{records[class_id]['subcategory']}"].append(class_id)
    images_N3HW = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    torch.manual_seed(seed)
    tower = new_tower(tower_config(**shape))
    matrices = [p for p in tower.parameters() if p.ndim > 1]
    vectors = [p for p in tower.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05, div_factor=20, final_div_factor=50)
    start, state = 0, out / "state.pt"
    if state.exists():
        saved: dict[str, Any] = torch.load(state, weights_only=True)
        tower.load_state_dict(saved["tower"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    began = time.monotonic()
    running = 0.0
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])  # so that a resumed run draws the same batches
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = next(class_batches(groups, rng, classes, hard=0.4))
        rows = [rng.choice(drawings_of[c], drawings_per_class, replace=len(drawings_of[c]) < drawings_per_class) for c in chosen]
        labels_B = torch.arange(len(chosen)).repeat_interleave(drawings_per_class)
        batch_B3HW = augment(images_N3HW[torch.from_numpy(np.concatenate(rows))], generator)
        features_BC = tower(pixel_values=batch_B3HW).last_hidden_state[:, 1:].mean(1)
        loss = contrastive_loss(features_BC, labels_B)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item() if step > start else loss.item()
        if (step + 1) % 250 == 0:
            print(f"tower step {step + 1}/{steps} loss {running:.3f} ({time.monotonic() - began:.0f} s)", flush=True)
        if (step + 1) % 500 == 0:
            parts = {"tower": tower.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
            with whole_file(state) as partial:
                torch.save(parts, partial)
    tower.save_pretrained(out)
    (out / "done").touch()
    return out


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, pixels: np.ndarray, batch: int = 256) -> torch.Tensor:
    """The last layer's patch tokens: uint8 [N, H, W, 3] -> float32 [N, P, C]."""
    tower.eval()
    images_N3HW = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    return torch.cat([tower(pixel_values=part).last_hidden_state[:, 1:] for part in images_N3HW.split(batch)])
