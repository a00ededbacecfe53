"""Watches a fuzzing run: a golden check and a record of memory after every thousand inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

GOLDEN_EVERY = 1000
# The corpus of a coverage-guided run lives in its process, so a little growth is no leak.
FLAT_BYTES = 32 * 2**20


class Watch:
    """Counts inputs.

    Args:
        check_golden: Raises if the target does not do its work any more.
        record: File that gets a line for every thousand inputs.
        pid: Process whose memory is recorded; None for this one.
    """

    def __init__(
        self, check_golden: Callable[[], None], record: Path, pid: int | None = None
    ) -> None:
        self.inputs = 0
        self._check_golden = check_golden
        self._record = record
        self._process = psutil.Process(pid)

    def count(self, inputs: int) -> None:
        """So many inputs more were run."""
        thousands = self.inputs // GOLDEN_EVERY
        self.inputs += inputs
        if self.inputs // GOLDEN_EVERY > thousands:
            self._check_golden()
            line = {"inputs": self.inputs, "rss": self._process.memory_info().rss}
            with self._record.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_record(record: Path) -> tuple[int, list[int]]:
    """Inputs after which the last golden check passed, and the memory at each, in bytes."""
    lines = record.read_text().splitlines() if record.exists() else []
    entries = [json.loads(line) for line in lines]
    return (entries[-1]["inputs"] if entries else 0), [entry["rss"] for entry in entries]


def growth(rss: list[int]) -> int:
    """Bytes by which the last third of a run is larger than its second third, in the median."""
    third = len(rss) // 3
    if not third:
        return 0
    return int(median(rss[-third:]) - median(rss[third : 2 * third]))
