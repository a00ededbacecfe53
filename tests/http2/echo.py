"""A server of ``service.http2`` for tests and benchmarks: it answers every message with bytes.

``python -m tests.http2.echo [HOST [PORT]]`` prints its port and runs until its input ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from service.http2 import Call, Server


@dataclass(frozen=True)
class Unary:
    """A route whose calls come in bursts."""

    is_unary: ClassVar = True
    receive: Callable[[Sequence[Call]], None]
    max_message_bytes: int = 2**22


@dataclass(frozen=True)
class Streaming:
    """A route that answers each message with itself."""

    is_unary: ClassVar = False
    open: Callable[[Call], EchoReceiver]
    max_message_bytes: int = 2**22
    window_bytes: int = 2**16


class EchoReceiver:
    """Sends back what comes; waits for a slow reader."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.ended = ""

    def message(self, message: bytes) -> None:
        self.call.send(message)
        if self.call.unsent:
            self.call.pause()

    def sent(self) -> None:
        self.call.resume()

    def half_closed(self) -> None:
        self.call.end()

    def cancelled(self) -> None:
        self.ended = "cancelled"

    def failed(self, code: int, message: str) -> None:
        self.ended = f"{code} {message}"


def echo(calls: Sequence[Call]) -> None:
    Call.respond_all([(call, call.message) for call in calls])


ROUTES = {"/test.Echo/Unary": Unary(echo), "/test.Echo/Stream": Streaming(EchoReceiver)}


if __name__ == "__main__":
    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    server = Server(host, int(sys.argv[2]) if len(sys.argv) > 2 else 0, ROUTES)
    server.start()
    print(server.port, flush=True)
    sys.stdin.read()
    server.drain(5)
    server.close()
