"""The HTTP port's life: it is bound at once, and served from ``start`` to ``close``.

Importing this is cheap. The framework, aiohttp, takes a tenth of a second to import; ``start`` does
so on another thread, so that a model is served before that.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from service.host.addresses import socket_address
from service.host.background import in_daemon_thread
from service.rpc.call import TransportError

if TYPE_CHECKING:
    from aiohttp.web import Application, AppRunner

# Connections that the kernel holds until they are accepted: room for a burst of probes and tabs.
BACKLOG = 512
# Of those, accepted in one turn of the loop: each takes a descriptor before another is cut.
ACCEPT_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The endpoints for operators.

    Attributes:
        registry: Exported by /metrics.
        is_ready: Whether /healthz answers 200, else 503.
        is_alive: Whether /livez answers 200, else 503.
    """

    registry: CollectorRegistry
    is_ready: Callable[[], bool]
    is_alive: Callable[[], bool]


class HttpServer:
    """Serves on the event loop that awaits ``start``. Binds at once, so that errors come early.

    Args:
        host: Address to listen on.
        port: Port, or 0 for a free one.
        ops: The endpoints for operators.
        extend: Adds further paths to the application.
        max_connections: Open at the same time.

    Attributes:
        port: The port really bound.

    Raises:
        TransportError: If the port can not be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ops: Ops,
        extend: Callable[[Application], None] = lambda _: None,
        max_connections: int = 256,
    ) -> None:
        self._max_connections = max_connections
        self._ops = ops
        self._extend = extend
        self._socket = _bound_socket(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._runner: AppRunner | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Accepts connections."""
        app = await in_daemon_thread(partial(importlib.import_module, "service.ops_http.app"))
        self._runner = app.make_runner(self._ops, self._extend)
        await self._runner.setup()
        accept = app.Connections(self._runner.server, self._max_connections).accept
        loop = asyncio.get_running_loop()
        # To asyncio, a backlog is what it accepts at once, too.
        self._listener = await loop.create_server(accept, sock=self._socket, backlog=ACCEPT_AT_ONCE)
        self._socket.listen(BACKLOG)

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
