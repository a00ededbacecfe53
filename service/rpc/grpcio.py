"""The reference transport: a plain grpc.aio server with the same routes, on a thread of its own.

For callers that are trusted, or behind a proxy: grpcio bounds calls, not the bytes they hold, and
its server stops when every call has ended, though answers may still wait for a slow connection.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from service.rpc.call import (
    Hooks,
    Metadata,
    Receiver,
    Route,
    StreamRoute,
    TransportError,
    UnaryRoute,
)
from service.rpc.recorder import CODES

if TYPE_CHECKING:
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc.aio import ServicerContext


INVALID_ARGUMENT: int = grpc.StatusCode.INVALID_ARGUMENT.value[0]
MAX_PENDING = 4096
# Requests of a call that is cancelled end like those of one that sent none, before it is notified.
CANCELLATION_S = 0.1
RESOURCE_EXHAUSTED: int = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
UNIMPLEMENTED: int = grpc.StatusCode.UNIMPLEMENTED.value[0]
CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]


@dataclass(frozen=True, kw_only=True)
class GrpcioLimits:
    """The limits on what callers may use, as far as grpcio has them.

    Attributes:
        message_bytes: Of a request, after decompression.
        metadata_bytes: Of a call.
        connection_age_s: After which a connection is asked to go; 0 never.
        connection_grace_s: What its calls get then.
    """

    message_bytes: int
    metadata_bytes: int = 2**14
    connection_age_s: float = 0.0
    connection_grace_s: float = 20.0


class GrpcioCall:
    """See ``RpcCall``; its answers go to a queue that the coroutine of the RPC empties."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, path: str, context: ServicerContext
    ) -> None:
        self.path = path
        self.metadata: Metadata = tuple(context.invocation_metadata() or ())
        self.peer = context.peer()
        self.received = time.monotonic()
        remaining = context.time_remaining()
        self.deadline = None if remaining is None else self.received + remaining
        self.message = b""
        self.cancelled = False
        self.caller = ""
        self.state: Any = None
        self.unsent = 0
        self.receiver: Receiver | None = None
        self.has_arrived = False
        self.running = asyncio.Event()
        self.running.set()
        # Messages, and at last how the call ends.
        self.out: asyncio.Queue[bytes | tuple[int, str, Metadata]] = asyncio.Queue()
        self._loop = loop
        self._lock = threading.Lock()
        self._ended = False

    def respond(self, message: bytes) -> bool:
        """See ``RpcCall``."""
        return self.send(message) and self.end()

    @staticmethod
    def respond_all(answers: Sequence[tuple[GrpcioCall, bytes]]) -> list[bool]:
        """See ``RpcCall``."""
        return [call.respond(message) for call, message in answers]

    def send(self, message: bytes) -> bool:
        """See ``RpcCall``."""
        return self._put(message, len(message))

    def end(self, code: int = 0, message: str = "", trailers: Metadata = ()) -> bool:
        """See ``RpcCall``."""
        with self._lock:
            first, self._ended = not self._ended, True
        if not first or self.cancelled:
            return False
        self._loop.call_soon_threadsafe(self.out.put_nowait, (code, message, trailers))
        return True

    @staticmethod
    def end_all(
        calls: Sequence[GrpcioCall], code: int, message: str = "", trailers: Metadata = ()
    ) -> list[bool]:
        """See ``RpcCall``."""
        return [call.end(code, message, trailers) for call in calls]

    def _put(self, message: bytes, size: int) -> bool:
        with self._lock:
            if self._ended or self.cancelled:
                return False
            self.unsent += size
        self._loop.call_soon_threadsafe(self.out.put_nowait, message)
        return True

    def was_sent(self, size: int) -> bool:
        """The caller took a message; True if that was all there is."""
        with self._lock:
            self.unsent -= size
            return not self.unsent

    def leave(self) -> bool:
        """The caller has left; False if the call had ended before."""
        with self._lock:
            self.cancelled = True
            return not self._ended

    def pause(self) -> None:
        """See ``RpcCall``. On the event loop's thread, from ``Receiver.message``."""
        self.running.clear()

    def resume(self) -> None:
        """See ``RpcCall``."""
        self._loop.call_soon_threadsafe(self.running.set)


