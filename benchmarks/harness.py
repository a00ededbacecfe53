"""The servers that benchmarks measure, each in a process of its own, and the model they serve.

The machine may be shared and drift: measure things side by side in one run and report ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from digits.client import DigitClient
from service.artifact.format import Artifact, Variant, load_artifact
from service.artifact.repository import in_serving_order
from service.serving.loader import ON_CPU

CLASSIFY_PATH = "/digits.v1.DigitClassifierService/Classify"
# As for the server, another repository can be named.
REPOSITORY = Path(
    os.environ.get("DIGITS_MODEL_REPOSITORY", Path(__file__).parents[1] / "models/digits")
)
START_TIMEOUT_S, STOP_TIMEOUT_S = 60, 60
# What counts follow by: they are published a moment after the last answer has left.
SETTLE_S = 5


class BenchmarkError(RuntimeError):
    """A measurement cannot be trusted; the message says why."""


@dataclass(frozen=True)
class ServerProcess:
    """A server that is serving.

    Attributes:
        pid: Process id.
        address: ``host:port`` of gRPC.
        http: Base URL of the HTTP port; empty where there is none.
        ready_s: Seconds from its start to SERVING.
    """

    pid: int
    address: str
    http: str = ""
    ready_s: float = 0.0

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def cpu_seconds(self) -> float:
        """CPU time used so far, to the nanosecond; psutil's has steps of 10 ms."""
        # The CPU clock of another process; source: CPUCLOCK_SCHED in Linux' posix-timers.h.
        return time.clock_gettime((~self.pid << 3) | 2)

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics, spelled as it is exported."""
        text = urllib.request.urlopen(f"{self.http}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}

    def counter(self, series: str) -> float:
        """The value of one series of /metrics, spelled as it is exported."""
        metrics = self.metrics()
        if series not in metrics:
            raise BenchmarkError(f"/metrics has no {series}")
        return metrics[series]

    def samples(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series with this name and, among others, these labels."""
        found = [
            (dict(re.findall(r'(\w+)="([^"]*)"', series)), value)
            for series, value in self.metrics().items()
            if series.partition("{")[0] == name
        ]
        return [(own, value) for own, value in found if labels.items() <= own.items()]

    def ok_calls(self, path: str = CLASSIFY_PATH) -> int:
        """Calls of a method answered with OK, by the server's own count.

        Raises:
            BenchmarkError: If it counts none of that method.
        """
        service, _, method = path.strip("/").partition("/")
        labels = {"grpc_code": "OK", "grpc_service": service, "grpc_method": method}
        counts = self.samples("grpc_server_handled_total", **labels)
        if not counts:
            raise BenchmarkError(f"/metrics has no calls of {path}")
        return int(sum(count for _, count in counts))


@contextlib.contextmanager
def running_server(
    *flags: str, module: Sequence[str] = ("service.cli",)
) -> Iterator[ServerProcess]:
    """Starts ``digits serve`` on free ports, waits until it serves, and drains it at the end.

    Args:
        flags: Of ``digits serve``.
        module: What is run in its place, with arguments that come before ``serve``.
    """
    command = [sys.executable, "-m", *module, "serve", "--grpc-port=0", "--http-port=0"]
    command += [f"--model-repository={REPOSITORY}", "--log-format=json", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            fields = _wait_for_serving(process, log.fileno())
            http = fields["http"].removesuffix("/metrics")
            ready_s = float(fields["ready_after"].split()[0])
            yield ServerProcess(process.pid, fields["grpc"], http, ready_s)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            finally:
                process.kill()


@contextlib.contextmanager
def running_echo(
    python: str | Path = sys.executable, program: Sequence[str] = ("-m", "benchmarks.echo")
) -> Iterator[ServerProcess]:
    """An empty handler: what a call costs before anything is done for it.

    Args:
        python: Interpreter of the environment that has the transport.
        program: Its arguments; it must print its address, and runs until it is killed.
    """
    with subprocess.Popen([python, *program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().decode().strip()
            if not address:
                raise BenchmarkError(f"{' '.join(program)} printed no address")
            yield ServerProcess(process.pid, address)
        finally:
            process.kill()


def _wait_for_serving(process: subprocess.Popen[bytes], log: int) -> dict[str, str]:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up:
        exit_code = process.poll()  # first: what it logged before it exited is then complete
        text = os.pread(log, 2**20, 0).decode()
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry: dict[str, str] = json.loads(line)
                if entry["message"] == "SERVING":
                    return entry
        if exit_code is not None:
            raise BenchmarkError(f"the server exited with {exit_code}:\n{text}")
        time.sleep(0.02)
    raise BenchmarkError(f"the server did not serve within {START_TIMEOUT_S} s:\n{text}")


def served_artifact() -> Artifact:
    """The release that a server on the default repository serves."""
    return load_artifact(in_serving_order(REPOSITORY)[0])


def served_variant() -> Variant:
    """The variant of it that serves on a CPU."""
    return served_artifact().first_of(ON_CPU)


def check_answers(server: ServerProcess) -> None:
    """Every golden digit must get its exact answer over the wire.

    Raises:
        BenchmarkError: If one does not.
    """
    golden = served_artifact().golden
    with DigitClient(server.address) as client:
        answered = client.classify(golden.images).predictions
    precision = served_variant().precision
    probabilities = np.stack([p.probabilities for p in answered])
    golden.check(probabilities, golden.is_digit[precision], precision)


def settled(count: Callable[[], int], expected: int) -> int:
    """A count once it is as expected, or after a few seconds."""
    give_up = time.monotonic() + SETTLE_S
    while (counted := count()) < expected and time.monotonic() < give_up:
        time.sleep(0.05)
    return counted
