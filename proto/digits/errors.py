"""``DigitError``: why a call did not succeed, and what its caller can do about it."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from digits.v1 import digits_pb2

Code = grpc.StatusCode
# Source: gRFC A6. What a proxy may send alone; this project's server sends RetryInfo in any case.
PUSHBACK = "grpc-retry-pushback-ms"
# What helps, by the code and a part of the message; the first that fits. gRPC's own messages say
# what its sockets saw, not what is wrong with the call.
HINTS = (
    (Code.UNAVAILABLE, ":443: Failed to connect", "gRPC takes 443 where no port is named"),
    (Code.UNAVAILABLE, "Connection refused", "nothing listens there: is the server running?"),
    (Code.UNAVAILABLE, "No such file", "there is no such socket: is the server running?"),
    (Code.UNAVAILABLE, "CERTIFICATE_VERIFY_FAILED", "tls.ca has not signed its certificate"),
    (Code.UNAVAILABLE, "does not match", "its certificate is for another name than this address"),
    (Code.UNAVAILABLE, "WRONG_VERSION_NUMBER", "the server does not speak TLS"),
    (Code.UNAVAILABLE, "handshake", "one side speaks TLS and the other does not, or not so"),
    (Code.UNAVAILABLE, "Socket closed", "does the server want TLS?"),
    (Code.UNAVAILABLE, "http1.x server", "that is an HTTP port; gRPC has another one"),
    (Code.UNAVAILABLE, "Misformatted domain", "expected host:port, not a URL"),
    (Code.UNAVAILABLE, "lookup", "the name has no address"),
    (Code.UNAVAILABLE, "DNS", "the name has no address"),
    (Code.UNAUTHENTICATED, "", "the server wants a token that it knows"),
    (Code.UNIMPLEMENTED, "", "another gRPC server, or an older one"),
    (Code.DEADLINE_EXCEEDED, "", "too short a deadline, an overloaded server, or none"),
)


class DigitError(RuntimeError):
    """A call that did not succeed.

    Attributes:
        code: gRPC status code.
        message: The server's message, or gRPC's where no server was reached.
        address: Where the call went; empty for an item of a stream.
        violations: With INVALID_ARGUMENT, what was wrong with each field.
        retry_after_s: When the server asked to come back, or None.
        offset: Images of a large input that went in requests before the one that failed; the
            server counts from there.
    """

    # grpc.RpcError, AioRpcError: no common interface
    def __init__(self, error: Any, address: str = "") -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.address = address
        super().__init__(f"{self.code.name}: {self.message}")
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        self.offset = 0
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                self._read_details(value)
            elif key == PUSHBACK and value.isdecimal():
                self.retry_after_s = int(value) / 1000

    def __str__(self) -> str:
        text = f"{self.code.name}: {self.message}"
        if self.offset:
            text += f" (counted from image {self.offset} on)"
        if not self.address:
            return text
        for code, part, hint in HINTS:
            if code is self.code and part in self.message:
                return f"{text} ({self.address}: {hint})"
        return text

    def _read_details(self, serialised: bytes) -> None:
        bad_request = error_details_pb2.BadRequest()
        retry_info = error_details_pb2.RetryInfo()
        try:
            for detail in status_pb2.Status.FromString(serialised).details:
                if detail.Unpack(bad_request):
                    self.violations = {v.field: v.description for v in bad_request.field_violations}
                elif detail.Unpack(retry_info):
                    self.retry_after_s = retry_info.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            return  # not from this server; code and message still tell


class _ItemRefusal:
    """A StreamError, as an RPC's error tells it."""

    def __init__(self, error: digits_pb2.StreamError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        unknown = grpc.StatusCode.UNKNOWN
        return next((c for c in grpc.StatusCode if c.value[0] == self._error.code), unknown)

    def details(self) -> str:
        return self._error.message

    def trailing_metadata(self) -> None:
        return None


def item_error(error: digits_pb2.StreamError) -> DigitError:
    """Why an item of a stream was refused."""
    refusal = DigitError(_ItemRefusal(error))
    if error.retry_after_ms:
        refusal.retry_after_s = error.retry_after_ms / 1000
    return refusal
