"""Figures that others published, shown beside ours if the protocol is the same.

They are marked as published, not as measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Figures = tuple[tuple[str, float], ...]

# Link-Context Learning (arXiv 2308.07891), its tables of accuracy by the number of support images, of both classes
# together.
SUPPORT_IMAGES = (0, 2, 4, 6, 8, 10, 12, 14, 16)
IMAGENET_100 = {
    "OpenFlamingo": (0.00, 0.41, 0.62, 0.72, 0.75, 0.77, 0.78, 0.73, 0.72),
    "Shikra": (0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "LCL 2way-random": (0.00, 0.77, 0.78, 0.77, 0.79, 0.77, 0.77, 0.77, 0.75),
    "LCL 2way-weight": (0.00, 0.69, 0.71, 0.72, 0.76, 0.77, 0.78, 0.78, 0.79),
    "LCL mix": (0.16, 0.73, 0.78, 0.83, 0.73, 0.71, 0.72, 0.65, 0.57),
}
ISEKAI = {
    "isekai-10": {
        "OpenFlamingo": (None, 0.46, 0.44, 0.46, 0.48, 0.50, 0.50, 0.48, 0.46),
        "LCL mix": (None, 0.68, 0.70, 0.73, 0.69, 0.63, 0.62, 0.65, 0.62),
    },
    "isekai-pair": {
        "OpenFlamingo": (None, 0.19, 0.34, 0.38, 0.39, 0.41, 0.40, 0.40, 0.40),
        "LCL 2way-random": (None, 0.43, 0.46, 0.47, 0.48, 0.48, 0.49, 0.49, 0.49),
    },
}
# Image AUROC by the number of good references: WinCLIP (arXiv 2303.14814), PatchCore as reported there, AnomalyGPT
# (arXiv 2308.15366).
INSPECTION = {
    "mvtec": {
        0: (("WinCLIP", 0.918),),
        1: (("PatchCore", 0.834), ("WinCLIP+", 0.931), ("AnomalyGPT", 0.941)),
        4: (("PatchCore", 0.888), ("WinCLIP+", 0.952), ("AnomalyGPT", 0.963)),
    },
    "visa": {
        0: (("WinCLIP", 0.781),),
        1: (("PatchCore", 0.799), ("WinCLIP+", 0.838), ("AnomalyGPT", 0.874)),
        4: (("PatchCore", 0.853), ("WinCLIP+", 0.873), ("AnomalyGPT", 0.906)),
    },
}
# VQAv2 dev accuracy.
POPE: Figures = (("LLaVA-1.5-7B (F1, mean of the three files)", 0.859), ("LLaVA-1.5-7B LoRA (the same)", 0.864))
VQAV2: Figures = (("LLaVA-1.5-7B", 0.785), ("LLaVA-1.5-7B LoRA", 0.791), ("Shikra-13B", 0.773), ("LCL mix 7B", 0.751))


def imagenet_100(shots_per_class: int) -> Figures:
    return _column(IMAGENET_100, shots_per_class)


def isekai(name: str | None, shots_per_class: int) -> Figures:
    return _column(ISEKAI[name], shots_per_class) if name else ()


def inspection(name: str | None, references: int) -> Figures:
    return INSPECTION[name].get(references, ()) if name else ()


def _column(table: Mapping[str, Sequence[float | None]], shots_per_class: int) -> Figures:
    """The figures for a number of shots. The paper counts all support images, which are twice the shots of a class."""
    if 2 * shots_per_class not in SUPPORT_IMAGES:
        return ()
    column = SUPPORT_IMAGES.index(2 * shots_per_class)
    return tuple((who, value) for who, row in table.items() if (value := row[column]) is not None)
