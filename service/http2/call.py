"""One RPC on HTTP/2: the stream of one request, assembled into messages and answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from service.http2.messages import (
    INVALID_ARGUMENT,
    NEVER_RETRY,
    PREFIX_BYTES,
    RESOURCE_EXHAUSTED,
    GrpcError,
    Metadata,
    RequestInfo,
    compressed,
    decompressed,
    status_trailers,
    too_large,
)
from service.http2.sending import Stream

if TYPE_CHECKING:
    from service.http2.link import Link


class Packed(bytes):
    """A message that is compressed: its size tells nothing of what it takes to read."""


class Call(Stream):
    """One RPC. Methods without an underscore are for handlers, and may be called from any thread.

    After the first end nothing is sent; a method that comes too late returns False.

    Attributes:
        received: Monotonic seconds at which the request was whole; of a stream, its headers.
        deadline: Monotonic seconds after which nobody waits for the answer, or None.
        message: The request of a unary call.
        cancelled: Whether the caller has left.
        caller: Whose token the call shows; set by ``Hooks.admit``.
        state: Whatever the method wants to remember.
    """

    received: float
    deadline: float | None = None
    message = b""
    cancelled = False
    caller = ""
    state: Any = None
    info: RequestInfo
    link: Link
    # What receives the messages of a stream.
    receiver: Any = None
    # Of a message that has not come whole: its bytes so far, with the prefix, and how many there
    # are; what else of the request waits for its end; how many bytes the message has in all (0
    # until the prefix is there).
    parts: list[bytes] | None = None
    held = 0
    kept = 0
    expected = 0
    reserved = 0
    messages = 0  # that came of a unary call
    # What a stream that flow control holds back had left when it was last seen to move.
    blocked_bytes = 0
    blocked_since = 0.0
    # Of a stream: whole messages that wait for ``resume``; whether one was sent back; the head.
    waiting: deque[bytes]
    paused = False
    half_closed = False
    began_answer = False
    watched = False

    @property
    def path(self) -> str:
        """The method, ``/package.Service/Method``."""
        return self.info.path

    @property
    def metadata(self) -> Metadata:
        """The caller's; names in lower case, values of names in -bin decoded."""
        return self.info.metadata

    @property
    def peer(self) -> str:
        """The caller's address, as gRPC spells it."""
        return self.link.peer

    @property
    def unsent(self) -> int:
        """Bytes of messages that the caller's connection has not taken yet."""
        return self.pending_bytes + (self.link.backlog_bytes if self.watched else 0)

    def respond(self, message: bytes) -> bool:
        """Sends the one response and ends the call with OK."""
        return self.link.respond([(self, message)])[0]

    @staticmethod
    def respond_all(answers: Sequence[tuple[Call, bytes]]) -> list[bool]:
        """Answers many calls, with one write a connection.

        Returns:
            For each whether its caller was still there.
        """
        sent = [True] * len(answers)
        for link, places in _by_link([call for call, _ in answers]).items():
            flags = link.respond([answers[place] for place in places])
            if not all(flags):
                for place, flag in zip(places, flags, strict=True):
                    sent[place] = flag
        return sent

    def send(self, message: bytes) -> bool:
        """Sends one message of a stream of responses."""
        return self.link.send(self, compressed(message, self.info.encoding))

    def end(self, code: int = 0, message: str = "", trailers: Metadata = ()) -> bool:
        """Ends the call with a status.

        Args:
            code: gRPC status code.
            message: For people.
            trailers: Trailing metadata; values of names in -bin are bytes, not encoded.
        """
        return self.end_all([self], code, message, trailers)[0]

    @staticmethod
    def end_all(
        calls: Sequence[Call], code: int, message: str = "", trailers: Metadata = ()
    ) -> list[bool]:
        """Ends many calls with one status, with one write a connection.

        Returns:
            For each whether its caller was still there.
        """
        encoded = status_trailers(code, message, tuple(trailers))
        ended = [True] * len(calls)
        for link, places in _by_link(calls).items():
            flags = link.end([calls[place] for place in places], encoded)
            for place, flag in zip(places, flags, strict=True):
                ended[place] = flag
        return ended

    def pause(self) -> None:
        """Takes no further message until ``resume``; flow control makes the caller wait."""
        self.paused = True

    def resume(self) -> None:
        """Takes messages again."""
        if self.paused:
            self.link.resume(self)

    # For ``Link``, with its lock held.

    def take(self, data: bytes) -> list[bytes]:
        """Adds what came to what is held; the messages that are whole by that, maybe ``Packed``.

        Raises:
            GrpcError: If a message is too large or malformed.
        """
        if self.parts is None:
            self.parts = []
        self.parts.append(data)
        self.held += len(data)
        whole: list[bytes] = []
        while self.held >= PREFIX_BYTES:
            if not self.expected:
                self._expect()
            if self.held < self.expected:
                break
            whole.append(self._cut())
        return whole

    def _expect(self) -> None:
        """Reads the prefix of the next message."""
        assert self.parts is not None
        if len(self.parts[0]) < PREFIX_BYTES:
            self.parts = [b"".join(self.parts)]
        prefix = self.parts[0]
        if prefix[0] > 1:
            raise GrpcError(INVALID_ARGUMENT, "request: expected a gRPC message, got another")
        length = int.from_bytes(prefix[1:PREFIX_BYTES], "big")
        limit = self.info.route.max_message_bytes
        if length > limit:  # compressed ones are not longer than what they expand to, or nearly so
            raise GrpcError(RESOURCE_EXHAUSTED, too_large(length, limit), NEVER_RETRY)
        self.expected = PREFIX_BYTES + length

    def _cut(self) -> bytes:
        """Takes the first message out of what is held."""
        assert self.parts is not None
        data = b"".join(self.parts) if len(self.parts) > 1 else self.parts[0]
        size, self.expected = self.expected, 0
        rest = data[size:]
        self.parts, self.held = ([rest] if rest else None), len(rest)
        body = data[PREFIX_BYTES:size]
        return Packed(body) if data[0] else body

    def unpacked(self, message: bytes) -> bytes:
        """A message that came, as it was before it was compressed.

        Raises:
            GrpcError: If it is too large or damaged.
        """
        if not isinstance(message, Packed):
            return message
        return decompressed(message, self.info.encoding, self.info.route.max_message_bytes)

    def release(self) -> int:
        """Drops what is held; how many bytes that was."""
        held, self.parts = self.held + self.kept, None
        self.held = self.kept = self.expected = 0
        if self.receiver is not None:
            held += sum([len(message) for message in self.waiting])
            self.waiting.clear()
        return held


def _by_link(calls: Sequence[Call]) -> dict[Link, list[int]]:
    """The places of calls in a sequence, by their connections."""
    places: dict[Link, list[int]] = {}
    for place, call in enumerate(calls):
        link = call.link
        if link in places:
            places[link].append(place)
        else:
            places[link] = [place]
    return places
