"""The pocket base's vision tower: a small CLIP-style ViT that learns which drawings show the same thing.

Supervised contrastive training (Khosla et al., arXiv 2004.11362) on the batch-normalised mean patch token of training
classes only. 40 % of the batches come from few subcategories, so that near things are told apart. No flips: a hand that
points left is another emoji than one that points right.
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

from tools.pocket import drawings

PIXEL_MEAN, PIXEL_STD = 0.8, 0.3  # most of an emoji's pixels are white paper


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
    """Random weights, except that positions start as sines and cosines of row and column."""
    tower = CLIPVisionModel(config)
    side, dim = config.image_size // config.patch_size, config.hidden_size // 2

    def waves(position: np.ndarray) -> np.ndarray:
        angles = np.outer(position * 1.5, 100.0 ** (-np.arange(dim // 2) / (dim / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    rows, columns = np.mgrid[:side, :side]
    table = np.concatenate([waves(rows.ravel()), waves(columns.ravel())], 1) * 0.3
    with torch.no_grad():
        tower.get_parameter("embeddings.position_embedding.weight")[1:] = torch.tensor(table, dtype=torch.float32)
    return tower


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotation, scale, shear, shift, colour, noise and cut-out. uint8 [B, 3, H, W] -> normalised float [B, 3, H, W]."""
    batch, height = pixels.shape[0], pixels.shape[2]

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def spread(width: float, *shape: int) -> torch.Tensor:
        return (rand(*shape) - 0.5) * 2 * width

    x = pixels.float() / 255
    turn = spread(0.3, batch)
    scale = (1 + spread(0.2, batch, 2)) * torch.exp(spread(0.25, batch, 1))
    shear, shift = spread(0.15, batch), spread(0.125, batch, 2)
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack(
        [
            torch.stack([cos * scale[:, 0], -sin * scale[:, 0] + shear, shift[:, 0]], 1),
            torch.stack([sin * scale[:, 1], cos * scale[:, 1], shift[:, 1]], 1),
        ],
        1,
    )
    grid = functional.affine_grid(matrix, list(x.shape), align_corners=False)
    x = 1 - functional.grid_sample(1 - x, grid, align_corners=False, mode="bilinear")  # white outside
    grey = x.mean(1, keepdim=True)
    saturation = 1 + spread(0.5, batch, 1, 1, 1)
    saturation = torch.where(rand(batch, 1, 1, 1) < 0.15, torch.zeros_like(saturation), saturation)
    x = grey + (x - grey) * saturation
    x = x * (1 + spread(0.15, batch, 3, 1, 1))
    x = (x - 0.5) * (1 + spread(0.25, batch, 1, 1, 1)) + 0.5 + spread(0.1, batch, 1, 1, 1)
    x = x + torch.randn(x.shape, generator=generator) * (rand(batch, 1, 1, 1) * 0.06)
    centre = torch.randint(0, height, (2, batch, 1, 1, 1), generator=generator)
    half = torch.randint(4, 12, (batch, 1, 1, 1), generator=generator)
    ruler = torch.arange(height)
    inside = ((ruler.view(1, 1, -1, 1) - centre[0]).abs() < half) & ((ruler.view(1, 1, 1, -1) - centre[1]).abs() < half)
    x = torch.where(inside & (rand(batch, 1, 1, 1) < 0.4), rand(batch, 3, 1, 1), x)
    return (x.clamp(0, 1) - PIXEL_MEAN) / PIXEL_STD


def class_batches(groups: dict[str, list[str]], rng: np.random.Generator, classes: int, hard: float) -> Iterator[list[str]]:
    """Class ids of one batch after another; a share ``hard`` of the batches is drawn from few subcategories."""
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


def contrastive_loss(vectors: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Supervised contrastive loss over one batch. ``vectors`` [B, D] (any length), ``labels`` [B]."""
    unit = functional.normalize(functional.batch_norm(vectors, None, None, training=True), dim=1)
    scores = unit @ unit.T / temperature
    itself = torch.eye(len(scores), dtype=torch.bool)
    scores = scores.masked_fill(itself, -1e9)
    same = (labels[:, None] == labels[None, :]) & ~itself
    return -(scores.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()


def train(
    work: Path,
    data: Path,
    steps: int = 6000,
    classes: int = 32,
    drawings_a_class: int = 3,
    rate: float = 5e-4,
    seed: int = 0,
    name: str = "tower",
    **shape: int,
) -> Path:
    """Train on the training classes; save a checkpoint every 500 steps and go on from it. Returns the tower's folder."""
    out = work / name
    if (out / "done").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    records = {r["id"]: r for r in json.loads((data / "classes.json").read_text())}
    pixels, ids, sets = drawings.load_work(work / "drawings.npz")
    where: dict[str, list[int]] = defaultdict(list)
    for index, (class_id, _) in enumerate(zip(ids, sets, strict=True)):
        if class_id in records and records[class_id]["split"] == "train":
            where[class_id].append(index)
    groups: dict[str, list[str]] = defaultdict(list)
    for class_id in where:
        groups[f"{records[class_id]['kind']}/{records[class_id]['subcategory']}"].append(class_id)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

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
        kept: dict[str, Any] = torch.load(state, weights_only=True)
        tower.load_state_dict(kept["tower"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        start = kept["step"]
    began = time.monotonic()
    running = 0.0
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])  # a resumed run draws what the uninterrupted one would
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = next(class_batches(groups, rng, classes, hard=0.4))
        rows = [rng.choice(where[c], drawings_a_class, replace=len(where[c]) < drawings_a_class) for c in chosen]
        labels = torch.arange(len(chosen)).repeat_interleave(drawings_a_class)
        batch = augment(images[torch.from_numpy(np.concatenate(rows))], generator)
        features = tower(pixel_values=batch).last_hidden_state[:, 1:].mean(1)
        loss = contrastive_loss(features, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item() if step > start else loss.item()
        if (step + 1) % 250 == 0:
            print(f"tower step {step + 1}/{steps} loss {running:.3f} ({time.monotonic() - began:.0f} s)", flush=True)
        if (step + 1) % 500 == 0:
            partial = state.with_suffix(".partial")
            torch.save(
                {"tower": tower.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}, partial
            )
            partial.rename(state)
    tower.save_pretrained(out)
    (out / "done").touch()
    return out


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, pixels: np.ndarray, batch: int = 256) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> the last layer's patch tokens, float32 [N, tokens, hidden]."""
    tower.eval()
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    return torch.cat([tower(pixel_values=part).last_hidden_state[:, 1:] for part in images.split(batch)])
