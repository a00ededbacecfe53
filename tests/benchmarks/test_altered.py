"""What benchmarks alter about a server does what it says."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from benchmarks.altered import COUNT, COUNT_NOT, Switch, by_hand, with_work
from service.serving.cost import BatchCost


@pytest.mark.parametrize(
    ("work", "counts"), [(1, [8]), (3, [8, 8, 8]), (2.5, [8, 8, 4]), (0.5, [4]), (0.01, [1])]
)
def test_inference_does_so_many_times_its_work_and_answers_every_image(work, counts):
    ran = []

    def run(_engine, images):
        ran.append(len(images))
        return np.ones((len(images), 10), np.float32)

    answers = with_work(run, work)(None, np.zeros((8, 28, 28), np.uint8))
    assert ran == counts
    assert answers.shape == (8, 10)


def test_batch_size_by_hand_outlives_what_is_measured(monkeypatch):
    monkeypatch.setattr(BatchCost, "_decide", by_hand(BatchCost._decide, 16))
    cost = BatchCost(64, 1024)
    cost.expect({1: 1e-5, 64: 64e-5})
    cost.learn(64, 1e-3)
    assert (cost.batch_images, cost.wake_images) == (16, 16)
    assert cost.image_cost_s > 0


def test_metrics_count_until_they_are_told_not_to():
    switch, counted = Switch(), []
    count = switch.guard(counted.append)
    for number in (COUNT, COUNT_NOT, COUNT):
        switch.turn(number, None)
        count(number)
    assert counted == [COUNT, COUNT]
    assert {COUNT, COUNT_NOT} == {signal.SIGUSR1, signal.SIGUSR2}
