"""What the plain servicers' RPCs have in common: where they come from, and how they are counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from service.call import RpcListener
from service.metrics import Metrics
from service.status import departed_code

if TYPE_CHECKING:
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc.aio import ServicerContext


@dataclass(frozen=True)
class Origin:
    """Who sent an RPC, and how long it waits for the answer.

    Taken when the RPC begins: a stream's generator may be closed after its RPC has ended, and then
    grpcio's context reads memory that was freed.

    Attributes:
        peer: The caller's address, as gRPC spells it.
        metadata: Request metadata.
        deadline: Monotonic seconds, or None.
    """

    peer: str
    metadata: Sequence[Any]
    deadline: float | None

    @classmethod
    def of(cls, context: ServicerContext) -> Origin:
        """Of an RPC that has just begun."""
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        return cls(context.peer(), tuple(context.invocation_metadata() or ()), deadline)


class Rpcs:
    """Counts and logs the RPCs of one service. An interceptor would slow Classify down as well.

    ``began`` and ``ended`` may be called from any thread.

    Args:
        service: Its name.
        metrics: Counts them.
        listeners: Are told how they end.
    """

    def __init__(self, service: str, metrics: Metrics, listeners: Sequence[RpcListener]) -> None:
        self._service = service
        self._metrics = metrics
        self._listeners = listeners

    @contextlib.contextmanager
    def counting(self, method: str, context: ServicerContext, origin: Origin) -> Iterator[None]:
        """Counts and logs what happens inside as one RPC."""
        began = time.monotonic()
        self.began(method, 1)
        code = grpc.StatusCode.UNKNOWN
        try:
            yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            code = _status_code(context.code())
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = departed_code(origin.deadline, time.monotonic())
            raise
        finally:
            self.ended(method, code, origin.peer, origin.metadata, began)

    def began(self, method: str, count: int) -> None:
        """Counts RPCs that have begun."""
        self._metrics.rpc_started(self._service, method, count)

    def ended(
        self,
        method: str,
        code: grpc.StatusCode,
        peer: str,
        metadata: Iterable[Any],
        began: float,
    ) -> None:
        """Counts and logs an RPC that began at a time in monotonic seconds."""
        now = time.monotonic()
        self._metrics.rpc_handled(self._service, method, code, now - began)
        for listener in self._listeners:
            listener.rpc(
                self._service, method, code, peer=peer, metadata=metadata, began=began, now=now
            )


def _status_code(code: Any) -> grpc.StatusCode:
    """grpc.aio's context tells a number where the interface promises a StatusCode."""
    if isinstance(code, grpc.StatusCode):
        return code
    return next(status for status in grpc.StatusCode if status.value[0] == code)
