"""The one table that maps what can go wrong to gRPC status codes, messages and rich details."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from service.rpc.call import Metadata, RpcCall
from service.serving.request import Refusal, Request, Violation

# Metadata keys defined by gRPC: rich status, and gRFC A6's server pushback for retries.
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# A shorter hint than this would only make callers spin.
MIN_RETRY_AFTER_S = 0.005
# Where nobody knows when: often enough to find a place soon, too seldom to be a burden.
STREAM_RETRY_AFTER_S = 1.0
# A caller gives up by its own clock, which may be a moment ahead of this one.
CLOCK_SLACK_S = 0.005

REFUSALS: dict[Refusal, tuple[StatusCode, str]] = {
    Refusal.QUEUE_FULL: (StatusCode.RESOURCE_EXHAUSTED, "the queue is full; retry later"),
    Refusal.DEADLINE_UNREACHABLE: (
        StatusCode.RESOURCE_EXHAUSTED,
        "the queue is longer than the deadline allows; retry later",
    ),
    Refusal.EXPIRED: (StatusCode.DEADLINE_EXCEEDED, "the deadline passed in the queue"),
    Refusal.CANCELLED: (StatusCode.CANCELLED, "the caller cancelled"),
    Refusal.STOPPED: (StatusCode.UNAVAILABLE, "the server is shutting down"),
    Refusal.FAILED: (StatusCode.INTERNAL, "inference failed; the server's log says why"),
    Refusal.NO_MEMORY: (StatusCode.RESOURCE_EXHAUSTED, "memory ran out; retry later"),
    # The same for none, a wrong and a revoked one: it must not help to guess.
    Refusal.UNAUTHENTICATED: (StatusCode.UNAUTHENTICATED, "a valid bearer token is needed"),
    Refusal.RATE_LIMITED: (
        StatusCode.RESOURCE_EXHAUSTED,
        "more images were asked for than the rate limit allows; retry later",
    ),
}


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends when it does not end well.

    Attributes:
        code: gRPC status code.
        message: For people; never holds internals.
        details: Serialised google.rpc.Status with error details, or None.
        retry_after_s: When to come back, or None when that would not help.
    """

    code: StatusCode
    message: str
    details: bytes | None = None
    retry_after_s: float | None = None

    @property
    def retry_after_ms(self) -> int:
        """The same in whole milliseconds; 0 for never."""
        return 0 if self.retry_after_s is None else max(1, round(self.retry_after_s * 1000))

    def trailers(self) -> Metadata:
        """The details, and the pushback that makes gRPC's own retries wait so long."""
        trailers: list[tuple[str, str | bytes]] = []
        if self.details:
            trailers.append((DETAILS_KEY, self.details))
        if self.retry_after_ms:
            trailers.append((PUSHBACK_KEY, str(self.retry_after_ms)))
        return tuple(trailers)


def fail(call: RpcCall, status: Status) -> bool:
    """Ends a call with a status other than OK; False if its caller has left."""
    return fail_all([call], status)[0]


def fail_all(calls: Sequence[RpcCall], status: Status) -> list[bool]:
    """Ends calls with a status other than OK; for each, whether its caller was still there."""
    code = status.code.value[0]
    return calls[0].end_all(calls, code, status.message, status.trailers())


def invalid_status(violation: Violation) -> Status:
    """The status of a request that no retry can help: a BadRequest that names the field."""
    code = StatusCode.NOT_FOUND if violation.not_served else StatusCode.INVALID_ARGUMENT
    message = str(violation)
    detail = error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=message)
    return _rich(code, message, error_details_pb2.BadRequest(field_violations=[detail]))


def unavailable(reason: str) -> Status:
    """UNAVAILABLE: another server, or this one a moment later, can answer."""
    return Status(StatusCode.UNAVAILABLE, reason)


def refusal_status(request: Request) -> Status:
    """The status of a request that has no result."""
    refusal = request.refusal
    assert refusal is not None, "the request was not refused; this is a bug"
    if refusal is Refusal.INVALID:
        assert request.violation is not None
        return invalid_status(request.violation)
    if refusal is Refusal.STOPPED and request.detail:
        return unavailable(request.detail)
    retry_after_s = max(MIN_RETRY_AFTER_S, request.retry_after_s)
    return _refusal_status(refusal, math.ceil(retry_after_s * 1e3))


@functools.lru_cache(maxsize=4096)  # in an overload, refusing may not cost what answering does
def _refusal_status(refusal: Refusal, retry_after_ms: int) -> Status:
    code, message = REFUSALS[refusal]
    if code is not StatusCode.RESOURCE_EXHAUSTED:
        return Status(code, message)
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(retry_after_ms)
    rich = _rich(code, message, error_details_pb2.RetryInfo(retry_delay=delay))
    return Status(code, message, rich.details, retry_after_ms / 1e3)


def departed_code(deadline: float | None, now: float) -> StatusCode:
    """How a call ended whose caller has left: it gave up in time, or its deadline passed.

    Args:
        deadline: Of the call, in monotonic seconds, or None.
        now: Monotonic seconds.
    """
    expired = deadline is not None and now >= deadline - CLOCK_SLACK_S
    return StatusCode.DEADLINE_EXCEEDED if expired else StatusCode.CANCELLED


def too_many_streams(limit: int) -> Status:
    """A stream beyond those that may be open; when one of them ends, nobody knows."""
    message = f"{limit} streams are open, the most this server takes; retry later"
    return Status(StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=STREAM_RETRY_AFTER_S)


def idle_stream(idle_s: float) -> Status:
    """A stream in which nothing moved."""
    message = f"no request came and no answer was taken for {idle_s:g} s"
    return Status(StatusCode.DEADLINE_EXCEEDED, message)


def _rich(
    code: StatusCode,
    message: str,
    detail: error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> Status:
    rich = status_pb2.Status(code=code.value[0], message=message)
    rich.details.add().Pack(detail)
    return Status(code, message, rich.SerializeToString())
