"""Exceptions of the clients: ``DigitError`` for failed calls, ``ClientStateError`` for misuse."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

import grpc

from digits.v1 import digits_pb2

Code = grpc.StatusCode
# Source: gRFC A6. Whole milliseconds; whatever else is in it forbids a retry.
PUSHBACK = "grpc-retry-pushback-ms"
PUSHBACK_MS = re.compile("[0-9]{1,12}")
# The call itself is wrong: not retried, even if the server sends a delay.
PERMANENT = {
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.PERMISSION_DENIED,
    Code.UNAUTHENTICATED,
    Code.FAILED_PRECONDITION,
    Code.OUT_OF_RANGE,
    Code.UNIMPLEMENTED,
    Code.DATA_LOSS,
}
# What helps, by the code and a part of the message; the first that fits. gRPC's own messages say
# what its sockets saw, not what is wrong with the call.
HINTS = (
    (Code.UNAVAILABLE, ":443: Failed to connect", "gRPC takes 443 where no port is named"),
    (Code.UNAVAILABLE, "Connection refused", "nothing listened there at the last attempt"),
    (Code.UNAVAILABLE, "No such file", "there is no such socket: is the server running?"),
    (Code.UNAVAILABLE, "CERTIFICATE_VERIFY_FAILED", "tls.ca has not signed its certificate"),
    (Code.UNAVAILABLE, "does not match", "its certificate is for another name than this address"),
    (Code.UNAVAILABLE, "WRONG_VERSION_NUMBER", "the server does not speak TLS"),
    (Code.UNAVAILABLE, "handshake", "one side speaks TLS and the other does not, or not so"),
    (Code.UNAVAILABLE, "http1.x server", "that is an HTTP port; gRPC has another one"),
    (Code.UNAVAILABLE, "Failed parsing HTTP/2", "what listens there does not speak HTTP/2"),
    (Code.UNAVAILABLE, "HTTP proxy", "the proxy does not let this call through"),
    (Code.UNAVAILABLE, "Socket closed", "it closed the connection: does the server want TLS?"),
    (Code.UNAVAILABLE, "lookup", "the name has no address"),
    (Code.UNAVAILABLE, "DNS", "the name has no address"),
    (Code.UNAUTHENTICATED, "", "the server wants a token that it knows"),
    (Code.UNIMPLEMENTED, "", "another gRPC server, or an older one"),
    (Code.DEADLINE_EXCEEDED, "", "too short a deadline, an overloaded server, or none"),
    (
        Code.RESOURCE_EXHAUSTED,
        "CLIENT: Received message larger than max",
        "the answer is larger than a client takes: lower request_images",
    ),
    (
        Code.RESOURCE_EXHAUSTED,
        "larger than max",
        "more than the server takes: lower request_images; with Pillow, files are shrunk first",
    ),
)
# Parts of gRPC's own messages by which no connection was made.
NOT_REACHED = re.compile("failed to connect|to all backends failing|resolv|DNS|empty address list")


class ClientStateError(RuntimeError):
    """A client that can not be used here or now: it is closed, or another process or loop's."""


class DigitError(RuntimeError):
    """A call that did not succeed.

    Attributes:
        code: gRPC status code.
        message: The server's message, or gRPC's where no server was reached.
        address: Where the call went, and through which proxy; empty for an item of a stream.
        violations: With INVALID_ARGUMENT, what was wrong with each field.
        retry_after_s: When the server asked to come back, infinite for never; None if it said
            nothing about it.
        unreachable_since: Since when this client has not reached the server; None if it has.
        offset: Images of a large input that went in requests before the one that failed; the
            server counts from there.
    """

    def __init__(self, code: grpc.StatusCode, message: str, address: str = "") -> None:
        super().__init__(code, message, address)  # what it is made from again by pickle
        self.code = code
        self.message = message
        self.address = address
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        self.unreachable_since: datetime | None = None
        self.offset = 0

    @property
    def transient(self) -> bool:
        """True if a retry may succeed, by the server's hint or the status code.

        RESOURCE_EXHAUSTED is a full queue as well as a message that is too large for ever: only
        the server's hint when to come back tells them apart.
        """
        if self.retry_after_s is None or self.code in PERMANENT:
            return self.code is Code.UNAVAILABLE
        return math.isfinite(self.retry_after_s)

    def __str__(self) -> str:
        text = f"{self.code.name}: {self.message}"
        if self.offset:
            text += f" (counted from image {self.offset} on)"
        notes = []
        if self.address:
            fitting = (h for code, part, h in HINTS if code is self.code and part in self.message)
            notes += list(fitting)[:1]
        if self.unreachable_since is not None:
            notes.append(f"not reachable since {self.unreachable_since:%Y-%m-%d %H:%M:%S %Z}")
        return f"{text} ({self.address}: {'; '.join(notes)})" if notes else text


def is_unreachable(error: DigitError) -> bool:
    """True if a call failed because there was no connection."""
    return error.code is Code.UNAVAILABLE and NOT_REACHED.search(error.message) is not None


def rpc_error(error: Any, address: str) -> DigitError:
    """The interface that ``grpc.RpcError`` and ``AioRpcError`` share."""
    found = DigitError(error.code(), error.details() or "", address)
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            _read_details(found, value)
        elif key == PUSHBACK:
            milliseconds = PUSHBACK_MS.fullmatch(value)
            found.retry_after_s = int(value) / 1000 if milliseconds else math.inf
    return found


def item_error(error: digits_pb2.StreamError) -> DigitError:
    """Why an item of a stream was refused."""
    code = next((code for code in Code if code.value[0] == error.code), Code.UNKNOWN)
    found = DigitError(code, error.message)
    if error.retry_after_ms:
        found.retry_after_s = error.retry_after_ms / 1000
    return found


def _read_details(found: DigitError, serialised: bytes) -> None:
    # Here, because they take longer to import than most of the client.
    from google.protobuf.message import DecodeError  # noqa: PLC0415
    from google.rpc import error_details_pb2, status_pb2  # noqa: PLC0415

    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(serialised).details:
            if detail.Unpack(bad_request):
                found.violations = {v.field: v.description for v in bad_request.field_violations}
            elif detail.Unpack(retry_info):
                found.retry_after_s = max(0.0, retry_info.retry_delay.ToNanoseconds() / 1e9)
    except DecodeError:
        return  # not from this server; code and message still tell
