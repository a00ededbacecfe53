"""``digits serve`` with something about it altered, to measure what that gives or costs.

    python -m benchmarks.altered MODEL SIZE serve ...

``MODEL`` is an ONNX file that infers in place of the served one, except for the golden digits;
``-`` leaves it as it is. ``SIZE`` is how many images a batch of small requests has, and how many
must wait before a second slot wakes; 0 leaves both to the server.

On SIGUSR1 metrics stop counting calls and batches, and on SIGUSR2 they count again: two processes
would differ by more than what is looked for, since each has its own luck with memory and cores.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import limit
from benchmarks.harness import served_artifact
from service.serving.model import Answers

COUNT_NOT, COUNT = signal.SIGUSR1, signal.SIGUSR2
# What the recorder of RPCs and the batcher tell metrics, call by call and batch by batch.
COUNTING = ("began", "ended", "batch", "refused")


class Switch:
    """Whether methods do what they are for."""

    def __init__(self) -> None:
        self._on = True

    def turn(self, number: int, _frame: object) -> None:
        """On a signal."""
        self._on = number == COUNT

    def guard(self, method: Callable[..., None]) -> Callable[..., None]:
        """The method where it is on, and nothing where it is off."""

        @functools.wraps(method)
        def guarded(*arguments: Any) -> None:
            if self._on:
                method(*arguments)

        return guarded


def inferring_with(answer: Callable[..., Answers], model: bytes) -> Callable[..., Answers]:
    """``Engine.answer`` with another model, which costs something else and was never trained."""
    session = limit.session(model)
    # A model is served only if its golden digits get their own answers.
    golden = len(served_artifact().golden.images)

    def inferred(engine: Any, images: npt.NDArray[np.uint8]) -> Answers:
        if len(images) == golden:
            return answer(engine, images)
        (probabilities,) = session.run(["probabilities"], {"image": images})
        return Answers(probabilities, np.ones(len(images), np.float32))

    return inferred


def by_hand(decide: Callable[..., None], size: int) -> Callable[..., None]:
    """``BatchCost._decide`` with a decision that was made before."""

    def decided(cost: Any) -> None:
        decide(cost)
        cost.batch_images = cost.wake_images = size

    return decided


def main(model: str, size: int) -> int:
    """Serves; returns the exit code."""
    # What is altered must be before anybody holds on to one of its methods.
    from digits.cli.main import main as digits  # noqa: PLC0415 - for those who start this
    from service.serving.cost import BatchCost  # noqa: PLC0415
    from service.serving.engine import Engine  # noqa: PLC0415
    from service.telemetry.metrics import Metrics  # noqa: PLC0415

    if model != "-":
        Engine.answer = inferring_with(Engine.answer, Path(model).read_bytes())  # type: ignore[method-assign]
    if size:
        BatchCost._decide = by_hand(BatchCost._decide, size)  # type: ignore[method-assign]  # noqa: SLF001
    switch = Switch()
    for name in COUNTING:
        setattr(Metrics, name, switch.guard(getattr(Metrics, name)))
    for number in (COUNT, COUNT_NOT):
        signal.signal(number, switch.turn)
    return digits()


if __name__ == "__main__":
    sys.exit(main(sys.argv.pop(1), int(sys.argv.pop(1))))
