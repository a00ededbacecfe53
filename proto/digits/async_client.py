"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

from digits.answers import (
    Classification,
    Model,
    classification,
    item_answer,
    joined,
    served_model,
)
from digits.base_client import IN_FLIGHT, Client, Sent
from digits.errors import DigitError
from digits.patience import PASSING, Patience
from digits.progress import Progress
from digits.requests import Ahead, Image, Pictures, classify_requests, one_request, several_files
from digits.stream import AsyncBacklog
from digits.v1 import digits_pb2


class AsyncDigitClient(Client):
    """The same for asyncio; made and used on one event loop, which also reads paths.

    Its settings are those of ``DigitClient``.
    """

    _insecure_channel = staticmethod(grpc.aio.insecure_channel)
    _secure_channel = staticmethod(grpc.aio.secure_channel)

    async def classify(
        self,
        images: Pictures,
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """See ``DigitClient.classify``."""
        answers = []
        async for answer in self.classify_batches(images, timeout_s=timeout_s):
            answers.append(answer)
            if progress is not None:
                progress(len(answer.predictions))
        return joined(answers)

    async def classify_batches(
        self, images: Pictures, *, timeout_s: float | None = None
    ) -> AsyncIterator[Classification]:
        """See ``DigitClient.classify_batches``."""
        requests = Ahead(classify_requests(images, self._request_images))
        sent: deque[Sent] = deque()
        done = 0
        try:
            while True:
                for request in islice(requests, IN_FLIGHT - len(sent)):
                    sent.append(self._send(self._stub.Classify, request, timeout_s))
                if not sent:
                    break
                answer = classification(await self._result(sent[0], done))
                sent.popleft()
                done += len(answer.predictions)
                yield answer
        finally:
            for unanswered in sent:
                unanswered.call.cancel()
        requests.finish()

    async def classify_files(
        self, files: Sequence[str | Path | bytes], *, timeout_s: float | None = None
    ) -> Classification:
        """See ``DigitClient.classify_files``."""
        return await self.classify(several_files(files), timeout_s=timeout_s)

    async def classify_stream(
        self, batches: AsyncIterable[Image], *, timeout_s: float | None = None
    ) -> AsyncIterator[Classification | DigitError]:
        """See ``DigitClient.classify_stream``; ``batches`` is read on the event loop."""
        backlog = AsyncBacklog(one_request(images) async for images in batches)
        patience = self._stream_patience(timeout_s)
        with contextlib.closing(backlog):
            while True:
                requests = (
                    digits_pb2.ClassifyStreamRequest(request=r) async for r in backlog.requests()
                )
                stream = self._start(self._stub.ClassifyStream, requests, patience)
                try:
                    async for response in stream:
                        answer = item_answer(response)
                        if isinstance(answer, DigitError) and answer.code in PASSING:
                            refusal = answer
                            break
                        backlog.answered()
                        patience.renew()
                        yield answer
                    else:
                        backlog.finish()
                        return
                except grpc.aio.AioRpcError as error:
                    refusal = self._error(error)
                finally:
                    stream.cancel()
                await asyncio.sleep(patience.wait_s(refusal))

    async def get_model(self, *, timeout_s: float | None = None) -> tuple[Model, dict[str, Any]]:
        """See ``DigitClient.get_model``."""
        request, patience = digits_pb2.GetModelRequest(), self._patience(timeout_s)
        response = await self._answer(self._stub.GetModel, request, patience)
        return served_model(response.model), json.loads(response.manifest_json)

    async def close(self) -> None:
        """Closes the connections."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _result(self, sent: Sent, offset: int) -> Any:
        """The response to a request under way, or to a further attempt."""
        try:
            try:
                return await sent.call
            except grpc.aio.AioRpcError as error:
                refusal = self._error(error)
            await asyncio.sleep(sent.patience.wait_s(refusal))
            return await self._answer(self._stub.Classify, sent.request, sent.patience)
        except DigitError as error:
            error.offset = offset
            raise

    async def _answer(self, method: Any, request: Any, patience: Patience) -> Any:
        while True:
            try:
                return await self._start(method, request, patience)
            except grpc.aio.AioRpcError as error:
                refusal = self._error(error)
            await asyncio.sleep(patience.wait_s(refusal))
