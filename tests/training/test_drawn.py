"""What batches are filled up with: digits in other hands, and what is no digit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training.additions import Additions

from training import not_digits, strokes
from training.config import TrainingConfig, make_config
from training.data import Split

CONFIG = TrainingConfig(batch_size=50, epochs=1, drawn=0.1, not_digits=0.2)


@pytest.fixture(scope="module")
def train():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(100, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 10:18] = torch.randint(1, 256, (100, 20, 8), generator=generator).byte()
    return Split(images, torch.arange(100) % 10)


@pytest.mark.parametrize("signs", [strokes.DIGITS, strokes.LETTERS, strokes.SHAPES], ids=len)
def test_signs_have_the_networks_form_and_are_seeded(signs):
    images, names = strokes.draw(signs, 3 * len(signs), np.random.default_rng(7))
    assert (images.shape, images.dtype) == ((len(names), 28, 28), np.uint8)
    assert {names.count(name) for name in signs} == {3}
    for image in images:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 24
    again, _ = strokes.draw(signs, 3 * len(signs), np.random.default_rng(7))
    assert np.array_equal(images, again)
    other, _ = strokes.draw(signs, 3 * len(signs), np.random.default_rng(8))
    assert (images != other).any(axis=(1, 2)).all()


def test_what_is_no_digit_is_of_every_kind_and_seeded(train):
    digits = train.images.numpy()
    made = not_digits.make(100, digits, np.random.default_rng(1))
    assert (made.shape, made.dtype) == ((100, 28, 28), np.uint8)
    assert np.array_equal(made, not_digits.make(100, digits, np.random.default_rng(1)))
    held_out = not_digits.held_out(10, digits, np.random.default_rng(1))
    assert all(images.shape == (10, 28, 28) for images in held_out.values())
    assert not set(not_digits.FONTS) & set(not_digits.HELD_OUT_FONTS)
    assert not strokes.SHAPES.keys() & strokes.HELD_OUT_SHAPES.keys()


def test_batch_has_digits_first_and_then_what_is_none(train):
    images, labels = train.images[:50], train.labels[:50]
    generator = torch.Generator().manual_seed(3)
    pixels, digits = Additions(CONFIG, train, steps=2).batch(images, labels, generator)
    assert (len(pixels), len(digits)) == (50 + 5 + 10, 50 + 5)
    assert torch.equal(pixels[:50], images)
    assert torch.equal(digits[:50], labels)
    assert digits.dtype == torch.int64


@pytest.mark.parametrize(("drawn", "others"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2)])
def test_each_may_be_left_out(train, drawn, others):
    config = replace(CONFIG, drawn=drawn, not_digits=others)
    generator = torch.Generator().manual_seed(3)
    batch = Additions(config, train, steps=2).batch(train.images, train.labels, generator)
    assert [len(part) for part in batch] == [
        100 + round(50 * drawn) + round(50 * others), 100 + round(50 * drawn),
    ]  # fmt: skip
    assert batch[1].dtype == torch.int64


def test_they_are_for_digits_alone():
    config = make_config("default", {"dataset": "fashion-mnist"})
    assert (config.drawn, config.not_digits) == (0, 0)
    message = "not_digits: expected a data set of digits, got fashion-mnist"
    with pytest.raises(ValueError, match=message):
        make_config("default", {"dataset": "fashion-mnist", "not_digits": 0.1})
