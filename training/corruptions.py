"""Test images as callers may really send them, each fault alone and at a fixed strength.

After Mu and Gilmer 2019, MNIST-C: A Robustness Benchmark for Computer Vision (arXiv 1906.02337),
which has translate, rotate, scale, shear, blurs, noises and brightness among its fifteen; stroke
thickness, contrast and inversion are what scans and screenshots add. Written for this project:
figures compare runs with each other, not with published MNIST-C tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Resamples uint8[N, 28, 28] under one 2x3 matrix an image, in units of half an image."""
    pixels = images.float().unsqueeze(1)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    warped = F.grid_sample(pixels, grid, align_corners=False)
    return _to_bytes(warped.squeeze(1))


def _to_bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """3 pixels along both axes, in a random direction."""
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    matrix[:, 0, 2] = _signs(len(images), generator) * 3 / 14
    matrix[:, 1, 2] = _signs(len(images), generator) * 3 / 14
    return _affine(images, matrix)


def rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    """20 degrees, clockwise or not."""
    angle = _signs(len(images), generator) * math.radians(20)
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle)
    matrix[:, 0, 1], matrix[:, 1, 0] = -torch.sin(angle), torch.sin(angle)
    return _affine(images, matrix)


def _scaled(images: Tensor, factor: float) -> Tensor:
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / factor
    return _affine(images, matrix)


def smaller(images: Tensor, _: torch.Generator) -> Tensor:
    """70 % of the size."""
    return _scaled(images, 0.7)


def larger(images: Tensor, _: torch.Generator) -> Tensor:
    """125 % of the size."""
    return _scaled(images, 1.25)


def blur(images: Tensor, _: torch.Generator) -> Tensor:
    """Gaussian of a standard deviation of 1.2 pixels."""
    offsets = torch.arange(-4, 5).float()
    row = torch.exp(-offsets.square() / (2 * 1.2**2))
    row /= row.sum()
    pixels = images.float().unsqueeze(1)
    pixels = F.conv2d(pixels, row.reshape(1, 1, 1, 9), padding=(0, 4))
    return _to_bytes(F.conv2d(pixels, row.reshape(1, 1, 9, 1), padding=(4, 0)).squeeze(1))


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a standard deviation of 40 of 255."""
    return _to_bytes(images + 40 * torch.randn(images.shape, generator=generator))


def salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    """One pixel in twenty black or white."""
    dice = torch.rand(images.shape, generator=generator)
    return images.masked_fill(dice < 0.025, 0).masked_fill(dice > 0.975, 255)


def thick(images: Tensor, _: torch.Generator) -> Tensor:
    """Strokes a pixel wider on each side."""
    return _to_bytes(F.max_pool2d(images.float().unsqueeze(1), 3, 1, padding=1).squeeze(1))


def thin(images: Tensor, _: torch.Generator) -> Tensor:
    """Strokes half a pixel narrower on each side."""
    pixels = images.float()
    eroded = -F.max_pool2d(-pixels.unsqueeze(1), 3, 1, padding=1).squeeze(1)
    return _to_bytes((pixels + eroded) / 2)


def low_contrast(images: Tensor, _: torch.Generator) -> Tensor:
    """40 % of the contrast on a background of 60."""
    return _to_bytes(images.float() * 0.4 + 60)


def inverted(images: Tensor, _: torch.Generator) -> Tensor:
    """Dark ink on light paper."""
    return 255 - images


CORRUPTIONS: dict[str, Corruption] = {
    "shift": shift,
    "rotate": rotate,
    "smaller": smaller,
    "larger": larger,
    "blur": blur,
    "noise": noise,
    "salt and pepper": salt_and_pepper,
    "thick strokes": thick,
    "thin strokes": thin,
    "low contrast": low_contrast,
    "inverted": inverted,
}
