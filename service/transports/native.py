"""Unary methods over pygrpc-native: HTTP/2 and gRPC in Rust, calls handed over in bursts.

What has no route here goes on to the grpcio server on a private Unix socket behind it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from service.call import Call
from service.job import Refusal
from service.status import REFUSALS, Status, too_large
from service.transports import Limits, TransportError, socket_address

if TYPE_CHECKING:
    from pygrpc_native._native import CallDetails

logger = logging.getLogger(__name__)

# In the state column of /proc/net/tcp.
TCP_LISTEN = "0A"
# Calls taken over in one trip across the GIL at most.
MAX_BURST = 1024
# One thread reads and writes sockets faster than two that compete with the slots for the cores.
IO_THREADS = 1


# An answer may still be on its way from the front to the kernel when nothing waits there.
QUIET_POLLS = 3
POLL_S = 0.05


def unsent_bytes(port: int) -> int:
    """Bytes that the kernel has not got through to callers of a local port; 0 where unknown."""
    total = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, queues = line.split()[:5]
            if state != TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                total += int(queues.partition(":")[0], 16)
    return total


class NativeCall(Call):
    """A call of the native front, answered by its id."""

    def __init__(
        self,
        transport: NativeTransport,
        call_id: int,
        request: bytes,
        received: float,
        details: CallDetails,
    ) -> None:
        metadata, peer, remaining = details
        deadline = None if remaining is None else received + remaining
        super().__init__(request, received, deadline, metadata, peer)
        self._transport = transport
        self._call_id = call_id

    def respond(self, response: bytes) -> bool:
        """See ``Call.respond``."""
        self._transport.calls.pop(self._call_id, None)
        return self._transport.front.respond(self._call_id, response)

    def fail(self, status: Status) -> bool:
        """See ``Call.fail``. The front refuses ``grpc-`` metadata other than the details."""
        self._transport.calls.pop(self._call_id, None)
        return self._transport.front.fail(
            self._call_id, status.code.value[0], status.message, status.metadata()
        )


@dataclass(frozen=True)
class Route:
    """A method that the front answers itself.

    Attributes:
        path: Of the method.
        make: A call of it: from the transport, id, request, time of arrival and details.
        count: Counts calls that began.
        admit: Fails those calls of a burst that may not be read; returns the others.
        receive: Takes bursts of calls that may.
    """

    path: str
    make: Callable[[NativeTransport, int, bytes, float, CallDetails], NativeCall]
    count: Callable[[int], None]
    admit: Callable[[Sequence[Call]], Sequence[Call]]
    receive: Callable[[Sequence[Call]], None]


class NativeTransport:
    """Owns the native front and the thread that takes calls from it.

    Args:
        host: Address to listen on.
        port: Port, or 0 for a free one.
        fallback: Path of the Unix socket of the grpcio server for every other method.
        routes: The methods that are answered here.
        refuse: Fails a call with a status.
        limits: What the front can hold callers to. It has no bound on connections or on a message:
            larger ones are refused here, after they were read.

    Attributes:
        port: The port really bound.
        calls: Calls that have no answer yet, by id.
        thread: What takes calls from the front.

    Raises:
        TransportError: If the port can not be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        fallback: str,
        routes: Sequence[Route],
        refuse: Callable[[Call, Status], None],
        limits: Limits,
    ) -> None:
        address = socket_address(host, port)
        try:
            self.front = NativeGrpcFront(
                address,
                [(route.path, False) for route in routes],
                io_threads=IO_THREADS,
                call_details=True,
                keepalive_time_ms=round(limits.keepalive_s * 1000),
                keepalive_timeout_ms=round(limits.keepalive_timeout_s * 1000),
                max_concurrent_streams=limits.calls_per_connection,
                max_metadata_size=limits.metadata_bytes,
            )
        except (OSError, ValueError) as error:
            raise TransportError(f"can not listen on {address}: {error}") from error
        self.port = self.front.bound_port
        self.calls: dict[int, NativeCall] = {}
        self._routes = routes
        self._arrived: deque[tuple[Route, list[NativeCall]]] = deque()
        self._refuse = refuse
        self._max_message_bytes = limits.message_bytes
        self.front.set_fallback(fallback)
        self.thread = self._new_thread()

    def start(self) -> None:
        """Accepts connections."""
        self.front.start()
        self.thread.start()

    def relieve(self) -> None:
        """Lets another thread take calls: the present one may be stuck with a lone call."""
        self.thread = self._new_thread()
        self.thread.start()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._serve, name="native", daemon=True)

    async def finished(self, grace_s: float) -> bool:
        """Waits until every call is answered and sent; False if the grace ended first.

        The front tells when an answer was taken, not when it left, and closing it drops what a slow
        connection has not taken yet. A caller that stops reading altogether is not noticed.
        """
        give_up = time.monotonic() + grace_s
        quiet = 0
        while quiet < QUIET_POLLS:
            quiet = 0 if self._unanswered() or unsent_bytes(self.port) else quiet + 1
            if time.monotonic() >= give_up:
                return quiet > 0
            await asyncio.sleep(POLL_S)
        return True

    def _unanswered(self) -> bool:
        return any(not call.cancelled for call in list(self.calls.values()))

    def close(self) -> None:
        """Closes every connection."""
        self.front.close()
        self.thread.join(1.0)

    def _serve(self) -> None:
        self._hand_over()  # what a thread that was relieved has left
        # That one ends after the burst that it has.
        while threading.current_thread() is self.thread:
            if not self._take():
                return
            self._hand_over()

    def _take(self) -> bool:
        """Waits for a burst and takes it over; False when the front is closed."""
        events = self.front.recv_batch_details(MAX_BURST)
        if events is None:
            return False
        now = time.monotonic()
        bursts: list[list[NativeCall]] = [[] for _ in self._routes]
        for kind, call_id, method, payload, _, details in events:
            if kind == EVENT_CANCEL:
                departed = self.calls.get(call_id)
                if departed is not None:
                    departed.cancelled = True
                continue
            assert payload is not None
            assert details is not None
            call = self._routes[method].make(self, call_id, payload, now, details)
            self.calls[call_id] = call
            bursts[method].append(call)
        self._arrived.extend(zip(self._routes, bursts, strict=True))
        return True

    def _hand_over(self) -> None:
        """Hands over what has arrived: as much of it as no other thread does."""
        while True:
            try:
                route, burst = self._arrived.popleft()
            except IndexError:
                return
            if not burst:
                continue
            try:
                route.count(len(burst))
                route.receive(self._within_size(route.admit(burst)))
            except Exception:  # must not end the thread that every later call needs
                logger.exception("handing calls over failed; this is a bug")
                self.give_up(burst)

    def give_up(self, burst: Sequence[Call]) -> None:
        """Fails those calls of a burst that are neither in the queue nor answered."""
        left = list(self.calls.values())
        for call in burst:
            if call in left and not call.enqueued:
                call.fail(Status(*REFUSALS[Refusal.FAILED]))

    def _within_size(self, burst: Sequence[Call]) -> Sequence[Call]:
        """The calls whose message is not too large; the others are refused."""
        limit = self._max_message_bytes
        if all(len(call.request) <= limit for call in burst):
            return burst
        for call in burst:
            if len(call.request) > limit:
                self._refuse(call, too_large(len(call.request), limit))
        return [call for call in burst if len(call.request) <= limit]
