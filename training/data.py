"""Data sets as whole tensors, and augmentation as batched tensor operations.

A 60,000-image set is 47 MB: it is held in memory and indexed, without a DataLoader.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

DATASETS = {"mnist": datasets.MNIST}
DEFAULT_DATA_DIR = Path("data")
SPLIT_SIZES = {"train": 60_000, "test": 10_000}


class DataError(RuntimeError):
    """The data set is missing, unreadable, or not what its name says."""


@dataclass(frozen=True)
class Split:
    """One split, whole.

    Attributes:
        images: uint8[N, 28, 28], 0 (background) to 255 (ink).
        labels: int64[N], 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def digest(self) -> str:
        """SHA-256 over pixels, then labels as bytes."""
        hasher = hashlib.sha256(self.images.numpy().tobytes())
        hasher.update(self.labels.to(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)


def data_dir(flag: Path | None) -> Path:
    """Where data sets live: the flag, else ``DIGITS_DATA``, else ``data/``."""
    return flag or Path(os.environ.get("DIGITS_DATA", DEFAULT_DATA_DIR))


def load_split(dataset: str, split: str, root: Path) -> Split:
    """Loads a split, downloading it through torchvision when it is not under ``root``.

    Args:
        dataset: Name in ``DATASETS``.
        split: ``train`` or ``test``.
        root: Folder in torchvision's layout (``MNIST/raw/...``).

    Raises:
        ValueError: If the data set's name is unknown.
        DataError: If it cannot be had or its sizes are wrong.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}")
    source = DATASETS[dataset]
    try:
        try:
            data = source(root, train=split == "train", download=False)
        except RuntimeError:  # torchvision's way of saying "not there"
            data = source(root, train=split == "train", download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise DataError(f"{dataset} {split} split under {root}: {error}") from error
    loaded = Split(data.data, data.targets)
    expected = (SPLIT_SIZES[split], 28, 28)
    if tuple(loaded.images.shape) != expected or len(loaded.labels) != expected[0]:
        got = f"{tuple(loaded.images.shape)} images and {len(loaded.labels)} labels"
        raise DataError(f"{dataset} {split} split under {root}: expected {expected}, got {got}")
    return loaded


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, scale, shear and shift, one affine warp an image.

    Args:
        pixels: float[N, 28, 28].
        generator: CPU generator that decides the warps.

    Returns:
        Warped pixels of the same shape and scale; what moves in from outside is background.
    """
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle = uniform(-12.0, 12.0) * (math.pi / 180)
    shear = uniform(-0.18, 0.18)
    scale_x, scale_y = uniform(0.87, 1.15), uniform(0.87, 1.15)
    # affine_grid's unit is half an image: 2 px of 28 is 2 / 14.
    shift_x, shift_y = uniform(-2 / 14, 2 / 14), uniform(-2 / 14, 2 / 14)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack(
        [
            torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=1),
            torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=1),
        ],
        dim=1,
    ).to(pixels)  # (N, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(pixels.unsqueeze(1), grid, align_corners=False).squeeze(1)
