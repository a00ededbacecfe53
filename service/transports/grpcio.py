"""The ordinary grpcio server, and Classify over it as a generic bytes handler."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from service.call import Call
from service.metrics import Metrics
from service.status import PUSHBACK_KEY, Status
from service.transports import Limits, TransportError
from service.wire import IMAGE_BYTES

if TYPE_CHECKING:
    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
    ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import RpcMethodHandler
    from grpc.aio import ServerInterceptor, ServicerContext


# The event loop brings calls one or two a turn, and a batch costs Python as much as a call costs
# grpcio's wrapper. While more than a few callers wait, calls are gathered, for this long at most
# (uvloop rounds up to whole milliseconds).
FEW_CALLS = 4
GATHER_S = 2e-3
# A request of more bytes than this ends the burst.
LARGE_BYTES = 16 * IMAGE_BYTES


class AsyncCall(Call):
    """A call whose answer a coroutine awaits.

    Args:
        mailbox: Brings answers from slot threads to the event loop.

    Attributes:
        outcome: Resolves to the serialised response, or to a status.
    """

    def __init__(self, mailbox: Mailbox, request: bytes, **rest: Any) -> None:
        super().__init__(request, **rest)
        self._mailbox = mailbox
        self.outcome: asyncio.Future[bytes | Status] = mailbox.loop.create_future()

    def respond(self, response: bytes) -> bool:
        """See ``Call.respond``."""
        return self._mailbox.put(self, response)

    def fail(self, status: Status) -> bool:
        """See ``Call.fail``."""
        return self._mailbox.put(self, status)


class Mailbox:
    """Carries answers from any thread to the event loop: one wake-up a burst, not one a call.

    Args:
        loop: The event loop, on whose thread it is made.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._answers: deque[tuple[AsyncCall, bytes | Status]] = deque()
        self._awake = False

    def put(self, call: AsyncCall, answer: bytes | Status) -> bool:
        """Delivers, from another thread soon; False if the caller has left."""
        if call.cancelled:
            return False
        if threading.get_ident() == self._thread:  # it was run or refused right here
            return _set(call, answer)
        self._answers.append((call, answer))
        if not self._awake:
            self._awake = True
            self.loop.call_soon_threadsafe(self._deliver)
        return True

    def _deliver(self) -> None:
        self._awake = False  # first: an answer put from here on wakes the loop again
        while self._answers:
            _set(*self._answers.popleft())


def _set(call: AsyncCall, answer: bytes | Status) -> bool:
    """False if the caller has left."""
    if call.outcome.done():
        return False
    call.outcome.set_result(answer)
    return True


