"""A connection that goes dead without a word, and what the client makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from digits import channel
from digits.channel import CHANNEL_OPTIONS, KEEPALIVE_S
from digits.client import AsyncDigitClient, DigitClient
from service.http2.flood import PER_SECOND
from tests.conftest import RunningServer

# Times of the client are a twentieth of its real ones.
FASTER = 20
# Long after the call must have been answered. Left to itself, gRPC waits a minute for a ping.
DEADLINE_S = 50


class Relay:
    """Carries bytes between callers and a server, until told to stop; it closes nothing then."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sockets: list[Any] = []
        self._stopped: set[Any] = set()
        self._thread(self._accept)

    @property
    def connections(self) -> int:
        return len(self.sockets) // 2

    def stop(self) -> None:
        """Forgets the connections that there are, as a firewall does; carries new ones."""
        self._stopped.update(self.sockets)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self.sockets):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self.sockets += [caller, server]
                self._thread(self._carry, caller, server)
                self._thread(self._carry, server, caller)

    def _carry(self, source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65_536):
                if source not in self._stopped:
                    target.sendall(chunk)

    def _thread(self, work: Any, *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()


@pytest.fixture
def relay(server: RunningServer) -> Iterator[Relay]:
    carrying = Relay(server.address)
    yield carrying
    carrying.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = [
        (name, value // FASTER if "keepalive" in name or "ping" in name else value)
        for name, value in CHANNEL_OPTIONS
    ]
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", faster)


@pytest.mark.usefixtures("impatient")
def test_call_on_a_dead_connection_is_answered_over_another(
    relay: Relay, sample: dict[str, np.ndarray]
) -> None:
    with DigitClient(relay.address, timeout_s=DEADLINE_S) as client:
        client.classify(sample["images"][0])
        assert relay.connections == 1
        relay.stop()
        answer = client.classify(sample["images"][:3])
    assert answer.digits == sample["labels"][:3].tolist()
    assert relay.connections >= 2


@pytest.mark.usefixtures("impatient")
def test_call_of_the_asynchronous_client_is_too(
    relay: Relay, sample: dict[str, np.ndarray]
) -> None:
    async def ask() -> Any:
        async with AsyncDigitClient(relay.address, timeout_s=DEADLINE_S) as client:
            await client.classify(sample["images"][0])
            relay.stop()
            return await client.classify(sample["images"][:3])

    assert asyncio.run(ask()).digits == sample["labels"][:3].tolist()
    assert relay.connections >= 2


def test_pings_are_far_from_what_servers_take_for_a_flood() -> None:
    assert 1 / KEEPALIVE_S * 2 <= PER_SECOND
