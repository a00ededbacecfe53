"""What a transport offers to the methods, and what a method offers to a transport.

``service.http2`` and ``service.rpc.grpcio`` both implement ``RpcCall``. A method is registered as
one of two routes: unary methods take bursts of calls, streaming methods one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

# Names in lower case; values of names that end in -bin are bytes, decoded.
Metadata = Sequence[tuple[str, str | bytes]]


class RpcCall(Protocol):
    """One RPC. Its methods may be called from any thread; after the first end nothing is sent.

    Attributes:
        path: Of the method, ``/package.Service/Method``.
        metadata: Request metadata, without the headers that belong to HTTP/2 and gRPC themselves.
        peer: The caller's address, as gRPC spells it: ``ipv4:127.0.0.1:4242``, ``ipv6:[::1]:4242``,
            ``unix:``.
        received: Monotonic seconds at which the request was whole; of a stream, its headers.
        deadline: Monotonic seconds after which nobody waits for the answer, or None.
        message: The request of a unary call, decompressed.
        cancelled: Whether the caller has left: it reset the call or lost its connection, or the
            deadline of its stream passed. Set by the transport.
        caller: Whose token the call shows; empty where none is needed. Set by ``Transport.admit``.
        state: Whatever the method wants to remember; the transport does not read it.
    """

    path: str
    metadata: Metadata
    peer: str
    received: float
    deadline: float | None
    message: bytes
    cancelled: bool
    caller: str
    state: Any

    @property
    def unsent(self) -> int:
        """Bytes of messages that were sent and not yet taken by the caller's connection."""

    def respond(self, message: bytes) -> bool:
        """Sends the one response and ends the call with OK; False if the caller has left."""

    def send(self, message: bytes) -> bool:
        """Sends one message of a stream of responses; False if the caller has left."""

    def end(
        self,
        code: int = 0,
        message: str = "",
        trailers: Metadata = (),
    ) -> bool:
        """Ends the call with a status; False if the caller has left.

        Args:
            code: gRPC status code.
            message: For people.
            trailers: Trailing metadata; values of names that end in -bin are bytes, not encoded.
        """

    @staticmethod
    def end_all(
        calls: Sequence[Any], code: int, message: str = "", trailers: Metadata = ()
    ) -> list[bool]:
        """``end`` for many calls of one transport, with one status and one write a connection.

        Returns:
            For each whether its caller was still there.
        """

    def pause(self) -> None:
        """Takes no further message of a stream: its receiver gets none until ``resume``.

        Flow control makes the caller wait; a bounded number of bytes is buffered meanwhile.
        """

    def resume(self) -> None:
        """Takes messages again."""

    @staticmethod
    def respond_all(answers: Sequence[tuple[Any, bytes]]) -> list[bool]:
        """``respond`` for many calls of one transport, with one write a connection.

        Args:
            answers: Calls, each with its response.

        Returns:
            For each whether its caller was still there.
        """


class Receiver(Protocol):
    """The method's side of a streaming call. The transport calls it, one call at a time.

    ``cancelled`` comes once, at any moment and from any thread, unless the method ended the call
    first; nothing comes after it.
    """

    def message(self, message: bytes) -> None:
        """One whole request message."""

    def half_closed(self) -> None:
        """The caller will send nothing more."""

    def sent(self) -> None:
        """Everything that was sent has left: ``unsent`` has come down to 0. From any thread."""

    def cancelled(self) -> None:
        """The caller has left, or the call's deadline passed."""

    def failed(self, code: int, message: str) -> None:
        """The transport has ended the call itself: a message was too large or damaged."""


@dataclass(frozen=True)
class UnaryRoute:
    """A method with one request and one response.

    Attributes:
        receive: Takes bursts of calls whose requests are whole, on the transport's thread; each
            call is answered later from any thread, or right there. Must not raise; a transport ends
            the calls of a burst with INTERNAL if it does.
        max_message_bytes: Of a request, after decompression.
    """

    is_unary: ClassVar = True
    receive: Callable[[Sequence[Any]], None]
    max_message_bytes: int


@dataclass(frozen=True)
class StreamRoute:
    """A method with a stream of requests, of responses, or both.

    Attributes:
        open: Takes a call whose headers have come, on the transport's thread; returns what
            receives its messages, or None when it has already ended the call.
        max_message_bytes: Of one request message, after decompression.
        window_bytes: What one caller may send ahead of what the receiver has taken.
    """

    is_unary: ClassVar = False
    open: Callable[[Any], Receiver | None]
    max_message_bytes: int
    window_bytes: int = 2**16


Route = UnaryRoute | StreamRoute


class Hooks(Protocol):
    """What a transport asks and tells, beside handing calls to routes. From any thread."""

    def admit(self, call: Any) -> bool:
        """Whether a call may be read, decided by its metadata before any byte of its message.

        Sets ``call.caller``. False: it has ended the call, and counted it.
        """

    def overload_s(self) -> float:
        """Seconds of work that wait while new calls are refused for overload, else 0.

        A transport may leave its callers waiting for a part of it: refusing calls as fast as they
        come would take the CPU from those that were admitted.
        """

    def refused(self, calls: Sequence[Any], code: int, message: str) -> None:
        """Calls of one known method ended before their route got them.

        Too large, malformed, an unknown compression, too slow to arrive, or its caller left.
        """


class TransportError(RuntimeError):
    """A transport can not listen; the message says where and why."""


class Transport(Protocol):
    """A server of routes on one port. It is bound when it is made, and accepts after ``start``.

    Attributes:
        port: The port really bound.
    """

    port: int

    @property
    def threads(self) -> Sequence[Any]:
        """The threads that must live while it serves, as ``threading.Thread``."""

    def start(self) -> None:
        """Accepts connections."""

    def drain(self, grace_s: float) -> bool:
        """Takes no new calls, waits until the others are answered and sent. Blocks.

        Returns:
            True if nothing was cut off within the grace.
        """

    def relieve(self) -> None:
        """Starts another reading thread: the current one may be stuck inside a handler."""

    def close(self) -> None:
        """Closes every connection."""
