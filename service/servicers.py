"""Plain grpcio servicers that feed the same batcher: GetModel and ClassifyStream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

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
from service.transports.grpcio import AsyncCall, Mailbox, trailing_metadata

if TYPE_CHECKING:
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import RpcMethodHandler
    from grpc.aio import ServicerContext

# Items of one stream that may be in work or wait for a slow reader: enough to keep every slot
# busy with messages of a full batch, and a bound on what one stream can hold in memory.
STREAM_WINDOW = 8
# A tag that does not end: no message of any kind.
MALFORMED = b"\xff"


class StreamItem(AsyncCall):
    """An item of a stream, which is not an RPC of its own."""

    is_rpc = False

    def __init__(self, mailbox: Mailbox, request: bytes, **rest: Any) -> None:
        super().__init__(mailbox, request, **rest)
        self.size = len(request)


class Patience:
    """Cancels the running task when nothing has moved in its stream for too long.

    Args:
        idle_s: Seconds that nothing may move; 0 waits for ever.

    Attributes:
        ended: Whether it has lost it.
        ours: Whether the caller waits for us: then nothing is held against it.
    """

    def __init__(self, idle_s: float) -> None:
        self.ended = self.ours = False
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._moved = self._loop.time()
        self._timer = self._loop.call_later(idle_s, self._look) if idle_s else None

    def moved(self) -> None:
        """A request came or an answer was taken."""
        self._moved = self._loop.time()

    def stop(self) -> None:
        """The stream ended by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left = self._moved + self._idle_s - self._loop.time()
        if self.ours:
            left = self._idle_s
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        elif self._task is not None:
            self.ended = True
            self._task.cancel()


class DigitClassifier:
    """Everything of the service but Classify, which a transport carries.

    Args:
        classify: The hot path, and the model in service.
        metrics: Counts the RPCs.
        listeners: Are told how they end.
        max_ahead_images: Images that one stream may have in the queue beside the item that waits.
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
        window: asyncio.Queue[StreamItem | None] = asyncio.Queue(STREAM_WINDOW)
        reader = asyncio.create_task(self._read(requests, origin, window, patience))
        item: StreamItem | None = None
        try:
            while (item := await window.get()) is not None:
                patience.ours = True
                answer = await item.outcome
                patience.ours = False
                patience.moved()
                yield _stream_response(answer)
                patience.moved()
            stopped = await reader  # raises what ended the stream, if that was an error
        except asyncio.CancelledError:
            if not patience.ended:
                raise
            status = idle_stream(self._idle_s)
            await context.abort(status.code, status.message)
        finally:
            patience.stop()
            reader.cancel()
            for left in (item, *_drain(window)):
                if left is not None:
                    left.cancelled = True
        if stopped is not None:
            await context.abort(stopped.code, stopped.message)

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        origin: Origin,
        window: asyncio.Queue[StreamItem | None],
        patience: Patience,
    ) -> Status | None:
        """Moves requests into the window and the batcher.

        Returns:
            None if the caller ended the stream, else how it is to end.
        """
        closing = asyncio.create_task(self._closing.wait())
        iterator = aiter(requests)
        unanswered: deque[StreamItem] = deque()
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
                    _item_request(message),
                    received=time.monotonic(),
                    deadline=origin.deadline,
                    peer=origin.peer,
                )
                item.caller = caller
                await self._make_room(unanswered, item)
                await window.put(item)
                self._classify.receive([item])
            return unavailable("the server is shutting down")
        finally:
            closing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await window.put(None)

    def _caller(self, origin: Origin) -> str | None:
        """Whose token the stream shows; empty where none is needed, None if it shows none."""
        if self._guard is None:
            return ""
        return self._guard.caller(origin.metadata)

    async def _make_room(self, unanswered: deque[StreamItem], item: StreamItem) -> None:
        """Waits until the stream's own items leave room in the queue for one more."""
        unanswered.append(item)
        while len(unanswered) > 1 and sum(i.size for i in unanswered) > self._max_ahead_bytes:
            await asyncio.wait({unanswered.popleft().outcome})


def _item_request(message: bytes) -> bytes:
    """The ClassifyRequest inside a ClassifyStreamRequest; malformed bytes if there is none."""
    view = wire.sole_field(message)
    if view is not None:
        return bytes(view)
    try:
        request = digits_pb2.ClassifyStreamRequest.FromString(message).request
    except DecodeError:
        return MALFORMED  # the item itself may well read as a ClassifyRequest
    return request.SerializeToString()


def _drain(window: asyncio.Queue[StreamItem | None]) -> list[StreamItem | None]:
    return [window.get_nowait() for _ in range(window.qsize())]


def _stream_response(answer: bytes | Status) -> bytes:
    if isinstance(answer, bytes):
        return wire.as_field_1(answer)
    error = digits_pb2.StreamError(
        code=answer.code.value[0], message=answer.message, retry_after_ms=answer.retry_after_ms
    )
    return digits_pb2.ClassifyStreamResponse(error=error).SerializeToString()


class Health(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """The standard health service, whose watches end when the server closes."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends watches, which would otherwise keep the server from stopping in time."""
        self._closing.set()

    async def Watch(  # noqa: N802 - the method's name in the proto
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> None:
        """Streams the status until the caller leaves or the server closes."""
        watch = asyncio.create_task(super().Watch(request, context))
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({watch, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            closing.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
