"""Plain grpcio servicers that feed the same batcher: GetModel and ClassifyStream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from digits.v1 import digits_pb2
from service import wire
from service.call import RpcListener
from service.classify import Classify
from service.job import Refusal
from service.metrics import SERVICE, Metrics
from service.rpcs import Origin, Rpcs
from service.security.guard import Guard
from service.status import (
    REFUSALS,
    InvalidRequestError,
    Status,
    idle_stream,
    too_many_streams,
    unavailable,
)
from service.stream import Patience, StreamItem, Window, item_request, stream_response
from service.transports.grpcio import Mailbox, trailing_metadata

if TYPE_CHECKING:
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import RpcMethodHandler
    from grpc.aio import ServicerContext


class DigitClassifier:
    """Everything of the service but Classify, which a transport carries.

    Args:
        classify: The hot path, and the model in service.
        metrics: Counts the RPCs.
        listeners: Are told how they end.
        max_ahead_images: Images that one stream may hold, in work or unread, if it is not one item.
        max_streams: Streams at the same time.
        idle_s: Seconds that a stream may neither send nor take anything; 0 allows any.
        guard: Tells whose token a stream shows; None where none is needed.
    """

    def __init__(
        self,
        classify: Classify,
        metrics: Metrics,
        listeners: Sequence[RpcListener],
        *,
        max_ahead_images: int,
        max_streams: int,
        idle_s: float,
        guard: Guard | None = None,
    ) -> None:
        self._classify = classify
        self._guard = guard
        self._max_streams = max_streams
        self._idle_s = idle_s
        self._max_ahead_bytes = max_ahead_images * wire.IMAGE_BYTES
        self._rpcs = Rpcs(SERVICE, metrics, listeners)
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._closing = asyncio.Event()
        self._streams: set[asyncio.Task[Any]] = set()

    def handlers(self) -> dict[str, RpcMethodHandler]:
        """The method handlers by name. Messages stay bytes: a malformed one is answered here."""
        return {
            "GetModel": grpc.unary_unary_rpc_method_handler(self._get_model),
            "ClassifyStream": grpc.stream_stream_rpc_method_handler(self._classify_stream),
        }

    def close(self) -> None:
        """Ends streams once what they sent is answered."""
        self._closing.set()

    async def finished(self, grace_s: float) -> bool:
        """Waits for streams to end after ``close``; True if all did within the grace."""
        if self._streams:
            await asyncio.wait(self._streams, timeout=grace_s)
        return not self._streams

    async def _get_model(self, request: bytes, context: ServicerContext) -> bytes:
        with self._rpcs.counting("GetModel", context, Origin.of(context)):
            return await self.get_model(request, context)

    async def _classify_stream(
        self, requests: AsyncIterator[bytes], context: ServicerContext
    ) -> AsyncIterator[bytes]:
        origin = Origin.of(context)
        responses = self.classify_stream(requests, context, origin)
        with self._rpcs.counting("ClassifyStream", context, origin):
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response

    async def get_model(self, request: bytes, context: ServicerContext) -> bytes:
        """Which model serves; UNAVAILABLE while none does."""
        try:
            digits_pb2.GetModelRequest.FromString(request)
        except DecodeError:
            expected = "a serialised GetModelRequest"
            status = InvalidRequestError("request", expected, "malformed bytes").status()
            await context.abort(status.code, status.message, trailing_metadata(status))
        model = self._classify.model
        if model is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is loading")
        assert model is not None
        response = digits_pb2.GetModelResponse(
            model=model.ref,
            labels=model.artifact.manifest["labels"],
            manifest_json=model.artifact.manifest_json,
        )
        return response.SerializeToString()

    async def classify_stream(
        self, requests: AsyncIterator[bytes], context: ServicerContext, origin: Origin
    ) -> AsyncGenerator[bytes]:
        """Answers items in order, taking a bounded number of them in advance."""
        if len(self._streams) >= self._max_streams:
            status = too_many_streams(self._max_streams)
            await context.abort(status.code, status.message, trailing_metadata(status))
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)
        stream.add_done_callback(self._streams.discard)
        patience = Patience(self._idle_s)
        window = Window(self._max_ahead_bytes)
        reader = asyncio.create_task(self._read(requests, origin, window, patience))
        try:
            while (item := await window.oldest()) is not None:
                patience.ours = True
                answer = await item.outcome
                patience.ours = False
                patience.moved()
                yield stream_response(answer)
                patience.moved()
                window.sent()
                del item, answer  # a stream may be silent for long
            stopped = await reader  # raises what ended the stream, if that was an error
        except asyncio.CancelledError:
            if not patience.ended:
                raise
            status = idle_stream(self._idle_s)
            await context.abort(status.code, status.message)
        finally:
            patience.stop()
            reader.cancel()
            window.abandon()
        if stopped is not None:
            await context.abort(stopped.code, stopped.message)

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        origin: Origin,
        window: Window,
        patience: Patience,
    ) -> Status | None:
        """Moves requests into the window and the batcher.

        Returns:
            None if the caller ended the stream, else how it is to end.
        """
        closing = asyncio.create_task(self._closing.wait())
        iterator = aiter(requests)
        try:
            while not closing.done():
                following = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait({following, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    break
                message = following.result()
                if message is None:
                    return None
                patience.moved()
                caller = self._caller(origin)
                if caller is None:  # its token was revoked since the stream began
                    return Status(*REFUSALS[Refusal.UNAUTHENTICATED])
                item = StreamItem(
                    self._mailbox,
                    item_request(message),
                    received=time.monotonic(),
                    deadline=origin.deadline,
                    peer=origin.peer,
                )
                item.caller = caller
                await window.put(item)
                self._classify.receive([item])
                del message, item  # a stream may be silent for long
            return unavailable("the server is shutting down")
        finally:
            closing.cancel()
            window.end()

    def _caller(self, origin: Origin) -> str | None:
        """Whose token the stream shows; empty where none is needed, None if it shows none."""
        if self._guard is None:
            return ""
        return self._guard.caller(origin.metadata)
