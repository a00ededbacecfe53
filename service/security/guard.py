"""Lets calls through that show a valid token, and no others but to the health service."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from service.job import Refusal
from service.metrics import Metrics
from service.security.tokens import TokenFile, shown_digest
from service.status import REFUSALS, Status
from service.transports import CLASSIFY

if TYPE_CHECKING:
    from service.call import Call, RpcListener
    from service.classify import Classify

    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
    ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import RpcMethodHandler
    from grpc.aio import ServerInterceptor, ServicerContext

# A prober has no token, and learns nothing but whether the server serves.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


class Guard(ServerInterceptor):
    """Stands before every method: by calls in bursts, or as an interceptor.

    Made only when there are tokens. What is not in ``OPEN_METHODS`` needs one, a service that is
    added later too.

    Args:
        tokens: Those that are valid.
        classify: Takes the calls that show one.
        metrics: Counts the RPCs that are refused here.
        listeners: Are told of them.
    """

    def __init__(
        self,
        tokens: TokenFile,
        classify: Classify,
        metrics: Metrics,
        listeners: Sequence[RpcListener],
    ) -> None:
        self._tokens = tokens
        self._classify = classify
        self._metrics = metrics
        self._listeners = listeners

    def caller(self, metadata: Iterable[tuple[str, Any]]) -> str | None:
        """Whose valid token a call's metadata shows; None if it shows none."""
        shown = shown_digest(metadata)
        return None if shown is None else self._tokens.caller(shown)

    def refusal(self, metadata: Iterable[tuple[str, Any]]) -> Status | None:
        """How to answer a request before it is read, counted here; None if it shows a token."""
        if self.caller(metadata) is not None:
            return None
        self._metrics.dropped([Refusal.UNAUTHENTICATED])
        return Status(*REFUSALS[Refusal.UNAUTHENTICATED])

    def receive(self, calls: Sequence[Call]) -> None:
        """Passes a burst on to Classify, without the calls that show no valid token."""
        admitted = self.admit(calls)
        if admitted:
            self._classify.receive(admitted)

    def admit(self, calls: Sequence[Call]) -> list[Call]:
        """The calls of a burst that show a valid token; the others are failed."""
        # Each token is looked for once a burst, not once a call.
        callers: dict[bytes, str | None] = {}
        admitted, refused = [], []
        for call in calls:
            shown = shown_digest(call.metadata)
            if shown is not None and shown not in callers:
                callers[shown] = self._tokens.caller(shown)
            caller = None if shown is None else callers[shown]
            if caller is None:
                call.refusal = Refusal.UNAUTHENTICATED
                refused.append(call)
            else:
                call.caller = caller
                admitted.append(call)
        if refused:
            self._classify.refuse(refused)
        return admitted

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcMethodHandler:
        """Decides every method of grpcio but Classify, whose calls come by ``receive``."""
        method = handler_call_details.method
        is_open = method in OPEN_METHODS or method == CLASSIFY
        if is_open or self.caller(handler_call_details.invocation_metadata) is not None:
            return await continuation(handler_call_details)
        # Answers a call of any kind before a message of it is read.
        return grpc.stream_stream_rpc_method_handler(partial(self._deny, method))

    async def _deny(self, path: str, _: Any, context: ServicerContext) -> None:
        code, message = REFUSALS[Refusal.UNAUTHENTICATED]
        self._metrics.dropped([Refusal.UNAUTHENTICATED])
        service, _, method = path.lstrip("/").rpartition("/")
        if self._metrics.knows(service, method):
            self._metrics.rpc_started(service, method)
            self._metrics.rpc_handled(service, method, code, 0.0)
            now, metadata = time.monotonic(), context.invocation_metadata() or ()
            peer = context.peer()
            for listener in self._listeners:
                listener.rpc(
                    service, method, code, peer=peer, metadata=metadata, began=now, now=now
                )
        await context.abort(code, message)
