"""This server beside mosec, the fastest server for small models on PyPI, with the same model.

It runs two worker processes in an environment of its own, with the engine of this one, and is
measured with several settings of its dynamic batching; the best one of each case counts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.environment import SERVERS, Environment, same_engine
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import BenchmarkError, running_server, served_artifact, served_variant
from benchmarks.load import Run, duration_s, h2load, run_h2load
from benchmarks.machine import by_vnni
from benchmarks.throughput import scaled, title

VERSION = "0.9.8"
ENVIRONMENT = Environment("mosec", (f"mosec=={VERSION}", *same_engine()))
# Largest batches to try, in requests; 1 is without.
BATCHES = (64, 16, 1)
CASES = {"singles": Run(1, 64, 20_000), "bulk": Run(64, 8, 1_500)}
START_TIMEOUT_S = 90


@dataclass(frozen=True)
class Mosec:
    """A server that answers raw pixels with raw probabilities over HTTP/1.1.

    Attributes:
        port: On loopback.
    """

    port: int

    @property
    def url(self) -> str:
        """Of its method."""
        return f"http://127.0.0.1:{self.port}/inference"

    def check_answers(self) -> None:
        """The golden digits must get the answers that ours get: it is the same model at work.

        Raises:
            ArtifactError: If one does not.
        """
        golden = served_artifact().golden
        answers = self.call(golden.images)
        golden.check(answers[:, :10], answers[:, 10], served_variant().precision)

    def call(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities and is_digit, float32[N, 11], of images uint8[N, 28, 28]."""
        with urllib.request.urlopen(self.url, images.tobytes(), timeout=30) as response:
            return np.frombuffer(response.read(), np.float32).reshape(-1, 11)

    def calls_per_s(self, run: Run) -> float:
        """Rate of calls; HTTP/1.1 has one call at a time on a connection.

        Raises:
            BenchmarkError: If a call was not answered with 2xx.
        """
        body = np.resize(served_artifact().golden.images, (run.images, 28, 28)).tobytes()
        output = run_h2load(self.url, body, run.calls, run.in_flight, 1, options=("--h1",))
        return run.calls / duration_s(output)


def measure(rounds: int, scale: float) -> list[Figure]:
    """Single images and bulk."""
    ENVIRONMENT.install()
    targets = {"singles": by_vnni(without=1.7, having=2.5), "bulk": 1.0}
    rows = [_round(scale) for _ in range(rounds)]
    figures = []
    for case, run in CASES.items():
        of_case = [row[case] for row in rows]
        name = f"{title(run)}, over mosec {VERSION}"
        shares = ratios(of_case, "images_per_s", "mosec_images_per_s")
        figures.append(
            Figure(f"mosec_{case}", name, shares, targets[case], details=medians(of_case))
        )
    return figures


def _round(scale: float) -> dict[str, dict[str, float]]:
    """Images/s of both servers in every case, one server at a time."""
    rates: dict[str, dict[str, float]] = {name: {} for name in CASES}
    with running_server("--transport=http2") as server:
        for name, run in CASES.items():
            h2load(server, scaled(run, scale / 4))  # warm-up, not counted
            rates[name]["images_per_s"] = (
                h2load(server, scaled(run, scale)).calls_per_s * run.images
            )
    for batch in BATCHES:
        with running_mosec(batch) as mosec:
            mosec.check_answers()
            for name, run in CASES.items():
                mosec.calls_per_s(scaled(run, scale / 4))
                rate = mosec.calls_per_s(scaled(run, scale)) * run.images
                best = rates[name].get("mosec_images_per_s", 0.0)
                rates[name]["mosec_images_per_s"] = max(rate, best)
    return rates


@contextlib.contextmanager
def running_mosec(batch: int) -> Iterator[Mosec]:
    """Starts it, waits until it answers, and ends it with all of its processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        model = Path(folder, "model.onnx")
        model.write_bytes(served_variant().model)
        process = subprocess.Popen(
            [
                ENVIRONMENT.programs / "python", SERVERS / "mosec_server.py",
                "--address", "127.0.0.1", "--port", str(port), "--log-level", "warning",
            ],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
            # It leaves files in TMPDIR when it is killed.
            env={**os.environ, "TMPDIR": folder, "MODEL": str(model), "BATCH": str(batch)},
        )  # fmt: skip
        try:
            server = Mosec(port)
            _wait(server, process, log.fileno())
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _wait(server: Mosec, process: subprocess.Popen[bytes], log: int) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.call(np.zeros((1, 28, 28), np.uint8))
        except OSError as error:
            if process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.2)
                continue
            text = os.pread(log, 2**20, 0).decode()
            raise BenchmarkError(f"mosec does not answer: {error}\n{text}") from error
        return
