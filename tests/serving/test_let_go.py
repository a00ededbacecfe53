"""What has ended is let go there and then, not when the garbage collector comes by.

A request holds its images, a model its session: held for longer, they add up with every bad call
and every change of the model.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.serving.batcher import Batcher
from service.serving.gate import Gate
from service.serving.model import Answers, ModelRunner, Predictions
from service.serving.pictures import Pictures
from service.serving.preparing import Preparer
from service.serving.request import Refusal, Request
from tests.conftest import SAMPLES, wait_until
from tests.serving.core import Caller, doubled, pixels

SEVEN = (SAMPLES / "7.png").read_bytes()
BROKEN = 33


@pytest.fixture(autouse=True)
def _nobody_else_holds_or_frees() -> Iterator[None]:
    """The collector is off, and so is the log: pytest keeps what is logged, errors among it."""
    logging.disable()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


class KeptRequest(Request):
    """A request that weak references can follow."""


class Engine:
    def answer(self, images: Any) -> Answers:
        if (images == BROKEN).all():
            raise RuntimeError("broken engine")
        count = len(images)
        return Answers(np.full((count, 10), 0.1, np.float32), np.ones(count, np.float32))


@pytest.fixture
def gate() -> Iterator[Gate]:
    runner = ModelRunner()
    batcher = Batcher(runner.run, slots=2, max_batch_size=4, max_queue_images=100)
    gate = Gate(batcher, runner, Preparer(), max_images_per_request=8)
    model: Any = SimpleNamespace(engine=Engine(), version="1", batch_seconds={1: 1e-6})
    gate.serve(model)
    gate.open()
    gate.start()
    yield gate
    gate.stop(10)


@pytest.mark.parametrize(
    ("images", "files", "how"),
    [
        ([1], None, None),
        (range(8), None, None),  # several batches
        ([BROKEN], None, Refusal.FAILED),
        (8 * [BROKEN], None, Refusal.FAILED),
        ([], [SEVEN, SEVEN], None),
        ([], [SEVEN, SEVEN[:-60]], Refusal.INVALID),
        ([], [SEVEN, b"nothing"], Refusal.INVALID),
    ],
    ids=["lone", "split", "failing", "failing split", "files", "damaged", "no file"],
)
def test_request_is_let_go_as_it_ends(gate: Gate, images: Any, files: Any, how: Any) -> None:
    ended: list[Any] = []
    request = KeptRequest(
        pixels(*images), len(images), None,
        lambda requests: ended.extend(one.refusal for one in requests), Caller(),
    )  # fmt: skip
    left = weakref.ref(request)
    if files is None:
        gate.submit([request])
    else:
        gate.prepare(request, Pictures(files))
    del request
    wait_until(lambda: ended)
    assert ended == [how]
    wait_until(lambda: left() is None)


def test_request_that_starts_over_leaves_nothing_of_its_first_run() -> None:
    class Model:
        """What made a result."""

    models = [Model(), Model()]
    older, newer = (weakref.ref(model) for model in models)
    runs = []

    def run(images: Any, count: int) -> Predictions:
        runs.append(count)
        predictions = doubled(images, models[0])
        if len(runs) == 1:
            del models[0]
        return predictions

    answered: list[Any] = []
    batcher = Batcher(run, slots=1, max_batch_size=4, max_queue_images=100)
    batcher.start()
    batcher.submit([Request(pixels(*range(8)), 8, None, answered.extend, Caller())])
    wait_until(lambda: answered)
    assert runs == [4, 4, 4, 4]
    assert answered[0].result.model is newer()
    wait_until(lambda: older() is None)
    assert batcher.stop(10)


def test_idle_slot_holds_neither_requests_nor_what_answered_them() -> None:
    class Model:
        """What made a result."""

    def run(images: Any, _count: Any) -> Predictions:
        both.wait(30)
        return doubled(images, models.pop())

    models, both, ended = [Model(), Model()], threading.Barrier(2), []
    batcher = Batcher(run, slots=2, max_batch_size=4, max_queue_images=100)
    batcher.start()
    requests = [
        KeptRequest(pixels(1, 2, 3, 4), 4, None, lambda ones: ended.append(len(ones)), Caller())
        for _ in range(2)
    ]
    held = [weakref.ref(one) for one in (*models, *requests)]
    batcher.submit(requests)
    del requests
    wait_until(lambda: len(ended) == 2)
    wait_until(lambda: [one() for one in held] == [None] * 4)
    assert batcher.stop(10)
