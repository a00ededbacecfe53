"""Callers of every kind, to stop and exchange servers under."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
import numpy as np

from digits.client import AsyncDigitClient, Classification, DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.calls import NO_RETRIES
from tests.conftest import wait_until

UNARY_CALLERS, STREAM_CALLERS = 6, 2
STREAM_ITEMS = 20


class Load:
    """Callers of every kind until told to stop. Every answer is checked.

    Args:
        address: Where they call.
        images: What they send, in parts.
        expected: The digit of each.
        options: Of the channels of those that are not our client.
    """

    def __init__(
        self, address: str, images: np.ndarray, expected: Any, options: Any = NO_RETRIES
    ) -> None:
        self.address, self.images, self.expected = address, images, expected
        self.options = options
        self.failures: list[Any]
        self.failures, self.unary, self.streams, self.long_items = [], 0, 0, 0
        self._stop = threading.Event()
        self._count = threading.Lock()

    def __enter__(self) -> Self:
        kinds = [self._unary] * UNARY_CALLERS + [self._short_streams] * STREAM_CALLERS
        kinds += [self._long_stream, self._async_long_stream]
        self._pool = ThreadPoolExecutor(len(kinds))
        self._callers = [self._pool.submit(kind) for kind in kinds]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def wait_for(self, calls: Any) -> None:
        """Waits until this many more single calls were answered."""
        enough = self.unary + calls
        wait_until(lambda: self.unary >= enough)

    def _done(self, kind: Any) -> None:
        with self._count:
            setattr(self, kind, getattr(self, kind) + 1)

    def _stub(self) -> tuple[grpc.Channel, Any]:
        channel = grpc.insecure_channel(self.address, options=self.options)
        return channel, digits_pb2_grpc.DigitClassifierServiceStub(channel)

    def _request(self, number: int) -> Any:
        return digits_pb2.ClassifyRequest(pixels=self._batch(number).tobytes())

    def _batch(self, number: int) -> Any:
        start = number % 400
        return self.images[start : start + 1 + number % 8]

    def _check(self, number: int, digits: Any) -> None:
        start = number % 400
        if digits != self.expected[start : start + 1 + number % 8]:
            self.failures.append(f"item {number}: another answer")

    def _unary(self) -> None:
        channel, stub = self._stub()
        number = 0
        with channel:
            while not self._stop.is_set():
                number += 1
                try:
                    response = stub.Classify(self._request(number), timeout=30)
                except grpc.RpcError as error:
                    self.failures.append(f"unary: {error.code().name}: {error.details()}")
                else:
                    self._check(number, [p.digit for p in response.predictions])
                    self._done("unary")

    def _short_streams(self) -> None:
        """Streams that end by themselves, well within the drain delay, without our client."""
        channel, stub = self._stub()
        with channel:
            while not self._stop.is_set():
                items = (
                    digits_pb2.ClassifyStreamRequest(request=self._request(number))
                    for number in range(STREAM_ITEMS)
                )
                try:
                    answers = list(stub.ClassifyStream(items, timeout=30))
                except grpc.RpcError as error:
                    self.failures.append(f"stream: {error.code().name}: {error.details()}")
                    continue
                for number, answer in enumerate(answers):
                    self._check(number, [p.digit for p in answer.response.predictions])
                self._done("streams")

    def _batches(self) -> Iterator[Any]:
        number = 0
        while not self._stop.is_set():
            yield self._batch(number)
            number += 1

    def _take(self, number: int, answer: Any) -> None:
        if isinstance(answer, Classification):
            self._check(number, answer.digits)
            self._done("long_items")
        else:
            self.failures.append(f"long stream: {answer}")

    def _long_stream(self) -> None:
        """One stream from the first to the last moment, with our client."""
        with DigitClient(self.address) as client:
            for number, answer in enumerate(client.classify_stream(self._batches())):
                self._take(number, answer)

    def _async_long_stream(self) -> None:
        async def source() -> AsyncIterator[Any]:
            for batch in self._batches():
                yield batch
                await asyncio.sleep(0)

        async def consume() -> None:
            number = 0
            async with AsyncDigitClient(self.address) as client:
                async for answer in client.classify_stream(source()):
                    self._take(number, answer)
                    number += 1

        asyncio.run(consume())
