"""grpc.health.v1: Check and Watch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from service.rpc.call import RpcCall
from service.rpc.open_streams import OpenStreams
from service.rpc.status import Status, fail, unavailable

SERVICE = "grpc.health.v1.Health"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
UNKNOWN = Status(StatusCode.NOT_FOUND, "this server has no such service")
MALFORMED = Status(
    StatusCode.INVALID_ARGUMENT, "request: expected a HealthCheckRequest, got malformed bytes"
)
SHUTTING_DOWN = unavailable("the server is shutting down")
# Watches that may be open at the same time, in all and of one connection.
MAX_WATCHES = 1024
MAX_WATCHES_PER_CONNECTION = 64


class Health:
    """The status of each service. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: dict[str, int] = {}
        self._watches: OpenStreams[Watch] = OpenStreams(MAX_WATCHES, MAX_WATCHES_PER_CONNECTION)

    def set(self, service: str, status: int) -> None:
        """Tells callers and watchers from here on."""
        with self._lock:
            self._status[service] = status
        for watch in self._watches.current():
            if watch.service == service:
                watch.tell()

    def status(self, service: str) -> int | None:
        """Of a service; None for one that is not known."""
        return self._status.get(service)

    def close(self) -> None:
        """Ends watches, which would otherwise keep the server from stopping in time."""
        self._watches.close()

    def check(self, calls: Sequence[RpcCall]) -> None:
        """Answers Check."""
        for call in calls:
            service = _service(call.message)
            status = None if service is None else self._status.get(service)
            if service is None:
                fail(call, MALFORMED)
            elif status is None:
                fail(call, UNKNOWN)
            else:
                response = health_pb2.HealthCheckResponse(status=status)
                call.respond(response.SerializeToString())

    def watch(self, call: RpcCall) -> Watch | None:
        """Begins a Watch, unless too many are open."""
        return self._watches.open(call, partial(Watch, self))

    def remove(self, watch: Watch) -> None:
        """A watch has ended."""
        self._watches.remove(watch.call)


class Watch:
    """One Watch: tells its caller each change, the latest where the caller reads slowly.

    Args:
        health: Knows the status.
        call: Its RPC.

    Attributes:
        service: What is watched; None until the request came, and for an unknown one: its name,
            as long as a message may be, is not kept.
    """

    def __init__(self, health: Health, call: RpcCall) -> None:
        self.call = call
        self.service: str | None = None
        self._health = health
        self._lock = threading.Lock()
        self._asked = False
        self._sent: int | None = None
        self._ended = False

    def tell(self) -> None:
        """Sends the status if it changed; to a caller that does not read, once it does."""
        with self._lock:
            # Read and sent under the lock: the last to be sent is the latest.
            known = None if self.service is None else self._health.status(self.service)
            status = SERVICE_UNKNOWN if known is None else known
            if not self._asked or self._ended or status == self._sent or self.call.unsent:
                return
            self._sent = status
            response = health_pb2.HealthCheckResponse(status=status)
            self.call.send(response.SerializeToString())

    def message(self, message: bytes) -> None:
        """See ``Receiver``: the one request."""
        service = _service(message)
        if service is None or self._asked:
            self.end(MALFORMED)
            return
        if self._health.status(service) is not None:
            self.service = service
        self._asked = True
        self.tell()

    def half_closed(self) -> None:
        """See ``Receiver``."""
        if not self._asked:
            self.end(MALFORMED)

    def sent(self) -> None:
        """See ``Receiver``."""
        self.tell()

    def cancelled(self) -> None:
        """See ``Receiver``."""
        self._end()

    def failed(self, code: int, message: str) -> None:  # noqa: ARG002 - it has ended
        """See ``Receiver``."""
        self._end()

    def close(self) -> None:
        """See ``Stream``."""
        self.end(SHUTTING_DOWN)

    def end(self, status: Status) -> None:
        """Ends the watch."""
        fail(self.call, status)
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._health.remove(self)


def _service(message: bytes) -> str | None:
    """The service that a HealthCheckRequest names; None if it is malformed."""
    try:
        return str(health_pb2.HealthCheckRequest.FromString(message).service)
    except (DecodeError, UnicodeDecodeError):
        return None
