"""The HTTP port: metrics, health and a status page; on request also a way to try the model.

Importing this is cheap. The framework, aiohttp, takes a tenth of a second, and is imported by
``HttpServer.start`` on another thread, so that a model comes into service before it.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from service.addresses import socket_address
from service.host.background import in_daemon_thread
from service.rpc.call import TransportError

if TYPE_CHECKING:
    from aiohttp.web import AppRunner

    from service.rpc.status import Status
    from service.serving.gate import Gate

    Metadata = Sequence[tuple[str, str | bytes]]

# Connections that the kernel holds until they are accepted: room for a burst of probes and tabs.
BACKLOG = 512


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the port offers.

    Attributes:
        registry: What /metrics exports.
        is_ready: What /healthz tells: 200 if true, else 503.
        is_alive: What /livez tells: 200 if true, else 503.
        describe: The facts on the status page, by name.
        classify: The way into the core: serves POST /v1/classify by it; None is without.
        refusal: How to answer one of its requests by its metadata, before its body is read, or None
            to read it; None where everybody may call.
        count: Is told the HTTP status of each of its answers.
        is_draining: Whether /v1/classify is refused, for the server is shutting down.
        requests_per_s: What one address may send to /v1/classify.
        playground: Serve /draw, a page that uses /v1/classify.
    """

    registry: CollectorRegistry
    is_ready: Callable[[], bool]
    is_alive: Callable[[], bool] = lambda: True
    describe: Callable[[], Mapping[str, str]]
    classify: Gate | None = None
    refusal: Callable[[Metadata], Status | None] | None = None
    count: Callable[[int], None] = lambda _: None
    is_draining: Callable[[], bool] = lambda: False
    requests_per_s: float = 20.0
    playground: bool = False


class HttpServer:
    """Serves on the event loop that awaits ``start``. Binds at once, so that errors come early.

    Args:
        host: Address to listen on.
        port: Port, or 0 for a free one.
        offer: What to serve.

    Attributes:
        port: The port really bound.

    Raises:
        TransportError: If the port can not be bound.
    """

    def __init__(self, host: str, port: int, offer: Offer) -> None:
        self._offer = offer
        self._socket = _bound_socket(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._runner: AppRunner | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Accepts connections."""
        app = await in_daemon_thread(partial(importlib.import_module, "service.http.app"))
        self._runner = app.make_runner(self._offer)
        await self._runner.setup()
        accept = app.Connections(self._runner.server).accept
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(accept, sock=self._socket, backlog=BACKLOG)

    async def close(self) -> None:
        """Stops listening, and ends what is open once it is answered or its time is up."""
        if self._listener is None or self._runner is None:
            self._socket.close()
            return
        self._listener.close()
        await self._runner.cleanup()


def _bound_socket(host: str, port: int) -> socket.socket:
    six = ":" in host
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        address = socket_address(host, port)
        raise TransportError(f"can not listen on {address}: {error.strerror}") from error
