"""Servers that stop and come back behind nginx, under load: no call fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from digits.client import DigitClient
from tests.calls import TRANSPORTS
from tests.conftest import RunningServer
from tests.service.load import Load
from tests.service.nginx import Nginx, nginx_program

pytestmark = pytest.mark.full


@TRANSPORTS
def test_no_call_fails_while_each_server_stops_and_comes_back(
    tmp_path: Path,
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
    transport: str,
) -> None:
    """gRPC itself sends a call again that nginx had not begun when it reloaded."""
    nginx_program()
    flags = (f"--transport={transport}", "--drain-delay-s=5")  # as in deploy/base
    with ThreadPoolExecutor() as pool:
        servers = list(pool.map(lambda _: start_server(*flags), range(2)))
    with DigitClient(servers[0].address) as client:
        expected = client.classify(sample["images"]).digits
    nginx = Nginx(tmp_path, [server.address for server in servers])
    with (
        contextlib.closing(nginx),
        Load(nginx.address, sample["images"], expected, options=()) as load,
    ):
        load.wait_for(50)
        for server in servers:
            nginx.leave_out(server.address)
            server.process.terminate()
            assert server.process.wait(30) == 0
            load.wait_for(50)
            start_server(*flags, f"--grpc-port={server.address.rpartition(':')[2]}")
            nginx.leave_out()
            load.wait_for(50)
    assert load.failures == []
    assert min(load.streams, load.long_items) > 50
