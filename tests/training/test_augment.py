from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from training import augment

CHANGES = ["augment", "warp", "thicken", "blur", "fade", "add_noise", "invert"]


@pytest.fixture(scope="module")
def pixels(sample: dict[str, np.ndarray]) -> Any:
    return torch.from_numpy(sample["images"]).float()


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seeded_and_keeps_shape_and_range(pixels: Any, name: str) -> None:
    change = getattr(augment, name)
    before = pixels.clone()
    first, again = (change(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    other = change(pixels, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == pixels.shape
    assert -0.01 <= first.min() <= first.max() <= 255.01
    assert torch.equal(pixels, before), "the training images themselves were changed"


def test_warped_ink_moves_and_changes_size_a_little(pixels: Any) -> None:
    warped = augment.warp(pixels, torch.Generator().manual_seed(1))
    ratio = warped.mean(dim=(1, 2)) / pixels.mean(dim=(1, 2))
    assert 0.5 < ratio.min() < ratio.max() < 1.6


@pytest.mark.parametrize(
    ("name", "share"), [("blur", augment.DEGRADED), ("invert", augment.INVERTED)]
)
def test_degradation_meets_its_share_of_the_images(pixels: Any, name: str, share: Any) -> None:
    many = pixels.repeat(8, 1, 1)
    changed = getattr(augment, name)(many, torch.Generator().manual_seed(3))
    met = (changed != many).any(dim=2).any(dim=1).float().mean()
    assert abs(float(met) - share) < 0.03
