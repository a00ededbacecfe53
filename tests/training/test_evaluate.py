"""Metrics of a classifier, and the comparison of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.compare import paired
from training.config import TrainingConfig
from training.corruptions import CORRUPTIONS
from training.data import Split
from training.evaluate import evaluate, predict_logits, wilson_interval
from training.model import Classifier


def test_evaluation_counts_by_hand(split: Split) -> None:
    model = Classifier(TrainingConfig.arch)
    metrics = evaluate(predict_logits(model, split.images), split.labels)
    predicted = predict_logits(model, split.images).argmax(dim=1).numpy()
    truth = split.labels.numpy()
    assert metrics["correct"] == int((predicted == truth).sum())
    for row in range(10):
        for column in range(10):
            cell = int(((truth == row) & (predicted == column)).sum())
            assert metrics["confusion"][row][column] == cell


def test_wilson_interval_matches_the_published_example() -> None:
    # 81 of 263: Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_difference_between_two_networks_is_paired_by_seed() -> None:
    rows = [
        {"arch": "small", "by_seed": {0: 0.990, 1: 0.980, 2: 0.970, 7: 0.1}},
        {"arch": "large", "by_seed": {0: 0.991, 1: 0.982, 2: 0.973}},
    ]
    # 0.1, 0.2 and 0.3 points: mean 0.2, deviation 0.1, t 4.303 at 2 degrees of freedom.
    assert paired(rows) == [
        "large over small, 3 seeds: +0.200 points, 95 % interval -0.048 to +0.448"
    ]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_seeded_and_keeps_form(split: Split, name: Any) -> None:
    corrupt = CORRUPTIONS[name]
    first, again = (corrupt(split.images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first.shape, first.dtype) == (split.images.shape, torch.uint8)
    assert not torch.equal(first, split.images)
