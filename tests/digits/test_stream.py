"""Streams of the client, and how they outlive the server that they began on."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from digits.client import AsyncDigitClient, DigitClient, DigitError
from digits.resume import MAX_UNANSWERED
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.conftest import RunningServer


def blocking(address: str, batches: Any, patience_s: Any = 10, **options: Any) -> list[Any]:
    with DigitClient(address, timeout_s=patience_s) as client:
        return list(client.classify_stream(batches, **options))


def asynchronous(address: str, batches: Any, patience_s: Any = 10, **options: Any) -> Any:
    async def source() -> AsyncIterator[Any]:
        for images in batches:
            yield images

    async def collect() -> list[Any]:
        async with AsyncDigitClient(address, timeout_s=patience_s) as client:
            return [answer async for answer in client.classify_stream(source(), **options)]

    return asyncio.run(collect())


CLIENTS = pytest.mark.parametrize("stream", [blocking, asynchronous])


@CLIENTS
def test_answers_come_in_order_and_a_bad_item_is_answered_in_its_place(
    server: RunningServer, sample: dict[str, np.ndarray], stream: Any
) -> None:
    images = sample["images"]
    batches = [images[:3], images[:0], *(images[i] for i in range(60))]
    answers = stream(server.address, batches)
    assert isinstance(answers[1], DigitError)
    assert answers[1].code is grpc.StatusCode.INVALID_ARGUMENT
    digits = [answer.digits for answer in (answers[0], *answers[2:])]
    assert digits[0] == [only for (only,) in digits[1:4]]
    assert np.mean(np.concatenate(digits[1:]) == sample["labels"][:60]) >= 0.95


class Mortal(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Streams that die: each of the first ``deaths`` answers a few items, reads ahead, and ends.

    An item's answer is the number of its images; it says how ``death`` comes: as a status of the
    stream, or in the place of an item.
    """

    def __init__(
        self, death: Any, *, deaths: Any, answered: int = 2, in_place: bool = False
    ) -> None:
        self.death, self.deaths, self.answered, self.in_place = death, deaths, answered, in_place
        self.streams = 0
        self.received: list[Any] = []

    def ClassifyStream(self, requests: Any, context: Any) -> Iterator[Any]:
        self.streams += 1
        dies = self.streams <= self.deaths
        for number, item in enumerate(requests):
            count = len(item.request.pixels) // 784
            self.received.append(count)
            if dies and number >= self.answered:
                if self.in_place:
                    # Of RESOURCE_EXHAUSTED only the hint says that it passes.
                    error = digits_pb2.StreamError(
                        code=self.death.value[0], message="not now", retry_after_ms=10
                    )
                    yield digits_pb2.ClassifyStreamResponse(error=error)
                    continue
                context.abort(self.death, "the server is shutting down")
            prediction = digits_pb2.Prediction(digit=count)
            response = digits_pb2.ClassifyResponse(predictions=[prediction])
            yield digits_pb2.ClassifyStreamResponse(response=response)


@pytest.fixture
def mortal(serve: Callable[..., Any]) -> Callable[..., tuple[Mortal, Any]]:
    def start(*arguments: Any, **options: Any) -> tuple[Mortal, Any]:
        servicer = Mortal(*arguments, **options)
        return servicer, serve(servicer)

    return start


def batches_of(sizes: Any) -> list[np.ndarray]:
    return [np.zeros((size, 28, 28), np.uint8) for size in sizes]


UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


@CLIENTS
@pytest.mark.parametrize(
    ("death", "in_place"), [(UNAVAILABLE, False), (UNAVAILABLE, True), (EXHAUSTED, True)]
)
def test_stream_is_resumed_where_it_ended_and_each_item_answered_once(
    mortal: Callable[..., tuple[Mortal, Any]], stream: Any, death: Any, in_place: bool
) -> None:
    servicer, address = mortal(death, deaths=3, in_place=in_place)
    answers = stream(address, batches_of(range(1, 10)))
    assert [answer.digits for answer in answers] == [[size] for size in range(1, 10)]
    assert servicer.streams == 4
    assert len(servicer.received) > 9  # what had no answer was sent again


