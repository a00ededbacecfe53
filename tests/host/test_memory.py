"""Memory that nobody uses goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from service.host import memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked for it")
def test_holes_between_what_is_used_are_given_back():
    command = [sys.executable, "-c", HOLES]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    full, freed, given_back = (int(value) / 2**20 for value in printed.split())
    assert full - freed < 20  # of 76 MiB: the allocator keeps them
    assert full - given_back > 50


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_trim", None)
    memory.give_back()
