"""Test images as callers may really send them, each fault alone and at a fixed strength.

Six are of kinds that training applies too; the fifteen of MNIST-C are held out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training import mnist_c

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def _to_bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


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


# What training also does to images, though not at these strengths: how well it was learnt.
TRAINED: dict[str, Corruption] = {
    "blur": blur,
    "noise": noise,
    "thick strokes": thick,
    "thin strokes": thin,
    "low contrast": low_contrast,
    "inverted": inverted,
}


def _held_out(name: str) -> Corruption:
    def corrupt(images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.from_numpy(mnist_c.corrupt(name, images.numpy(), generator.initial_seed()))

    return corrupt


# What training never does: how far it carries.
HELD_OUT = {f"MNIST-C {name}": _held_out(name) for name in mnist_c.MNIST_C}
CORRUPTIONS = TRAINED | HELD_OUT
