"""What every benchmark needs: a server process, a load generator, and the limit to compare with.

The machine may be shared and drift: measure things side by side in one run and report ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil

from digits.client import DigitClient
from digits.v1 import digits_pb2
from service.artifact import Artifact, load_artifact
from service.engine import Engine
from service.repository import in_serving_order

CLASSIFY_PATH = "/digits.v1.DigitClassifierService/Classify"
REPOSITORY = Path(__file__).parents[1] / "models/digits"


class BenchmarkError(RuntimeError):
    """A measurement can not be trusted; the message says why."""


@dataclass(frozen=True)
class ServerProcess:
    """A server that is serving.

    Attributes:
        pid: Process id.
        address: ``host:port`` of gRPC.
        http: Base URL of the HTTP port.
    """

    pid: int
    address: str
    http: str

    def cpu_seconds(self) -> float:
        """CPU time used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def counter(self, series: str) -> float:
        """The value of one series of /metrics, spelled as it is exported."""
        text = urllib.request.urlopen(f"{self.http}/metrics").read().decode()
        for line in text.splitlines():
            if line.startswith(series + " "):
                return float(line.rsplit(" ", 1)[1])
        raise BenchmarkError(f"/metrics has no {series}")

    def ok_calls(self) -> int:
        """Classify calls answered with OK, by the server's own count."""
        labels = (
            'grpc_code="OK",grpc_method="Classify",'
            'grpc_service="digits.v1.DigitClassifierService",grpc_type="unary"'
        )
        return int(self.counter(f"grpc_server_handled_total{{{labels}}}"))


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[ServerProcess]:
    """Starts ``digits serve`` on free ports, waits until it serves, and drains it at the end."""
    command = [sys.executable, "-m", "service.cli", "serve", "--grpc-port=0", "--http-port=0"]
    command += [f"--model-repository={REPOSITORY}", "--log-format=json", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            fields = _wait_for_serving(process, log.fileno())
            http = fields["http"].removesuffix("/metrics")
            yield ServerProcess(process.pid, fields["grpc"], http)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_for_serving(process: subprocess.Popen[bytes], log: int) -> dict[str, str]:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        text = os.pread(log, 2**20, 0).decode()
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                entry: dict[str, str] = json.loads(line)
                if entry["message"] == "SERVING":
                    return entry
        if process.poll() is not None:
            raise BenchmarkError(f"the server exited with {process.returncode}:\n{text}")
        time.sleep(0.02)
    raise BenchmarkError("the server did not serve within 60 s")


def served_artifact() -> Artifact:
    """The artifact that a server on the default repository serves."""
    return load_artifact(in_serving_order(REPOSITORY)[0])


def check_answers(server: ServerProcess) -> None:
    """Every golden digit must get its exact answer over the wire.

    Raises:
        BenchmarkError: If one does not.
    """
    artifact = served_artifact()
    golden = artifact.golden
    with DigitClient(server.address) as client:
        answered = client.classify(golden.images).predictions
    golden.check(np.stack([p.probabilities for p in answered]), artifact.precision)


def raw_limit(seconds: float, callers: int = 2, batch: int = 64) -> float:
    """Images per second of onnxruntime alone: ``callers`` threads on one session."""
    engine = Engine(served_artifact().model)
    images = np.resize(served_artifact().golden.images, (batch, 28, 28))
    engine.warm_up(batch)
    runs = [0] * callers
    deadline = time.perf_counter() + seconds

    def call(caller: int) -> None:
        while time.perf_counter() < deadline:
            engine.run(images)
            runs[caller] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(runs) * batch / (time.perf_counter() - began)


@dataclass(frozen=True)
class Load:
    """The outcome of one run of the load generator.

    Attributes:
        calls: Calls answered.
        calls_per_s: Rate.
        server_cpu_us: CPU time of the server per call, in microseconds.
    """

    calls: int
    calls_per_s: float
    server_cpu_us: float


def h2load(server: ServerProcess, *, images: int, in_flight: int, calls: int) -> Load:
    """Sends calls of ``images`` images, keeping ``in_flight`` of them open on 8 connections.

    h2load sees only HTTP 200, which a gRPC error carries too: the server's own count of OK
    decides whether the figure counts.

    Raises:
        BenchmarkError: If h2load is missing or any call was not answered with OK.
    """
    program = shutil.which("h2load")
    if program is None:
        raise BenchmarkError("h2load is not installed (Debian: apt-get install nghttp2-client)")
    pixels = np.resize(served_artifact().golden.images, (images, 28, 28)).tobytes()
    message = digits_pb2.ClassifyRequest(pixels=pixels).SerializeToString()
    connections = min(8, in_flight)
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0" + len(message).to_bytes(4, "big") + message)
        body.flush()
        command = [program, "-n", str(calls), "-c", str(connections)]
        command += ["-m", str(in_flight // connections), "-t", "1", "-d", body.name]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        before, cpu_before = server.ok_calls(), server.cpu_seconds()
        output = subprocess.run(
            [*command, f"http://{server.address}{CLASSIFY_PATH}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        cpu = server.cpu_seconds() - cpu_before
    # A call is counted a moment after its answer left.
    give_up = time.monotonic() + 2
    while (answered := server.ok_calls() - before) < calls and time.monotonic() < give_up:
        time.sleep(0.05)
    if answered != calls:
        raise BenchmarkError(
            f"expected {calls} calls answered with OK, the server counts {answered}"
        )
    rate = re.search(r"finished in [^,]+, ([0-9.]+) req/s", output)
    if rate is None:
        raise BenchmarkError(f"h2load printed no rate:\n{output}")
    return Load(calls, float(rate[1]), cpu / calls * 1e6)


def machine() -> dict[str, str]:
    """What a figure was measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    tools = {}
    for name in ("grpcio", "pygrpc-native", "onnxruntime", "numpy", "protobuf"):
        with contextlib.suppress(PackageNotFoundError):
            tools[name] = version(name)
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} x {model[1] if model else platform.machine()}",
        "python": platform.python_version(),
        **tools,
    }
