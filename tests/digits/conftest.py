"""Servers of a few lines, for what a real one can not be made to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from digits.v1 import digits_pb2_grpc


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Serves a servicer until the test ends; returns the address, at one given the server."""
    servers = []

    def start(servicer: Any, address: Any = None) -> Any:
        server = grpc.server(futures.ThreadPoolExecutor(8))
        digits_pb2_grpc.add_DigitClassifierServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port(address or "127.0.0.1:0")
        server.start()
        servers.append(server)
        return server if address else f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)
