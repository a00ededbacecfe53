"""Figures that are one load over another, taking turns."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from benchmarks.altered import COUNT, COUNT_NOT
from benchmarks.echo import ANSWER
from benchmarks.environment import SERVERS, Environment
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import (
    CLASSIFY_PATH,
    BenchmarkError,
    ServerProcess,
    running_echo,
    running_server,
    settled,
)
from benchmarks.load import (
    INFER_PATH,
    STREAM_PATH,
    Load,
    Run,
    h2load,
    infer_request,
    stream_request,
)
from benchmarks.throughput import BULK, PEAK, SINGLES, scaled, title

NATIVE = Environment("pygrpc-native", ("pygrpc-native==0.5.0",))
STREAM_MESSAGES = 2_000
# Metrics cost less than what one second differs from the next by: many short rounds for each one.
METRICS_PAIRS, METRICS_SHORT = 10, 0.2
Row = dict[str, float]


def front(rounds: int, scale: float) -> list[Figure]:
    """The front alone, with a handler that does nothing, beside a front in Rust."""
    NATIVE.install()
    run = scaled(SINGLES, scale)
    program = (str(SERVERS / "native_echo.py"), CLASSIFY_PATH, ANSWER.hex())
    with running_echo() as ours, running_echo(NATIVE.programs / "python", program) as native:
        rows = _turns(rounds, lambda: h2load(ours, run), lambda: h2load(native, run))
    name = "CPU of a call to an empty handler, over pygrpc-native's"
    shares = ratios(rows, "cpu_us", "other_cpu_us")
    return [Figure("front_cpu", name, shares, 0.4, at_least=False, details=medians(rows))]


def tls(rounds: int, scale: float) -> list[Figure]:
    """A server with TLS beside one without."""
    run = scaled(SINGLES, scale)
    over_tls = replace(run, tls=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = _certificate(Path(folder))
        with _server() as plain, _server(*flags) as secured:
            rows = _turns(rounds, lambda: h2load(secured, over_tls), lambda: h2load(plain, run))
    return [_rates("tls", f"TLS on over off, {title(run)}", rows, 0.8)]


def infer(rounds: int, scale: float) -> list[Figure]:
    """The Open Inference Protocol's ModelInfer beside Classify."""
    run = scaled(SINGLES, scale)
    other = replace(run, path=INFER_PATH, encode=infer_request)
    with _server() as server:
        rows = _turns(rounds, lambda: h2load(server, other), lambda: h2load(server, run))
    return [_rates("infer", f"ModelInfer over Classify, {title(run)}", rows, 0.8)]


def stream(rounds: int, scale: float) -> list[Figure]:
    """One ClassifyStream beside unary calls with as many images as its messages."""
    messages, bulk = max(50, int(STREAM_MESSAGES * scale)), scaled(BULK, scale)
    with _server() as server:
        rows = _turns(rounds, lambda: _stream(server, messages), lambda: h2load(server, bulk))
    name = f"ClassifyStream, one stream, {BULK.images} images a message, over bulk Classify"
    return [_rates("stream", name, rows, 0.95)]


def metrics(rounds: int, scale: float) -> list[Figure]:
    """One server that counts, and then does not."""
    run = scaled(PEAK, METRICS_SHORT * scale)
    with running_server("--transport=http2", module=("benchmarks.altered", "-", "0")) as server:
        rows = _turns(
            METRICS_PAIRS * rounds,
            lambda: _counted(server, run, counts=True),
            lambda: _counted(server, run, counts=False),
        )
    return [_rates("metrics", f"metrics on over off, {title(run)}", rows, 0.97, tolerance=0.06)]


def _server(*flags: str) -> AbstractContextManager[ServerProcess]:
    return running_server("--transport=http2", *flags)


def _turns(rounds: int, ours: Callable[[], Load], other: Callable[[], Load]) -> list[Row]:
    """A row for each round. Who goes first is slower, so that alternates."""
    loads = {"": ours, "other_": other}
    for run in loads.values():
        run()  # warm-up, not counted
    rows = []
    for number in range(rounds):
        row: Row = {}
        for prefix in loads if number % 2 else reversed(loads):
            load = loads[prefix]()
            row[f"{prefix}calls_per_s"] = load.calls_per_s
            row[f"{prefix}cpu_us"] = load.server_cpu_us
        rows.append(dict(sorted(row.items())))
    return rows


def _rates(
    key: str, name: str, rows: list[Row], target: float | None = None, tolerance: float = 0.15
) -> Figure:
    shares = ratios(rows, "calls_per_s", "other_calls_per_s")
    return Figure(key, name, shares, target, tolerance=tolerance, details=medians(rows))


def _certificate(folder: Path) -> list[str]:
    """Flags for TLS with a new certificate."""
    certificate, key = folder / "server.pem", folder / "server.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    command += f" -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return [f"--tls-cert={certificate}", f"--tls-key={key}"]


def _stream(server: ServerProcess, messages: int) -> Load:
    """One stream from its first byte to its end, the caller as fast as it may; calls are messages.

    Raises:
        BenchmarkError: If a message was not answered with predictions.
    """
    run = Run(BULK.images, 1, 1, path=STREAM_PATH, encode=stream_request, messages=messages)
    before, expected = server.counter("digits_images_total"), messages * BULK.images
    load = h2load(server, run)
    images = settled(lambda: int(server.counter("digits_images_total") - before), expected)
    if images != expected:
        raise BenchmarkError(f"expected {expected} images classified, the server counts {images}")
    return replace(load, calls=messages, server_cpu_us=load.server_cpu_us / messages)


def _counted(server: ServerProcess, run: Run, *, counts: bool) -> Load:
    """A run after which the server must have counted every call, or none."""
    os.kill(server.pid, COUNT if counts else COUNT_NOT)
    before, expected = server.ok_calls(), run.calls if counts else 0
    load = h2load(replace(server, http=""), run)
    counted = settled(lambda: server.ok_calls() - before, expected)
    if counted != expected:
        raise BenchmarkError(f"expected {expected} calls to be counted, got {counted}")
    return load
