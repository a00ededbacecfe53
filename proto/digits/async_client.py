"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

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
from digits.base_client import IN_FLIGHT, BaseClient, PendingCall
from digits.errors import ClientStateError, DigitError
from digits.fork import is_forked
from digits.inputs import (
    ErrorsLast,
    Image,
    Pictures,
    classify_requests,
    one_request,
    several_files,
)
from digits.progress import Progress
from digits.resume import AsyncUnanswered
from digits.retry import Retry
from digits.v1 import digits_pb2

T = TypeVar("T")


class AsyncDigitClient(BaseClient):
    """``DigitClient`` for asyncio. The event loop of its first call owns it, and reads paths too.

    Its settings are those of ``BaseClient``.
    """

    _insecure_channel = staticmethod(grpc.aio.insecure_channel)
    _secure_channel = staticmethod(grpc.aio.secure_channel)
    _loop: asyncio.AbstractEventLoop | None = None

    async def classify(
        self,
        images: Pictures,
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """See ``DigitClient.classify``."""
        answers = []
        async with contextlib.aclosing(self.classify_batches(images, timeout_s=timeout_s)) as parts:
            async for answer in parts:
                answers.append(answer)
                if progress is not None:
                    progress(len(answer.predictions))
        return joined(answers)

    async def classify_batches(
        self, images: Pictures, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Classification, None]:
        """See ``DigitClient.classify_batches``."""
        requests = ErrorsLast(classify_requests(images, self._request_images))
        sent: deque[PendingCall] = deque()
        done = 0
        try:
            while True:
                for request in islice(requests, IN_FLIGHT - len(sent)):
                    sent.append(self._send("Classify", request, timeout_s))
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
    ) -> AsyncGenerator[Classification | DigitError, None]:
        """See ``DigitClient.classify_stream``; ``batches`` is read on the event loop."""
        unanswered = AsyncUnanswered(one_request(images) async for images in batches)
        retry = self._stream_retry(timeout_s)
        with contextlib.closing(unanswered):
            while True:
                requests = (
                    digits_pb2.ClassifyStreamRequest(request=r) async for r in unanswered.requests()
                )
                stream = self._start("ClassifyStream", requests, retry)
                responses, failure = aiter(stream), None
                try:
                    while (response := await self._outcome(anext(responses, None))) is not None:
                        answer = item_answer(response)
                        if isinstance(answer, DigitError) and answer.transient:
                            failure = answer
                            break
                        unanswered.answered()
                        retry.reset()
                        yield answer
                except DigitError as error:
                    failure = error
                finally:
                    stream.cancel()
                if failure is None:
                    unanswered.finish()
                    return
                await asyncio.sleep(retry.wait_s(failure))

    async def get_model(self, *, timeout_s: float | None = None) -> tuple[Model, dict[str, Any]]:
        """See ``DigitClient.get_model``."""
        request = digits_pb2.GetModelRequest()
        response = await self._answer("GetModel", request, self._retry(timeout_s))
        return served_model(response.model), json.loads(response.manifest_json)

    async def close(self) -> None:
        """Closes the connections; calls under way and later ones raise ClientStateError.

        Raises:
            ClientStateError: If the client was used on another event loop.
        """
        if is_forked():
            return  # the channel is the parent's
        self._check_place()
        channel = self._close()
        if channel is not None:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_place(self) -> None:
        super()._check_place()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise ClientStateError(
                "the client was used on another event loop and can not be on this one: make a "
                "client on each"
            )

    async def _result(self, sent: PendingCall, offset: int) -> Any:
        """The response to a request under way, or to a further attempt."""
        try:
            try:
                return await self._outcome(sent.call)
            except DigitError as error:
                await asyncio.sleep(sent.retry.wait_s(error))
            return await self._answer("Classify", sent.request, sent.retry)
        except DigitError as error:
            error.offset = offset
            raise

    async def _answer(self, method: str, request: Any, retry: Retry) -> Any:
        while True:
            try:
                return await self._outcome(self._start(method, request, retry))
            except DigitError as error:
                await asyncio.sleep(retry.wait_s(error))

    async def _outcome(self, call: Awaitable[T]) -> T:
        """The result of a call.

        gRPC also raises CancelledError where the call was cancelled, not the task that waits for
        it. That is no matter of the task, which would end of it without a word.

        Raises:
            DigitError: If it fails.
            ClientStateError: If the client was closed meanwhile.
        """
        try:
            outcome = await call
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._check_open()
            cancelled = grpc.StatusCode.CANCELLED
            raise DigitError(cancelled, "the call was cancelled", self._address) from None
        self._reached()
        return outcome
