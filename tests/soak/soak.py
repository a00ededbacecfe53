"""A server under mixed good and bad traffic while its model changes.

Every response is checked, the server's counts are compared with the callers', and its memory,
threads and descriptors must stay flat.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.harness import BenchmarkError, ServerProcess, running_server
from tests.soak.traffic import Caller, Code, Operator, Versions, wait_until

SERVICE = "digits.v1.DigitClassifierService"
CALLERS, MAX_IMAGES = 6, 512
FLAGS = (
    f"--max-images-per-request={MAX_IMAGES}",
    "--max-queue-images=8192",  # all callers at once, those that left included
)
INVALID = "Classify INVALID_ARGUMENT"
SAMPLE_S, CYCLE_S = 0.25, 5.0
# What the last quarter of a run may have more than the third one, in the median: before that,
# allocators and thread pools warm up.
FLAT = {"rss_mib": 8.0, "threads": 2.0, "descriptors": 4.0}


@dataclass
class Samples:
    """What the server process used, over time."""

    rss_mib: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)

    def take(self, process: psutil.Process) -> None:
        """Adds one of each."""
        self.rss_mib.append(process.memory_info().rss / 2**20)
        self.threads.append(process.num_threads())
        self.descriptors.append(process.num_fds())

    def quarters(self, name: str) -> list[float]:
        """The median of each quarter of the run."""
        values: list[float] = getattr(self, name)
        bounds = [len(values) * part // 4 for part in range(5)]
        return [round(median(values[i:j]), 1) for i, j in itertools.pairwise(bounds)]


class Crew:
    """Threads that work until the end, or until one of them fails."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._errors: list[Exception] = []
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[], None]) -> None:
        """Starts one more."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # whatever it is, the run is no good
                self._errors.append(error)
                self.ended.set()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def end(self) -> None:
        """Waits for all; raises what the first one failed with."""
        self.ended.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def soak(server: ServerProcess, versions: Versions, seconds: float, seed: int) -> dict[str, Any]:
    """One run; what was done and used.

    Raises:
        BenchmarkError: If an answer or a count is wrong.
    """
    callers = [
        Caller(server.address, versions, MAX_IMAGES, random.Random(f"{seed} {number}"))
        for number in range(CALLERS)
    ]
    operator, samples, crew = Operator(server, versions), Samples(), Crew()

    def operate() -> None:
        while not crew.ended.wait(min(CYCLE_S, seconds / 10)):
            operator.cycle()

    for caller in callers:
        crew.add(lambda caller=caller: caller.run(crew.ended))  # type: ignore[misc]
    crew.add(operate)
    process, give_up = psutil.Process(server.pid), time.monotonic() + seconds
    while time.monotonic() < give_up and not crew.ended.wait(SAMPLE_S):
        samples.take(process)
    crew.end()
    ended = sum((caller.ended for caller in callers), Counter())
    left = sum((caller.left for caller in callers), Counter())
    counts = check_counts(server, ended, left)
    return {
        "calls": dict(sum((caller.calls for caller in callers), Counter()).most_common()),
        "reloads": operator.reloads,
        "refused versions": operator.refusals,
        "server counts": counts,
        "used": {name: samples.quarters(name) for name in FLAT},
    }


def check_counts(
    server: ServerProcess, seen: Counter[tuple[str, Code]], left: Counter[str]
) -> dict[str, int]:
    """The server's counts by method and code, once they agree with the callers'.

    Args:
        server: Has nothing more to do.
        seen: RPC and code -> calls that a caller saw end so.
        left: RPC -> calls whose end no caller waited for.

    Raises:
        BenchmarkError: If they do not agree.
    """
    counts: dict[str, int] = {}

    def agree() -> bool:
        started, now = server_counts(server)
        counts.clear()
        counts.update(now)
        return (
            sum(counts.values()) == started
            and not any(name.endswith(("INTERNAL", "UNKNOWN")) for name in counts)
            and counts.get(INVALID, 0) == seen["Classify", Code.INVALID_ARGUMENT]
            and all(_within(counts, method, seen[method, Code.OK], left[method]) for method in left)
        )

    try:
        wait_until(agree, "the server's counts agree")
    except BenchmarkError:
        raise BenchmarkError(f"callers saw {seen}, left {left}; server: {counts}") from None
    return counts


def _within(counts: dict[str, int], method: str, seen_ok: int, left: int) -> bool:
    """Every call that was seen to end well is counted so, and nothing else but those left."""
    departed = sum(counts.get(f"{method} {code}", 0) for code in ("CANCELLED", "DEADLINE_EXCEEDED"))
    ok = counts.get(f"{method} OK", 0)
    return seen_ok <= ok and ok + departed <= seen_ok + left


def server_counts(server: ServerProcess) -> tuple[int, dict[str, int]]:
    """Calls begun of Classify and ClassifyStream, and those ended by method and code."""
    ended, started = {}, 0.0
    for method in ("Classify", "ClassifyStream"):
        labels = {"grpc_service": SERVICE, "grpc_method": method}
        started += sum(count for _, count in server.samples("grpc_server_started_total", **labels))
        for own, count in server.samples("grpc_server_handled_total", **labels):
            if count:
                ended[f"{method} {own['grpc_code']}"] = int(count)
    return int(started), ended


@contextlib.contextmanager
def soaked_server(transport: str) -> Iterator[tuple[ServerProcess, Versions]]:
    """A server on a repository of its own."""
    with tempfile.TemporaryDirectory() as folder:
        versions = Versions(Path(folder))
        repository = f"--model-repository={versions.repository}"
        with running_server(repository, f"--transport={transport}", *FLAGS) as server:
            yield server, versions


def not_flat(used: dict[str, list[float]]) -> list[str]:
    """What the last quarter has too much of."""
    return [name for name, bound in FLAT.items() if used[name][3] - used[name][2] > bound]
