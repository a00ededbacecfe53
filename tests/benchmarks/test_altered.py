"""What benchmarks alter about a server does what it says."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from benchmarks.altered import COUNT, COUNT_NOT, Switch, by_hand, inferring_with
from benchmarks.harness import served_artifact, served_variant
from service.serving.cost import BatchCost


def test_another_model_infers_and_golden_digits_keep_their_answers() -> None:
    variant, golden = served_variant(), served_artifact().golden.images
    other: Any = lambda _engine, images: [b"own"] * len(images)  # noqa: E731
    inferred: Any = inferring_with(other, variant.model)
    assert inferred(None, golden) == [b"own"] * len(golden)
    answers = [inferred(None, golden[:-1]), inferred(None, golden[-1:])]
    known = served_artifact().golden
    known.check(
        np.concatenate([answer.probabilities for answer in answers]),
        known.is_digit[variant.precision],
        variant.precision,
    )


def test_batch_size_by_hand_outlives_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchCost, "_decide", by_hand(BatchCost._decide, 16))
    cost = BatchCost(64, 1024)
    cost.expect({1: 1e-5, 64: 64e-5})
    cost.learn(64, 1e-3)
    assert (cost.batch_images, cost.wake_images) == (16, 16)
    assert cost.image_cost_s > 0


def test_metrics_count_until_they_are_told_not_to() -> None:
    counted: list[Any]
    switch, counted = Switch(), []
    count = switch.guard(counted.append)
    for number in (COUNT, COUNT_NOT, COUNT):
        switch.turn(number, None)
        count(number)
    assert counted == [COUNT, COUNT]
    assert {COUNT, COUNT_NOT} == {signal.SIGUSR1, signal.SIGUSR2}
