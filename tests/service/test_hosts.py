"""IPv4, IPv6 and dual stack, on both ports."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import RunningServer

FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
pytestmark = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")


def answers(address: str, port: Any) -> Any:
    with socket.socket(FAMILIES[address]) as peer:
        peer.settimeout(30)
        return peer.connect_ex((address, port)) == 0


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
@pytest.mark.parametrize(
    ("host", "listening"),
    [
        ("0.0.0.0", ["127.0.0.1"]),
        ("::", ["127.0.0.1", "::1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
    ],
)
def test_both_ports_listen_on_the_families_of_the_host(
    start_server: Callable[..., RunningServer], transport: str, host: str, listening: Any
) -> None:
    server = start_server(f"--transport={transport}", f"--host={host}")
    grpc_port = int(server.address.rpartition(":")[2])
    http_port = urlsplit(server.http).port
    found = [address for address in FAMILIES if answers(address, http_port)]
    assert found == listening
    found = [address for address in FAMILIES if answers(address, grpc_port)]
    if (transport, host) == ("grpcio", "0.0.0.0"):  # grpcio knows one address for all of them
        assert found == ["127.0.0.1", "::1"]
        assert "gRPC listens on IPv6, too" in server.log_text()
    else:
        assert found == listening
        assert "IPv6, too" not in server.log_text()