class Gatherer:
    """Hands calls over in bursts: as many as last time, or what has come when the wait is over.

    Callers that wait for an answer before they call again come back as many as were answered. A few
    callers do not wait for each other.

    Args:
        loop: The event loop.
        hand_over: Takes bursts of calls.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, hand_over: Callable[[list[Call]], None]
    ) -> None:
        self._loop = loop
        self._take = hand_over
        self._arrived: list[Call] = []
        self._unanswered = 0
        self._last_burst = 0
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False

    async def answer(self, call: AsyncCall) -> bytes | Status:
        """What becomes of a call, which is part of the burst that is handed over soon."""
        self._unanswered += 1
        self._arrived.append(call)
        if not self._leaving:
            if self._is_whole() or len(call.request) > LARGE_BYTES:
                # What else comes in this turn of the loop is taken along: so bursts can grow.
                self._leaving = True
                if self._timer is not None:
                    self._timer.cancel()
                self._loop.call_soon(self._hand_over)
            elif self._timer is None:
                self._timer = self._loop.call_later(GATHER_S, self._hand_over)
        try:
            return await call.outcome
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        finally:
            self._unanswered -= 1

    def _is_whole(self) -> bool:
        """Whether nobody is waited for any more."""
        if self._last_burst > FEW_CALLS:
            return len(self._arrived) >= self._last_burst
        return self._unanswered <= FEW_CALLS

    def _hand_over(self) -> None:
        self._leaving, self._timer = False, None
        burst, self._arrived = self._arrived, []
        self._last_burst = len(burst)
        self._take(burst)


class ClassifyHandler:
    """Classify on the grpcio server: request and response stay bytes.

    Args:
        receive: Takes bursts of calls.
        metrics: Counts calls that began.

    Attributes:
        method_handler: To be added to the server, which passes bytes where no serialiser is named.
    """

    def __init__(self, receive: Callable[[Sequence[Call]], None], metrics: Metrics) -> None:
        self._receive = receive
        self._metrics = metrics
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._gatherer = Gatherer(self._mailbox.loop, self._hand_over)
        self.method_handler: RpcMethodHandler = grpc.unary_unary_rpc_method_handler(self._classify)

    async def _classify(self, request: bytes, context: ServicerContext) -> bytes:
        now = time.monotonic()
        remaining = context.time_remaining()
        call = AsyncCall(
            self._mailbox,
            request,
            received=now,
            deadline=None if remaining is None else now + remaining,
            metadata=context.invocation_metadata() or (),
            peer=context.peer(),
        )
        answer = await self._gatherer.answer(call)
        if isinstance(answer, bytes):
            return answer
        del request, call  # the context keeps abort's error, and that this frame
        await context.abort(answer.code, answer.message, trailing_metadata(answer))
        raise AssertionError("abort raises; this is a bug")

    def _hand_over(self, burst: list[Call]) -> None:
        self._metrics.started(len(burst))
        self._receive(burst)


def trailing_metadata(status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """The details, and the pushback that makes gRPC's own retries wait as long as they should."""
    if not status.retry_after_ms:
        return status.metadata()
    return (*status.metadata(), (PUSHBACK_KEY, str(status.retry_after_ms)))


def make_server(
    limits: Limits, *, private: bool, interceptors: Sequence[ServerInterceptor] = ()
) -> grpc.aio.Server:
    """A server with ports that no other process shares.

    Args:
        limits: What callers are held to.
        private: Its one caller is the native front, over which all of its callers' streams come:
            bounds on a connection do not apply.
        interceptors: See ``grpc.aio.server``.
    """
    options = [
        ("grpc.max_receive_message_length", limits.message_bytes),
        # Both, or grpc refuses calls between the two at random.
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.so_reuseport", 0),
        # The default is 1,000: behind a burst of calls, whoever sent it, others would be reset.
        ("grpc.server.max_pending_requests", limits.pending),
        ("grpc.server.max_pending_requests_hard_limit", 2 * limits.pending),
    ]
    if not private:
        options += _connection_options(limits)
    return grpc.aio.server(options=options, interceptors=interceptors)


def _connection_options(limits: Limits) -> list[tuple[str, int]]:
    options = [
        # More are closed as they are accepted: descriptors are left for reloads and metrics.
        ("grpc.max_allowed_incoming_connections", limits.connections),
        # Without it a connection has as many calls as it likes.
        ("grpc.max_concurrent_streams", limits.calls_per_connection),
        # The default asks every two hours; a peer whose machine is gone holds its calls until then.
        ("grpc.keepalive_time_ms", _milliseconds(limits.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(limits.keepalive_timeout_s)),
        # What really ends it: a ping is given a minute, whatever the option above says.
        ("grpc.http2.ping_timeout_ms", _milliseconds(limits.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        # The default takes one ping in five minutes, where clients are commonly set to send one
        # every ten seconds: those were sent away.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(limits.ping_interval_s)),
        ("grpc.max_connection_idle_ms", _milliseconds(limits.idle_s)),
        # For a caller that connects and says nothing; the default is two minutes.
        ("grpc.server_handshake_timeout_ms", _milliseconds(limits.handshake_s)),
    ]
    if limits.connection_age_s:
        options += [
            ("grpc.max_connection_age_ms", _milliseconds(limits.connection_age_s)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(limits.connection_grace_s)),
        ]
    return options


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Listens on ``host:port`` or ``unix:path``; returns the port really bound.

    Args:
        server: What listens.
        address: Where.
        credentials: For TLS; None for plaintext.

    Raises:
        TransportError: If it can not.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise TransportError(f"can not listen on {address}: {error}") from error
