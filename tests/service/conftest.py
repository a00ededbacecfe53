"""Servers and repositories that several modules use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from digits.v1 import digits_pb2_grpc
from tests.calls import IMAGE, NO_RETRIES, pixels, scrape
from tests.conftest import RunningServer, running_server, wait_until
from tests.gate import Gate
from tests.releases import copy_release
from tests.service.trap import write_trap

# Many batches.
LONG = pixels(IMAGE * 4096)
FAST = "--reload-interval-s=0.05"
# Large enough to wait in the same lane.
LARGE = pixels(IMAGE * 32)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server with everything on."""
    log = tmp_path_factory.mktemp("web") / "log"
    often = {"service.playground.classify.REQUESTS_PER_S": 100_000}
    with running_server(log, "--playground", constants=often) as running:
        yield running


@pytest.fixture
def busy(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> Iterator[Callable[..., tuple[RunningServer, Any, Any, Gate]]]:
    """Starts a server with one slot that has a long request; what comes next waits.

    Returns the server, a stub, the call of the long request, and the gate that the slot waits at.
    """
    channels: list[Any] = []

    def start(transport: str, *flags: str, **options: Any) -> tuple[RunningServer, Any, Any, Gate]:
        gate = Gate(tmp_path / f"gate-{len(channels)}")
        server = start_server(
            f"--transport={transport}", "--instances=1", *flags, gate=gate, **options
        )
        channel = grpc.insecure_channel(server.address, options=NO_RETRIES)
        channels.append(channel)
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        gate.close()
        long = stub.Classify.future(LONG, timeout=60)
        wait_until(lambda: 0 < scrape(server)["digits_queue_images"] < 4096)
        return server, stub, long, gate

    yield start
    for channel in channels:
        channel.close()


@pytest.fixture
def endless_repository(tmp_path: Path) -> Path:
    """A version whose golden digits are never answered: loading never ends."""
    write_trap(tmp_path / "digits/1", at_once=True)
    return tmp_path / "digits"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "digits"
    path.mkdir()
    copy_release(path, 1, "1")
    return path
