"""The standard services beside our own: grpc.health.v1, reflection and channelz."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.status import too_many_streams
from service.transports.arrivals import BoundedServer

if TYPE_CHECKING:
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc.aio import ServicerContext

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
# Watches and reflection streams that may be open at the same time, of each.
MAX_STREAMS = 1024


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1, on one event loop.

    grpcio's own servicer writes to a watcher while it holds the lock that a change of status needs:
    one caller that does not read would hold up every change, and the drain with it.
    """

    def __init__(self) -> None:
        self._status: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._places = Places(MAX_STREAMS)

    def set(self, service: str, status: int) -> None:
        """Tells callers and watchers from here on."""
        self._status[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Ends watches, which would otherwise keep the server from stopping in time."""
        self._closing.set()

    async def Check(  # noqa: N802 - the method's name in the proto
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status; NOT_FOUND for a service that is not known."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802 - the method's name in the proto
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> None:
        """Streams the status until the caller leaves or the server closes."""
        await self._places.take(context)
        watch = asyncio.create_task(self._watch(request.service, context))
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({watch, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            closing.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    async def _watch(self, service: str, context: ServicerContext) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._status.get(service, SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            else:
                await changed.wait()


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc, name-defined]
    """Server reflection, whose streams end when the server closes.

    Args:
        names: The services to tell of.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._closing = asyncio.Event()
        self._places = Places(MAX_STREAMS)

    def close(self) -> None:
        """Ends streams, which would otherwise keep the server from stopping in time."""
        self._closing.set()

    async def ServerReflectionInfo(  # noqa: N802 - the method's name in the proto
        self, request_iterator: AsyncIterator[Any], context: ServicerContext
    ) -> AsyncIterator[Any]:
        """Answers questions until the caller ends the stream or the server closes."""
        await self._places.take(context)
        questions = _until(self._closing, request_iterator)
        async for answer in super().ServerReflectionInfo(questions, context):
            yield answer


def add_channelz(server: BoundedServer) -> str:
    """Adds channelz, of which gRPC's own servicer does everything; returns the service's name."""
    from grpc_channelz.v1 import (  # noqa: PLC0415 - not loaded where it is off, as it mostly is
        channelz,
        channelz_pb2,
        channelz_pb2_grpc,
    )

    servicer = channelz.aio.ChannelzServicer()  # type: ignore[attr-defined]
    channelz_pb2_grpc.add_ChannelzServicer_to_server(servicer, server)
    return str(channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name)


class Places:
    """A bound on calls that are open at the same time.

    Args:
        most: How many may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[asyncio.Task[Any]] = set()

    async def take(self, context: ServicerContext) -> None:
        """Takes a place until the running task ends; ends the call if there is none."""
        if len(self._taken) >= self._most:
            status = too_many_streams(self._most)
            await context.abort(status.code, status.message, status.metadata())
        task = asyncio.current_task()
        assert task is not None
        self._taken.add(task)
        task.add_done_callback(self._taken.discard)


async def _until(closing: asyncio.Event, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The requests up to the moment at which ``closing`` is set."""
    iterator = aiter(requests)
    closed: asyncio.Future[Any] = asyncio.ensure_future(closing.wait())
    following: asyncio.Future[Any] = closed
    try:
        while True:
            following = asyncio.ensure_future(anext(iterator, None))
            await asyncio.wait({following, closed}, return_when=asyncio.FIRST_COMPLETED)
            request = following.result() if following.done() else None
            if request is None:
                return
            yield request
    finally:
        following.cancel()
        closed.cancel()
