"""Random changes of whole batches, as tensor operations, seeded.

Every image is warped: rotation, scale, shear, shift and a light elastic deformation in one
resampling. A share of them is also degraded the way scans are: thicker or thinner strokes, blur,
low contrast, noise, and now and then ink and paper swapped.
Source of the idea to warp and deform: Simard et al. 2003, Best Practices for Convolutional Neural
Networks Applied to Visual Document Analysis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Half an image is affine_grid's unit: 2 px of 28 are 2 / 14.
MAX_SHIFT = 2 / 14
MAX_ANGLE = 12 * math.pi / 180
MAX_SHEAR = 0.18
SCALE = (0.87, 1.15)
# Displacements are drawn on a coarse grid and interpolated, which keeps them smooth.
ELASTIC_GRID = 5
ELASTIC_STD = 0.6 / 14
# Share of the images that each degradation meets.
DEGRADED = 0.12
INVERTED = 0.03


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Warps every image and degrades some.

    Args:
        pixels: float[N, 28, 28], 0 to 255.
        generator: CPU generator that decides everything.

    Returns:
        Pixels of the same shape and range; what moves in from outside is background.
    """
    warped = warp(pixels, generator)
    degraded = thicken(warped, generator)
    degraded = blur(degraded, generator)
    degraded = fade(degraded, generator)
    return invert(add_noise(degraded, generator), generator)


def warp(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation, scale, shear, shift and elastic deformation in one resampling."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, shear = uniform(-MAX_ANGLE, MAX_ANGLE), uniform(-MAX_SHEAR, MAX_SHEAR)
    scale_x, scale_y = uniform(*SCALE), uniform(*SCALE)
    shift_x, shift_y = uniform(-MAX_SHIFT, MAX_SHIFT), uniform(-MAX_SHIFT, MAX_SHIFT)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack(
        [
            torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=1),
            torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=1),
        ],
        dim=1,
    )  # (N, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, 28, 28], align_corners=False)
    coarse = torch.randn(count, 2, ELASTIC_GRID, ELASTIC_GRID, generator=generator) * ELASTIC_STD
    bend = F.interpolate(coarse, size=(28, 28), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(pixels.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.nonzero(torch.rand(count, generator=generator) < share).squeeze(1)


def _strength(index: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(index), 1, 1, generator=generator)


def thicken(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes up to a pixel thicker, or most of one thinner, on each side.

    By a blend with the dilated or the eroded image; the latter alone would lose thin strokes.
    """
    for sign, most in ((1.0, 1.0), (-1.0, 0.7)):
        index = _chosen(len(pixels), DEGRADED, generator)
        some = pixels[index]
        spread = sign * F.max_pool2d(sign * some.unsqueeze(1), 3, 1, padding=1).squeeze(1)
        pixels = pixels.index_copy(0, index, some.lerp(spread, most * _strength(index, generator)))
    return pixels


def blur(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A blend with the image under a 3x3 binomial kernel, applied twice."""
    index = _chosen(len(pixels), DEGRADED, generator)
    some = pixels[index]
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row[None, :]).reshape(1, 1, 3, 3)
    blurred = some.unsqueeze(1)
    for _ in range(2):
        blurred = F.conv2d(blurred, kernel, padding=1)
    return pixels.index_copy(0, index, some.lerp(blurred.squeeze(1), _strength(index, generator)))


def fade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Down to a third of the contrast, on paper that is not quite black."""
    index = _chosen(len(pixels), DEGRADED, generator)
    contrast = 1 - 0.67 * _strength(index, generator)
    paper = (255 * (1 - contrast)) * _strength(index, generator)
    return pixels.index_copy(0, index, pixels[index] * contrast + paper)


def add_noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of up to a fifth of the range."""
    index = _chosen(len(pixels), DEGRADED, generator)
    noise = torch.randn(len(index), 28, 28, generator=generator)
    noisy = pixels[index] + noise * (50 * _strength(index, generator))
    return pixels.index_copy(0, index, noisy.clamp(0, 255))


def invert(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Ink and paper swapped."""
    index = _chosen(len(pixels), INVERTED, generator)
    return pixels.index_copy(0, index, 255 - pixels[index])
