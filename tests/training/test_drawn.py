"""Digits in other hands, and what is no digit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from training import not_digits, strokes
from training.config import TrainingConfig, make_config
from training.data import Split
from training.drawn import Drawn
from training.model import Classifier
from training.scoring import fit_is_digit

CONFIG = TrainingConfig(batch_size=50, epochs=1, drawn=0.1)


@pytest.fixture(scope="module")
def train() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(100, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 10:18] = torch.randint(1, 256, (100, 20, 8), generator=generator).byte()
    return Split(images, torch.arange(100) % 10)


@pytest.mark.parametrize("signs", [strokes.DIGITS, strokes.LETTERS, strokes.SHAPES], ids=len)
def test_signs_have_the_networks_form_and_are_seeded(signs: Any) -> None:
    images, names = strokes.draw(signs, 3 * len(signs), np.random.default_rng(7))
    assert images.shape == (len(names), 28, 28)
    assert images.dtype == np.uint8
    assert {names.count(name) for name in signs} == {3}
    for image in images:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 24
    again, _ = strokes.draw(signs, 3 * len(signs), np.random.default_rng(7))
    assert np.array_equal(images, again)
    other, _ = strokes.draw(signs, 3 * len(signs), np.random.default_rng(8))
    assert (images != other).any(axis=(1, 2)).all()


def test_what_is_no_digit_is_of_every_kind_and_seeded(train: Split) -> None:
    digits = train.images.numpy()
    made = not_digits.make(100, digits, np.random.default_rng(1))
    assert made.shape == (100, 28, 28)
    assert made.dtype == np.uint8
    assert np.array_equal(made, not_digits.make(100, digits, np.random.default_rng(1)))
    held_out = not_digits.held_out(10, digits, np.random.default_rng(1))
    assert all(images.shape == (10, 28, 28) for images in held_out.values())
    assert not set(not_digits.FONTS) & set(not_digits.HELD_OUT_FONTS)
    assert not strokes.SHAPES.keys() & strokes.HELD_OUT_SHAPES.keys()


def test_drawn_digits_are_seeded_and_labelled() -> None:
    def some(seed: int) -> Any:
        return Drawn(CONFIG, steps=20).some(30, torch.Generator().manual_seed(seed))

    one, same, other = some(1), some(1), some(2)
    assert (one.images.shape, one.labels.shape) == ((30, 28, 28), (30,))
    assert one.labels.dtype == torch.int64
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)
    none = Drawn(replace(CONFIG, drawn=0.0), steps=20).some(0, torch.Generator())
    assert (len(none), none.labels.dtype) == (0, torch.int64)


def test_whether_an_image_is_a_digit_is_learned_and_changes_no_answer(train: Split) -> None:
    """Of a network that was never trained: its features tell the two sorts apart all the same."""
    torch.manual_seed(0)
    plain = Classifier(TrainingConfig.arch).eval()
    plain.temperature.fill_(0.5)
    scored = fit_is_digit(plain, CONFIG, train)
    logits, is_digit = scored.answer(train.images)
    assert torch.equal(logits, plain.answer(train.images)[0])
    others = not_digits.make(200, train.images.numpy(), np.random.default_rng(5))
    _, is_other = scored.answer(torch.from_numpy(others))
    assert is_digit.median() > is_other.median() + 1
    again = fit_is_digit(plain, CONFIG, train)
    assert torch.equal(is_digit, again.answer(train.images)[1])


def test_they_are_for_digits_alone() -> None:
    config = make_config("default", {"dataset": "fashion-mnist"})
    assert (config.drawn, config.not_digits) == (0, False)
    message = "not_digits: expected a data set of digits, got fashion-mnist"
    with pytest.raises(ValueError, match=message):
        make_config("default", {"dataset": "fashion-mnist", "not_digits": True})
