"""The HTTP port: /metrics for Prometheus and /healthz for people and probes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from service.transports import TransportError, socket_address


class _QuietHandler(WSGIRequestHandler):
    # A peer that sends its request a byte an hour must not hold a thread for ever.
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Scrapes are not worth a line each."""


class HttpServer:
    """Serves until closed, on threads of its own.

    Args:
        host: Address to listen on.
        port: Port, or 0 for a free one.
        registry: What /metrics exports.
        is_ready: What /healthz tells: 200 if true, else 503.

    Attributes:
        port: The port really bound.

    Raises:
        TransportError: If the port can not be bound.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]
    ) -> None:
        self._metrics = make_wsgi_app(registry)
        self._is_ready = is_ready
        try:
            self._server = make_server(
                host, port, self._respond, _server_class(host), handler_class=_QuietHandler
            )
        except OSError as error:
            address = socket_address(host, port)
            raise TransportError(f"can not listen on {address}: {error.strerror}") from error
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            name="http",
            daemon=True,
            kwargs={"poll_interval": 60},
        )

    def start(self) -> None:
        """Accepts connections."""
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.socket.close()

    def _respond(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _plain(start_response, "405 Method Not Allowed", "expected GET\n")
        if path == "/metrics":
            metrics: Iterable[bytes] = self._metrics(environ, start_response)
            return metrics
        if path == "/healthz":
            if self._is_ready():
                return _plain(start_response, "200 OK", "SERVING\n")
            return _plain(start_response, "503 Service Unavailable", "NOT_SERVING\n")
        return _plain(start_response, "404 Not Found", "expected /metrics or /healthz\n")


def _plain(start_response: Any, status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


def _server_class(host: str) -> type[ThreadingWSGIServer]:
    if ":" not in host:
        return ThreadingWSGIServer

    class Server6(ThreadingWSGIServer):
        address_family = socket.AF_INET6

    return Server6
