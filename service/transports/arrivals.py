"""Bounds on calls that have begun and whose request has not come yet.

grpcio's own unary handlers run when the request is there. Until then nothing of ours knows of the
call, and what has come of it waits in memory for as long as the caller likes. So every unary method
is registered as one that takes a stream of requests, of which it reads one: to a caller that is the
same, and to the server it costs no more.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from service.status import InvalidRequestError, Status, too_many_arriving, too_slow

if TYPE_CHECKING:
    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
    GenericRpcHandler = grpc.GenericRpcHandler[Any, Any]
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import GenericRpcHandler, RpcMethodHandler
    from grpc.aio import ServicerContext


# Calls that are given up in one go: to end thousands would hold everybody up.
AT_ONCE = 2


class Arrivals:
    """Reads requests. Of too many that are slow to come the oldest is given up.

    Those of callers that behave are there at once and never the oldest for long.

    Args:
        limit: Calls at the same time whose request has not come.
        timeout_s: For a request to come whole.
        young_s: Age up to which none is given up for being the oldest: in a burst the request may
            be there and only not be read yet. What a burst left is given up as later calls come,
            ``AT_ONCE`` for each.
    """

    def __init__(self, limit: int, timeout_s: float, young_s: float) -> None:
        self._limit = limit
        self._young_s = young_s
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[asyncio.Task[Any], float] = {}
        self._given_up: dict[asyncio.Task[Any], Status] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: ServicerContext) -> Any:
        """The call's request; ends the call when it does not come."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = now = self._loop.time()
        for oldest, began in list(itertools.islice(self._waiting.items(), AT_ONCE)):
            if len(self._waiting) <= self._limit or now - began < self._young_s:
                break
            self._give_up(oldest, too_many_arriving())
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)
        try:
            request = await context.read()
        except asyncio.CancelledError:
            if task not in self._given_up:
                raise
            await _abort(context, self._given_up[task])
        finally:
            self._waiting.pop(task, None)
            self._given_up.pop(task, None)
        if request is grpc.aio.EOF:  # type: ignore[attr-defined]
            await _abort(context, InvalidRequestError("request", "one message", "none").status())
        return request

    def _look(self) -> None:
        """Gives up what is too old, and looks again when the next one will be."""
        self._timer = None
        now = self._loop.time()
        left = 0.0
        for task, began in list(itertools.islice(self._waiting.items(), AT_ONCE)):
            left = began + self._timeout_s - now
            if left > 0:
                break
            self._give_up(task, too_slow(self._timeout_s))
        if self._waiting:
            self._timer = self._loop.call_later(max(0.0, left), self._look)

    def _give_up(self, task: asyncio.Task[Any], status: Status) -> None:
        del self._waiting[task]
        self._given_up[task] = status
        task.cancel()


async def _abort(context: ServicerContext, status: Status) -> None:
    await context.abort(status.code, status.message, status.metadata())


class BoundedServer:
    """Where generated code adds its handlers, in place of the server itself.

    Args:
        server: Gets the handlers.
        arrivals: Reads the requests of unary methods.
    """

    def __init__(self, server: grpc.aio.Server, arrivals: Arrivals) -> None:
        self._server = server
        self._arrivals = arrivals

    def add_generic_rpc_handlers(self, handlers: Sequence[GenericRpcHandler]) -> None:
        """See ``grpc.aio.Server.add_generic_rpc_handlers``."""
        bounded = tuple(_BoundedHandler(handler, self._arrivals) for handler in handlers)
        self._server.add_generic_rpc_handlers(bounded)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: dict[str, RpcMethodHandler]
    ) -> None:
        """Generated code names its methods here once more; the asyncio server looks at neither."""


class _BoundedHandler(GenericRpcHandler):
    """Finds a method's handler as another one does, and makes a unary one read its request."""

    def __init__(self, handler: GenericRpcHandler, arrivals: Arrivals) -> None:
        self._handler = handler
        self._arrivals = arrivals
        self._bounded: dict[str, RpcMethodHandler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> RpcMethodHandler | None:
        """The handler of a call, or None where the method is not known."""
        method = handler_call_details.method
        if method not in self._bounded:
            handler = self._handler.service(handler_call_details)
            if handler is None:
                return None
            self._bounded[method] = _bounded(handler, self._arrivals)
        return self._bounded[method]


def _bounded(handler: RpcMethodHandler, arrivals: Arrivals) -> RpcMethodHandler:
    if handler.request_streaming:
        return handler
    make: Callable[..., RpcMethodHandler] = grpc.stream_unary_rpc_method_handler
    behaviour: Any = handler.unary_unary
    if handler.response_streaming:
        make, behaviour = grpc.stream_stream_rpc_method_handler, handler.unary_stream
    read_first = functools.partial(_read_first, behaviour, arrivals)
    return make(read_first, handler.request_deserializer, handler.response_serializer)


async def _read_first(
    behaviour: Callable[[Any, ServicerContext], Awaitable[Any]],
    arrivals: Arrivals,
    _requests: object,
    context: ServicerContext,
) -> Any:
    return await behaviour(await arrivals.read(context), context)