class GrpcioServer:
    """See ``Transport``.

    Args:
        address: ``host:port``; port 0 picks a free one.
        routes: What answers each method, by its path.
        hooks: See ``Hooks``.
        limits: What callers may use.
        credentials: For TLS; None for plaintext.

    Raises:
        TransportError: If the address can not be had.
    """

    def __init__(
        self,
        address: str,
        routes: Mapping[str, Route],
        *,
        hooks: Hooks,
        limits: GrpcioLimits,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._cut = 0
        self._routes = routes
        self._hooks = hooks
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpcio", daemon=True)
        self._thread.start()
        self.port = self._do(self._bind(address, limits, credentials))

    @property
    def threads(self) -> list[threading.Thread]:
        """See ``Transport``."""
        return [self._thread]

    def start(self) -> None:
        """See ``Transport``."""
        self._do(self._server.start())

    def drain(self, grace_s: float) -> bool:
        """See ``Transport``."""
        self._cut = 0
        self._do(self._server.stop(grace_s))
        return not self._cut

    def close(self) -> None:
        """See ``Transport``."""
        self._do(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)

    def relieve(self) -> None:
        """See ``Transport``: an event loop has one thread only."""

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _bind(
        self, address: str, limits: GrpcioLimits, credentials: grpc.ServerCredentials | None
    ) -> int:
        options: list[tuple[str, int]] = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_metadata_size", limits.metadata_bytes),
            ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
            # Of more calls than this that wait to be accepted, grpcio resets some at random.
            ("grpc.server.max_pending_requests", MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
            # Clients are commonly set to ping every ten seconds; the default sends those away.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
        if limits.connection_age_s:
            options += [
                ("grpc.max_connection_age_ms", round(limits.connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", round(limits.connection_grace_s * 1000)),
            ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers([_Handlers(self._serve, self._routes)])
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise TransportError(f"can not listen on {address}: {error}") from error

    async def _serve(
        self, path: str, route: Route, requests: Any, context: ServicerContext
    ) -> bytes:
        """Serves one RPC; returns the response of a unary one."""
        call = GrpcioCall(self._loop, path, context)
        reader = None
        if self._hooks.admit(call):
            reader = asyncio.create_task(self._read(route, requests, call))
        try:
            response, ended = await self._write(call, context, is_unary=route.is_unary)
        except BaseException:
            if call.leave() and reader is not None:
                self._cut += 1
                self._tell_left(route, call)
            raise
        finally:
            if reader is not None:
                reader.cancel()
        code, message, trailers = ended
        del call, reader  # the context keeps abort's error, and that this frame
        if code:
            await context.abort(CODES[code], message, trailers)
        return response

    async def _write(
        self, call: GrpcioCall, context: ServicerContext, *, is_unary: bool
    ) -> tuple[bytes, tuple[int, str, Metadata]]:
        """Sends what a stream has, until the call ends; returns what a unary call has."""
        response = b""
        while True:
            answer = await call.out.get()
            if isinstance(answer, tuple):
                return response, answer
            if is_unary:
                response = answer
                continue
            await context.write(answer)
            if call.was_sent(len(answer)) and call.receiver is not None:
                call.receiver.sent()

    async def _read(self, route: Route, requests: Any, call: GrpcioCall) -> None:
        """Hands what comes to the route."""
        if not isinstance(route, StreamRoute):
            async for call.message in requests:
                call.received = time.monotonic()
                call.has_arrived = True
                if self._takes(route, call, call.message):
                    route.receive([call])
                return
            message = "request: expected 1 message, got none"
            await asyncio.sleep(CANCELLATION_S)
            if call.end(INVALID_ARGUMENT, message):
                self._hooks.refused([call], INVALID_ARGUMENT, message)
            return
        receiver = call.receiver = route.open(call)
        if receiver is None:
            return
        async for message in requests:
            if not self._takes(route, call, message):
                return
            receiver.message(message)
            await call.running.wait()
        receiver.half_closed()

    def _takes(self, route: Route, call: GrpcioCall, message: bytes) -> bool:
        """True if a message is within its method's limit; else ends the call."""
        limit = route.max_message_bytes
        if len(message) <= limit or route is UNKNOWN:
            return True
        text = f"SERVER: Received message larger than max ({len(message)} vs. {limit})"
        if call.end(RESOURCE_EXHAUSTED, text):
            if call.receiver is not None:
                call.receiver.failed(RESOURCE_EXHAUSTED, text)
            else:
                self._hooks.refused([call], RESOURCE_EXHAUSTED, text)
        return False

    def _tell_left(self, route: Route, call: GrpcioCall) -> None:
        if call.receiver is not None:
            call.receiver.cancelled()
        elif not call.has_arrived and not isinstance(route, StreamRoute):
            self._hooks.refused([call], CANCELLED, "the caller left")


def _unknown(calls: Sequence[Any]) -> None:
    for call in calls:
        call.end(UNIMPLEMENTED, "this server has no such method")


UNKNOWN = UnaryRoute(_unknown, 0)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Every route as a stream of requests, and a unary one reads one."""

    def __init__(self, serve: Callable[..., Any], routes: Mapping[str, Route]) -> None:
        self._serve = serve
        self._handlers = {path: _handler(serve, path, route) for path, route in routes.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See ``grpc.GenericRpcHandler``; an unknown method, too, is for those who may call."""
        path = handler_call_details.method
        return self._handlers.get(path) or _handler(self._serve, path, UNKNOWN)


def _handler(serve: Callable[..., Any], path: str, route: Route) -> Any:
    async def unary(requests: Any, context: ServicerContext) -> bytes:
        response: bytes = await serve(path, route, requests, context)
        return response

    async def stream(requests: Any, context: ServicerContext) -> None:
        await serve(path, route, requests, context)

    if route.is_unary:
        return grpc.stream_unary_rpc_method_handler(unary)
    return grpc.stream_stream_rpc_method_handler(stream)
