"""The interface of listeners to RPCs that began and ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpc import StatusCode


@dataclass(frozen=True, eq=False)  # constants; looked up by identity for every call
class Method:
    """A method of a service.

    Attributes:
        service: Its full name.
        name: Its own.
        kind: ``unary``, ``server_stream``, ``client_stream`` or ``bidi_stream``.
    """

    service: str
    name: str
    kind: str = "unary"

    @property
    def path(self) -> str:
        """As a request names it."""
        return f"/{self.service}/{self.name}"


class EndedCall(Protocol):
    """A call that has ended: the part of ``service.rpc.call.Call`` that listeners read.

    Attributes:
        metadata: Request metadata.
        peer: The caller's address.
        caller: Name of the caller's token; empty where none is needed.
        received: Monotonic seconds at which the request was whole.
        state: The ``Request`` of a call that was admitted to the core.
    """

    metadata: Sequence[tuple[str, str | bytes]]
    peer: str
    caller: str
    received: float
    state: Any


class RpcListener(Protocol):
    """Is notified of RPCs, from any thread."""

    def began(self, method: Method, count: int) -> None:
        """``count`` RPCs of a method have begun."""

    def ended(
        self,
        method: Method,
        calls: Sequence[EndedCall],
        code: StatusCode,
        message: str,
        now: float,
    ) -> None:
        """RPCs have ended.

        Args:
            method: Theirs.
            calls: They.
            code: Their status.
            message: Its details; empty for OK.
            now: Monotonic seconds.
        """
