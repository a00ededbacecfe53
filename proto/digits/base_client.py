"""What the blocking and the asynchronous client have in common: everything but waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from digits.channel import (
    CHANNEL_OPTIONS,
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Tls,
    call_metadata,
    checked_timeout_s,
)
from digits.errors import DigitError
from digits.patience import MAX_ATTEMPTS, Patience
from digits.v1 import digits_pb2, digits_pb2_grpc

# What a large input is split into, and how many requests of it are under way: together half of what
# a server lets wait by default, so that one caller does not crowd out the others.
REQUEST_IMAGES = 256
IN_FLIGHT = 4


@dataclass(frozen=True)
class Sent:
    """A request under way, and how long its sender will try."""

    request: digits_pb2.ClassifyRequest
    call: Any
    patience: Patience


class Client:
    """What both clients have in common: their settings, and everything but waiting.

    Args:
        address: ``host:port``, or any gRPC target. Of a name with several addresses
            (``dns:///digits.example:50051``) all are called, in turn.
        timeout_s: Deadline of a request, further attempts included, in seconds.
        tls: How to encrypt; None for plaintext.
        token: Bearer token to show with each call. On plaintext the network can read it.
        request_images: Images in a request; more are split. At most what the server allows
            (``--max-images-per-request``).

    Raises:
        OSError: If a file of ``tls`` can not be read.
        ValueError: If the address is empty, the token can not be one, ``tls`` lacks a file, or a
            number is out of range.
    """

    _insecure_channel: ClassVar[Callable[..., Any]]
    _secure_channel: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        token: str | None = None,
        request_images: int = REQUEST_IMAGES,
    ) -> None:
        if not address:
            raise ValueError("address: expected host:port or a gRPC target, got nothing")
        if request_images < 1:
            raise ValueError(f"request_images: expected 1 or more, got {request_images}")
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = call_metadata(token)
        self._request_images = request_images
        self._channel: Any = (
            self._insecure_channel(address, options=CHANNEL_OPTIONS)
            if tls is None
            else self._secure_channel(address, tls.credentials(), options=CHANNEL_OPTIONS)
        )
        self._stub: Any = digits_pb2_grpc.DigitClassifierServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def _patience(self, timeout_s: float | None) -> Patience:
        timeout_s = checked_timeout_s(self._timeout_s if timeout_s is None else timeout_s)
        return Patience(timeout_s, timeout_s, MAX_ATTEMPTS)

    def _stream_patience(self, timeout_s: float | None) -> Patience:
        return Patience(
            self._timeout_s, None if timeout_s is None else checked_timeout_s(timeout_s)
        )

    def _start(self, method: Any, request: Any, patience: Patience) -> Any:
        """One attempt: what a method of the stub returns."""
        return method(request, timeout=patience.time_left_s(), metadata=self._metadata)

    def _send(self, method: Any, request: Any, timeout_s: float | None) -> Sent:
        """The same, without waiting for it."""
        patience = self._patience(timeout_s)
        return Sent(request, self._start(method, request, patience), patience)

    def _error(self, error: Any) -> DigitError:
        return DigitError(error, self._address)
