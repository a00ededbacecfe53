"""What the blocking and the asynchronous client have in common: everything but waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, ClassVar, NoReturn

import grpc
import grpc.aio

from digits.channel import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Tls,
    call_metadata,
    channel_options,
    checked_timeout_s,
)
from digits.errors import ClientStateError, DigitError, is_unreachable, rpc_error
from digits.fork import check_process, mark_used
from digits.retry import MAX_ATTEMPTS, Retry
from digits.target import checked_address, proxy_of
from digits.v1 import digits_pb2, digits_pb2_grpc

# What a large input is split into, and how many requests of it are under way: together half of what
# a server lets wait by default, so that one caller does not crowd out the others.
REQUEST_IMAGES = 256
IN_FLIGHT = 4
# How calls end that nobody may have answered.
SILENT = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


@dataclass(frozen=True)
class PendingCall:
    """A request under way.

    Attributes:
        request: To be sent again if need be.
        call: What gRPC returned for it.
        retry: Its further attempts.
    """

    request: digits_pb2.ClassifyRequest
    call: Any
    retry: Retry


class BaseClient:
    """What both clients have in common: their settings, and everything but waiting.

    The first call opens the channel. From then on no client can be used in processes forked
    from this one; see ``digits.fork``.

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
        ValueError: If the address is malformed, the token can not be one, ``tls`` lacks a file, or
            a number is out of range.
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
        if request_images < 1:
            raise ValueError(f"request_images: expected 1 or more, got {request_images}")
        self._address = checked_address(address)
        self._route = address
        self._timeout_s = timeout_s
        self._metadata = call_metadata(token)
        self._request_images = request_images
        self._credentials = None if tls is None else tls.credentials()
        self._unreachable_since: datetime | None = None
        self._lock = threading.Lock()
        # Under the lock.
        self._closed = False
        self._channel: Any = None
        self._stub: Any = None

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} can not be pickled or copied: make one in each process")

    def _check_place(self) -> None:
        """Raises ClientStateError where the client can not be used."""
        check_process()

    def _open(self) -> None:
        """Opens the channel, if this was not done; raises ClientStateError after ``close``."""
        with self._lock:
            if self._closed:
                raise ClientStateError("the client is closed")
            if self._stub is None:
                mark_used()
                self._connect()

    def _connect(self) -> None:
        options = channel_options(self._address)
        if self._credentials is None:
            self._channel = self._insecure_channel(self._address, options=options)
        else:
            self._channel = self._secure_channel(self._address, self._credentials, options=options)
        proxy = proxy_of(self._address)
        self._route = f"{self._address} through proxy {proxy}" if proxy else self._address
        self._stub = digits_pb2_grpc.DigitClassifierServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def _close(self) -> Any:
        """Lets no further call begin; the channel, to be closed, or None if there is none."""
        with self._lock:
            self._closed = True
            return self._channel

    def _retry(self, timeout_s: float | None) -> Retry:
        timeout_s = checked_timeout_s(self._timeout_s if timeout_s is None else timeout_s)
        return Retry(timeout_s, timeout_s, MAX_ATTEMPTS)

    def _stream_retry(self, timeout_s: float | None) -> Retry:
        return Retry(self._timeout_s, None if timeout_s is None else checked_timeout_s(timeout_s))

    def _start(self, method: str, request: Any, retry: Retry) -> Any:
        """One attempt: what a method of the stub returns."""
        self._check_place()
        if self._closed or self._stub is None:
            self._open()
        call = attrgetter(method)(self._stub)
        try:
            return call(request, timeout=retry.time_left_s(), metadata=self._metadata)
        except (ValueError, grpc.aio.UsageError):
            if self._closed:  # by another thread, a moment ago
                raise ClientStateError("the client is closed") from None
            raise

    def _send(self, method: str, request: Any, timeout_s: float | None) -> PendingCall:
        """The same, without waiting for it."""
        retry = self._retry(timeout_s)
        return PendingCall(request, self._start(method, request, retry), retry)

    def _reached(self) -> None:
        """The server answered."""
        self._unreachable_since = None

    def _error(self, error: Any) -> DigitError:
        """The message of a call's error.

        Raises:
            ClientStateError: In its place, if the client was closed meanwhile.
        """
        if error.code() is grpc.StatusCode.CANCELLED:
            self._check_open()
        found = rpc_error(error, self._route)
        if is_unreachable(found):
            self._unreachable_since = self._unreachable_since or datetime.now(UTC).astimezone()
            found.unreachable_since = self._unreachable_since
        elif found.code not in SILENT:
            self._reached()
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise ClientStateError("the client was closed during the call") from None
