"""What the tests of the core share: requests of numbered images, and engines that are no model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from service.serving.batch import Batch
from service.serving.batcher import Batcher
from service.serving.model import Answers, Predictions
from service.serving.request import IMAGE_BYTES, Request


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Caller:
    """An origin that may leave."""

    def __init__(self) -> None:
        self.cancelled = False


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.dropped: list[Request] = []

    def batch(self, batch: Batch) -> None:
        self.batches.append(batch)

    def refused(self, requests: Sequence[Request]) -> None:
        self.dropped.extend(requests)


class Answered(list[Any]):
    """Requests in the order in which they ended; waits for a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def reply(self, requests: Sequence[Request]) -> None:
        with self._more:
            self.extend(requests)
            self._more.notify_all()

    def wait_for(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self) >= count, timeout=30)


def pixels(*numbers: int) -> bytes:
    return b"".join(bytes([number % 256]) * IMAGE_BYTES for number in numbers)


def numbers(images: Any) -> list[int]:
    return list(bytes(images)[::IMAGE_BYTES])


def doubled(images: Any, model: Any = "model") -> Predictions:
    """Predictions that hold twice the number of each image."""
    rows = np.array(numbers(images), np.float32)[:, None] * np.full(10, 2, np.float32)
    return Predictions(Answers(rows, np.ones(len(rows), np.float32)), model)


def leave(request: Request) -> None:
    """The caller of a request leaves."""
    cast("Caller", request.origin).cancelled = True


def results(request: Request) -> Any:
    """What a request was answered, in the order of its images."""
    rows = request.result.probabilities[request.first : request.first + request.count]
    return rows[:, 0].astype(int).tolist()


def twice(*images: int) -> list[int]:
    return [2 * (number % 256) for number in images]


class Bench:
    """A batcher that is stepped by hand."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.told = Told()
        self.runs: list[list[int]] = []
        self.answered = Answered()
        self.fail = False
        self.model = "model"
        options = {
            "slots": 2, "max_batch_size": 4, "max_queue_images": 100, "listener": self.told,
            **settings,
        }  # fmt: skip
        self.batcher = Batcher(self.run, clock=self.clock, **options)

    def run(self, images: bytes | memoryview, count: int) -> Predictions:
        self.runs.append(numbers(images))
        assert len(self.runs[-1]) == count
        if self.fail:
            raise RuntimeError("broken engine")
        return doubled(images, self.model)

    def request(self, *images: int, deadline: float | None = None, reply: Any = None) -> Request:
        reply = reply or self.answered.reply
        return Request(pixels(*images), len(images), deadline, reply, Caller())

    def submit(self, *requests: Request) -> list[Request]:
        """Those that were refused."""
        self.batcher.submit(requests)
        return [request for request in requests if request.refusal is not None]

    def start_batch(self) -> Batch:
        with self.batcher._condition:
            return self.batcher._start_batch()

    def end_batch(self, batch: Batch) -> Batch:
        self.batcher.infer(batch)
        with self.batcher._condition:
            self.batcher._end_inference(batch)
        self.batcher._finish(batch)
        return batch

    def step(self) -> Batch:
        return self.end_batch(self.start_batch())


class GatedBench:
    """A started batcher whose engine waits for permission, to see which slots run."""

    def __init__(self, **settings: Any) -> None:
        self.running = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.answered = Answered()
        self.sizes: list[int] = []
        expected = settings.pop("expected", None)
        options = {"slots": 2, "max_batch_size": 4, "max_queue_images": 1000, **settings}
        # A clock that stands still: nothing is learned from how long the gate is closed.
        self.batcher = Batcher(self.run, clock=FakeClock(), **options)
        if expected is not None:
            self.batcher.expect(expected)
        self.batcher.start()

    def run(self, images: bytes | memoryview, count: int) -> Predictions:
        self.sizes.append(count)
        self.running.release()
        assert self.gate.acquire(timeout=30)
        return doubled(images)

    def request(self, *images: int) -> Request:
        return Request(pixels(*images), len(images), None, self.answered.reply, Caller())

    def submit(self, *images: int) -> None:
        """One request an image."""
        self.batcher.submit([self.request(number) for number in images])

    def submit_aside(self, *images: int) -> threading.Thread:
        """From a thread of its own, which a lone request keeps until it is answered."""
        thread = threading.Thread(
            target=self.batcher.submit, args=([self.request(*images)],), daemon=True
        )
        thread.start()
        return thread
