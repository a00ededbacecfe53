"""The limit: onnxruntime alone on the model that is served, no server around it."""

from __future__ import annotations

import os
import statistics
import threading
import time

import numpy as np

from benchmarks.harness import served_artifact, served_variant

# Official Linux builds of onnxruntime report home unless told not to before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

WARM_UP_RUNS = 20


def session(model: bytes) -> ort.InferenceSession:
    """A session with the settings of the server's: one thread inside a run, no spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Engine:
    """Raw inference of one batch of golden images, again and again."""

    def __init__(self, batch: int, model: bytes | None = None) -> None:
        self._session = session(model or served_variant().model)
        golden = served_artifact().golden
        self._inputs = {"image": np.resize(golden.images, (batch, 28, 28))}
        for _ in range(WARM_UP_RUNS):
            self.run()

    def run(self) -> None:
        """One inference."""
        self._session.run(["probabilities"], self._inputs)


def images_per_s(seconds: float, callers: int = 2, batch: int = 64) -> float:
    """Throughput of ``callers`` threads on one session."""
    engine, runs = Engine(batch), [0] * callers
    deadline = time.perf_counter() + seconds

    def call(caller: int) -> None:
        while time.perf_counter() < deadline:
            engine.run()
            runs[caller] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(runs) * batch / (time.perf_counter() - began)


def seconds_per_image(batch: int, model: bytes | None = None) -> float:
    """One caller, the median of many runs; of the served model, where no other is given."""
    engine, seconds = Engine(batch, model), []
    for _ in range(max(50, 2000 // batch)):
        began = time.perf_counter()
        engine.run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / batch
