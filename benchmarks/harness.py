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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from digits.client import DigitClient
from digits.v1 import digits_pb2
from service.artifact import Artifact, load_artifact
from service.engine import Engine
from service.repository import in_serving_order

CLASSIFY_PATH = "/digits.v1.DigitClassifierService/Classify"
# As for the server, another repository can be named.
REPOSITORY = Path(
    os.environ.get("DIGITS_MODEL_REPOSITORY", Path(__file__).parents[1] / "models/digits")
)


class BenchmarkError(RuntimeError):
    """A measurement can not be trusted; the message says why."""


@dataclass(frozen=True)
class ServerProcess:
    """A server that is serving.

    Attributes:
        pid: Process id.
        address: ``host:port`` of gRPC.
        http: Base URL of the HTTP port.
        ready_s: Seconds from its start to SERVING.
    """

    pid: int
    address: str
    http: str
    ready_s: float

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

    def ok_calls(self, path: str = CLASSIFY_PATH) -> int:
        """Calls of a method answered with OK, by the server's own count."""
        service, _, method = path.strip("/").partition("/")
        labels = f'grpc_code="OK",grpc_method="{method}",grpc_service="{service}",grpc_type='
        for series, count in self.metrics().items():
            if series.startswith(f"grpc_server_handled_total{{{labels}"):
                return int(count)
        raise BenchmarkError(f"/metrics has no calls of {path}")


@contextlib.contextmanager
def running_server(*flags: str, module: str = "service.cli") -> Iterator[ServerProcess]:
    """Starts ``digits serve`` on free ports, waits until it serves, and drains it at the end.

    Args:
        flags: Of ``digits serve``.
        module: What is run with them; a benchmark may put something around the server.
    """
    command = [sys.executable, "-m", module, "serve", "--grpc-port=0", "--http-port=0"]
    command += [f"--model-repository={REPOSITORY}", "--log-format=json", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            fields = _wait_for_serving(process, log.fileno())
            http = fields["http"].removesuffix("/metrics")
            ready_s = float(fields["ready_after"].split()[0])
            yield ServerProcess(process.pid, fields["grpc"], http, ready_s)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextlib.contextmanager
def running_echo(transport: str) -> Iterator[ServerProcess]:
    """An empty handler on a transport: what a call costs before anything is done for it."""
    command = [sys.executable, "-m", "benchmarks.echo", transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield ServerProcess(process.pid, process.stdout.readline().decode().strip(), "", 0.0)
        finally:
            process.kill()


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


def raw_seconds_per_image(batch: int) -> float:
    """What onnxruntime needs for an image in a batch, one caller, the median of many runs."""
    artifact = served_artifact()
    engine, images = Engine(artifact.model), np.resize(artifact.golden.images, (batch, 28, 28))
    engine.warm_up(batch)
    seconds = []
    for _ in range(max(50, 2000 // batch)):
        began = time.perf_counter()
        engine.run(images)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / batch


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
        calls: Calls answered with OK; for an echo, with anything.
        seconds: Duration of the run.
        server_cpu_us: CPU time of the server per call, in microseconds.
        latencies_s: Duration of each call, float64[calls], where asked for.
    """

    calls: int
    seconds: float
    server_cpu_us: float
    latencies_s: npt.NDArray[np.float64]

    @property
    def calls_per_s(self) -> float:
        """Rate."""
        return self.calls / self.seconds

    def quantile_s(self, share: float) -> float:
        """Latency that this share of the calls stays below."""
        return float(np.quantile(self.latencies_s, share))


def classify_request(images: npt.NDArray[np.uint8]) -> bytes:
    """A serialised ClassifyRequest of uint8[N, 28, 28]."""
    return digits_pb2.ClassifyRequest(pixels=images.tobytes()).SerializeToString()


@dataclass(frozen=True)
class Run:
    """What the load generator does.

    Attributes:
        images: Images per call, or per message of one.
        in_flight: Calls kept open, on up to 8 connections.
        calls: Calls in all.
        rate: Calls begun each second, over all connections; 0 begins one when another ended.
        all_ok: Whether a call that is not answered with OK spoils the run.
        headers: Of each call, besides those of gRPC.
        tls: Whether to call over TLS, without a look at the certificate.
        path: Of the method that is called.
        encode: Makes its request of pixels uint8[N, 28, 28].
        messages: How often a call sends that request.
    """

    images: int
    in_flight: int
    calls: int
    rate: float = 0.0
    all_ok: bool = True
    headers: tuple[str, ...] = ()
    tls: bool = False
    path: str = CLASSIFY_PATH
    encode: Callable[[npt.NDArray[np.uint8]], bytes] = classify_request
    messages: int = 1


def h2load(server: ServerProcess, run: Run, *, latencies: bool = False) -> Load:
    """Sends calls with h2load.

    h2load sees only HTTP 200, which a gRPC error carries too: the server's own count of OK
    decides whether the figure counts.

    Raises:
        BenchmarkError: If h2load is missing, or calls were not answered with OK.
    """
    message = run.encode(np.resize(served_artifact().golden.images, (run.images, 28, 28)))
    connections = min(8, run.in_flight)
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes((b"\0" + len(message).to_bytes(4, "big") + message) * run.messages)
        command = [h2load_program(), "-n", str(run.calls), "-c", str(connections)]
        command += ["-m", str(run.in_flight // connections), "-t", "1", "-d", str(body)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        for header in run.headers:
            command += ["-H", header]
        command += ["--rps", str(max(1, round(run.rate / connections)))] if run.rate else []
        command += ["--log-file", str(log)] if latencies else []
        before, cpu_before = _ok_calls(server, run), server.cpu_seconds()
        output = subprocess.run(
            [*command, f"{'https' if run.tls else 'http'}://{server.address}{run.path}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        cpu = server.cpu_seconds() - cpu_before
        durations = np.loadtxt(log, usecols=2, ndmin=1) / 1e6 if latencies else np.empty(0)
    calls = _count(server, before, run) if server.http else run.calls
    return Load(calls, duration_s(output), cpu / max(1, calls) * 1e6, durations)


def h2load_program() -> str:
    """Where h2load is.

    Raises:
        BenchmarkError: If it is missing.
    """
    program = shutil.which("h2load")
    if program is None:
        raise BenchmarkError("h2load is not installed (Debian: apt-get install nghttp2-client)")
    return program


def duration_s(output: str) -> float:
    """What h2load says it took, without its own start."""
    found = re.search(r"finished in ([0-9.]+)(us|ms|s|m)", output)
    if found is None:
        raise BenchmarkError(f"h2load printed no duration:\n{output}")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}[found[2]]


def _ok_calls(server: ServerProcess, run: Run) -> int:
    return server.ok_calls(run.path) if server.http else 0


def _count(server: ServerProcess, before: int, run: Run) -> int:
    answered = settled(lambda: _ok_calls(server, run) - before, run.calls)
    if answered != run.calls and run.all_ok:
        raise BenchmarkError(
            f"expected {run.calls} calls answered with OK, the server counts {answered}"
        )
    return answered


def settled(count: Callable[[], int], expected: int) -> int:
    """A count once it is as expected, or after two seconds: it follows what left a moment later."""
    give_up = time.monotonic() + 2
    while (counted := count()) < expected and time.monotonic() < give_up:
        time.sleep(0.05)
    return counted


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
