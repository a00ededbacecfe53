"""Both clients, called alike, and a server that answers, refuses or waits as it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from digits.client import AsyncDigitClient, DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc

IMAGE = np.zeros((28, 28), np.uint8)
NEVER = (("grpc-retry-pushback-ms", "-1"),)
EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


def blocking(address: str, images: Any = IMAGE, **options: Any) -> Any:
    with DigitClient(address, **options) as client:
        return client.classify(images)


def asynchronous(address: str, images: Any = IMAGE, **options: Any) -> Any:
    answers = []  # asyncio.run makes a text of what its task returns

    async def ask() -> None:
        async with AsyncDigitClient(address, **options) as client:
            answers.append(await client.classify(images))

    asyncio.run(ask())
    return answers[0]


CLIENTS = pytest.mark.parametrize("classify", [blocking, asynchronous])


class Servicer(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Answers, refuses or waits as it is told to."""

    def __init__(
        self, *, error: Any = None, metadata: Any = (), answers: int = 1, waits: bool = False
    ) -> None:
        self.error, self.metadata, self.answers, self.waits = error, metadata, answers, waits
        self.calls = 0
        self.called, self.go_on = threading.Event(), threading.Event()

    def Classify(self, request: Any, context: Any) -> Any:
        self._begin(context)
        prediction = digits_pb2.Prediction(
            digit=5, confidence=0.5, probabilities=[0.1] * 10, digit_score=0.5
        )
        return digits_pb2.ClassifyResponse(predictions=[prediction] * self.answers)

    def ClassifyStream(self, requests: Any, context: Any) -> Iterator[Any]:
        self._begin(context)
        for _ in requests:
            error = digits_pb2.StreamError(code=EXHAUSTED.value[0], message="never")
            yield digits_pb2.ClassifyStreamResponse(error=error)

    def _begin(self, context: Any) -> None:
        self.calls += 1
        if self.waits:
            context.add_callback(self.go_on.set)
            self.called.set()
            self.go_on.wait(60)
        if self.error:
            context.set_trailing_metadata(self.metadata)
            context.abort(self.error, "not now")
