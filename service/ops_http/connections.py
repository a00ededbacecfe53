"""Bounds on connections: how many are open, how long one may be silent, how large a header is."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from aiohttp import web

from service.host.addresses import neighbourhood
from service.ops_http.errors import error_response, harden

# What a request line with its headers may take to arrive, and how long a connection may be silent
# after an answer. Prometheus, which keeps its connection between scrapes, opens another.
SILENCE_S = 10.0
# How long a body that nobody wants is read, so that its sender sees the answer.
LINGER_S = 1.0


class Connections:
    """Makes a protocol for each connection. Where there are too many, one makes room.

    That is the oldest of the address that has the most. Refusing the newest instead would let
    whoever holds the limit in idle connections keep a probe out.

    Args:
        server: The framework's, which routes requests; served on the running event loop.
        limit: Connections at the same time.
    """

    def __init__(self, server: web.Server, limit: int) -> None:
        self._server = server
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        # By address, each oldest first.
        self._open: dict[str, dict[_Connection, asyncio.Transport]] = {}

    def accept(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Connection(
            self,
            self._server,
            loop=self._loop,
            keepalive_timeout=SILENCE_S,
            lingering_time=LINGER_S,
            access_log=None,
            auto_decompress=False,  # what is small on the wire stays small
        )

    def opened(self, connection: _Connection, transport: asyncio.Transport) -> None:
        """Counts a connection, and cuts another if that is one too many."""
        if sum(map(len, self._open.values())) >= self._limit:
            oldest, to_cut = next(iter(max(self._open.values(), key=len).items()))
            # Not closed, which would wait for a peer that does not read.
            to_cut.abort()
            self.closed(oldest)
        self._open.setdefault(connection.address, {})[connection] = transport

    def closed(self, connection: _Connection) -> None:
        """Forgets a connection."""
        of_address = self._open.get(connection.address, {})
        of_address.pop(connection, None)
        if not of_address:
            self._open.pop(connection.address, None)


class _Connection(web.RequestHandler):
    """A connection of the framework that is counted, and that is short about malformed HTTP."""

    __slots__ = ("_connections", "address")

    def __init__(self, connections: Connections, server: web.Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._connections = connections
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = neighbourhood(peer[0]) if peer else ""  # it may have left already
        self._connections.opened(self, cast("asyncio.Transport", transport))

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.closed(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - holds the parser's internals
    ) -> web.StreamResponse:
        """What no handler answered: HTTP that can not be read, or a bug.

        The framework's own would log a stack trace for each malformed request.
        """
        if status == 500:
            self.log_exception("an HTTP request failed; this is a bug", exc_info=exc)
            text = "the request failed; the server's log says why"
        else:
            text = "request: expected HTTP/1.1, got something that can not be read"
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun already")
        response = error_response(status, text)
        harden(response)
        response.force_close()
        return response