def test_unanswered_items_are_sent_again_while_the_caller_has_nothing_new(
    mortal: Callable[..., tuple[Mortal, Any]],
) -> None:
    """The sending thread of the dead stream still waits inside the caller's sequence."""
    _, address = mortal(UNAVAILABLE, deaths=1, answered=1)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for images in batches_of([1, 2]):
        items.put(images)

    def source() -> Iterator[Any]:
        while (images := items.get()) is not None:
            yield images

    with DigitClient(address) as client:
        answers = client.classify_stream(source())
        assert [next(answers).digits for _ in range(2)] == [[1], [2]]
        for images in batches_of([3, 4]):
            items.put(images)
        items.put(None)
        assert [answer.digits for answer in answers] == [[3], [4]]


def test_async_sequence_goes_on_after_the_stream_that_waited_for_it_ended(
    mortal: Callable[..., tuple[Mortal, Any]],
) -> None:
    """Cancelling that stream cancels who waits for the caller's sequence."""
    _, address = mortal(UNAVAILABLE, deaths=1, answered=1, in_place=True)
    resumed = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        for images in batches_of([1, 2]):
            yield images
        await resumed.wait()
        for images in batches_of([3, 4]):
            yield images

    async def collect() -> list[Any]:
        digits = []
        async with AsyncDigitClient(address) as client:
            async for answer in client.classify_stream(source()):
                digits.append(answer.digits)
                if digits[-1] == [2]:
                    resumed.set()
        return digits

    assert asyncio.run(asyncio.wait_for(collect(), 30)) == [[1], [2], [3], [4]]


@CLIENTS
def test_error_of_the_callers_sequence_reaches_the_caller(
    mortal: Callable[..., tuple[Mortal, Any]], stream: Any
) -> None:
    _, address = mortal(UNAVAILABLE, deaths=0)

    def broken() -> Iterator[Any]:
        yield from batches_of([1, 2])
        raise KeyError("the disk is gone")

    with pytest.raises(KeyError, match="the disk is gone"):
        stream(address, broken())
    with pytest.raises(ValueError, match="expected values of 0 to 1"):
        stream(address, [np.full((28, 28), -0.4)])


@CLIENTS
def test_nothing_but_refusals_ends_in_the_refusal(
    mortal: Callable[..., tuple[Mortal, Any]], stream: Any
) -> None:
    servicer, address = mortal(UNAVAILABLE, deaths=1000, answered=0)
    began = time.monotonic()
    with pytest.raises(DigitError, match="UNAVAILABLE: the server is shutting down"):
        stream(address, batches_of([1]), patience_s=1)
    assert time.monotonic() - began < 10
    assert 3 <= servicer.streams <= 6  # 50 ms, doubled each time, within a second


@CLIENTS
def test_other_errors_end_the_stream_at_once(
    mortal: Callable[..., tuple[Mortal, Any]], stream: Any
) -> None:
    servicer, address = mortal(grpc.StatusCode.INTERNAL, deaths=1000, answered=0)
    with pytest.raises(DigitError, match="INTERNAL: the server"):
        stream(address, batches_of([1]))
    assert servicer.streams == 1


@CLIENTS
def test_deadline_holds_for_the_whole_stream(
    mortal: Callable[..., tuple[Mortal, Any]], stream: Any
) -> None:
    _, address = mortal(UNAVAILABLE, deaths=1000, answered=0)
    began = time.monotonic()
    with pytest.raises(DigitError):
        stream(address, batches_of([1]), patience_s=60, timeout_s=0.5)
    assert time.monotonic() - began < 10


def test_client_sends_a_bounded_number_of_items_ahead(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield sample["images"][number % 500]

    with DigitClient(server.address) as client:
        for number, _ in enumerate(client.classify_stream(source())):
            assert taken <= number + 1 + MAX_UNANSWERED
            if number == 500:
                break
