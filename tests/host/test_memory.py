"""Memory that nobody uses goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest

from service.host import memory
from tests.conftest import RunningServer, wait_until
from tests.http2.wire import Caller, data, opening

CLASSIFY = "/digits.v1.DigitClassifierService/Classify"
# Blocks small enough for the heap, of which every hundredth stays: the rest are holes.
HOLES = """
import psutil
from service.host import memory

process = psutil.Process()
blocks = [b"%d" % number * 10_000 for number in range(1_000, 3_000)]
kept = blocks[::100]
full = process.memory_info().rss
del blocks
freed = process.memory_info().rss
memory.give_back()
print(full, freed, process.memory_info().rss)
"""


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can trim")


@GLIBC
def test_holes_between_what_is_used_are_given_back() -> None:
    command = [sys.executable, "-c", HOLES]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    full, freed, given_back = (int(value) / 2**20 for value in printed.split())
    assert full - freed < 20  # of 76 MiB: the allocator keeps them
    assert full - given_back > 50


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_trim", None)
    monkeypatch.setattr(memory, "_info", None)
    memory.give_back()
    assert memory.free_bytes() == 0


@GLIBC
def test_what_a_storm_leaves_is_given_back_by_a_server(
    start_server: Callable[..., RunningServer],
) -> None:
    """Calls of which 16 KB came, and never the rest: their memory goes when their callers go."""
    quick = {"service.host.memory.PERIOD_S": 0.1}
    server = start_server("--transport=http2", constants=quick)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    port = SimpleNamespace(port=int(server.address.rsplit(":", 1)[1]))
    callers = [Caller(port) for _ in range(24)]
    part = b"\0" + (3_000_000).to_bytes(4, "big") + bytes(16_000)
    for caller in callers:
        for stream in range(1, 401, 2):
            caller.send(opening(stream, CLASSIFY) + data(stream, part, end=False))
    wait_until(lambda: process.memory_info().rss > before + 60 * 2**20)
    for caller in callers:
        caller.socket.close()
    wait_until(lambda: process.memory_info().rss < before + 40 * 2**20)
