"""What the preparer tells of the time that work in its lanes takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from service.serving import preparing
from service.serving.preparing import Preparer
from service.serving.request import Refusal, Request
from tests.serving.core import Answered, Caller


class Steps:
    """Work of which only the cost is known."""

    size = 0

    def __init__(self, *costs: int) -> None:
        self.steps = len(costs)
        self._costs = list(costs)

    def costs(self) -> list[int]:
        return self._costs

    def do(self, index: int) -> None:
        """Takes no time."""

    def give_to(self, request: Request) -> None:
        """Has no images; counts its steps."""
        request.count += self.steps


class Waiting:
    """A preparer that is started once everything waits."""

    def __init__(self) -> None:
        self.preparer, self.ended = Preparer(), Answered()

    def submit(self, *costs: int, within_s: float | None = None) -> Request:
        deadline = None if within_s is None else time.monotonic() + within_s
        request = Request(b"", 0, deadline, self.ended.reply, Caller())
        self.preparer.submit(request, Steps(*costs), self.ended.reply)
        return request


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    waiting = Waiting()
    yield waiting
    assert waiting.preparer.stop(60)


def refusals(requests: Sequence[Request]) -> list[Refusal | None]:
    return [request.refusal for request in requests]


def test_small_request_waits_for_as_much_of_the_large_ones_as_of_the_small(
    waiting: Waiting,
) -> None:
    waiting.preparer._seconds_per_pixel = 1.0
    large = waiting.submit(preparing.SMALL_PIXELS, preparing.SMALL_PIXELS)
    small = waiting.submit(2 * preparing.STEP_PIXELS)
    hurried = waiting.submit(preparing.STEP_PIXELS, within_s=600)
    waiting.preparer.start()
    waiting.ended.wait_for(3)
    assert refusals([large, small, hurried]) == [None, None, Refusal.DEADLINE_UNREACHABLE]
    assert hurried.retry_after_s == 4 * preparing.STEP_PIXELS


def test_many_pixels_that_take_little_time_fit_into_a_deadline(waiting: Waiting) -> None:
    waiting.preparer._seconds_per_pixel = 1e-9
    requests = [waiting.submit(preparing.SMALL_PIXELS, within_s=600) for _ in range(3)]
    waiting.preparer.start()
    waiting.ended.wait_for(3)
    assert refusals(requests) == [None, None, None]


def test_images_are_given_once_after_the_last_step(waiting: Waiting) -> None:
    requests = [waiting.submit(1), waiting.submit(1, 1, 1)]
    waiting.preparer.start()
    waiting.ended.wait_for(2)
    assert [request.count for request in requests] == [1, 3]
