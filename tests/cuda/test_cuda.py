"""The CUDA execution provider on a GPU: the answers of the CPU, reloads, drains."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from digits.client import DigitClient
from service.artifact.format import load_artifact
from service.serving.engine import CPU_PROVIDER, CUDA_PROVIDER, Engine, cuda_problem
from tests.conftest import COMMITTED, RunningServer, wait_until
from tests.releases import copy_release

PROBLEM = cuda_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"there is no GPU to use: {PROBLEM}")
# Between two kernels in float32: the error that golden digits are allowed, too.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return load_artifact(COMMITTED / "1").variants["fp32"].model


@pytest.fixture(scope="module")
def engines(model: Any) -> tuple[Engine, Engine]:
    return Engine(model, device="cuda"), Engine(model)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    copy_release(folder, 1, COMMITTED / "1")
    return folder


def test_session_runs_on_the_gpu(engines: tuple[Engine, Engine]) -> None:
    assert [engine.provider for engine in engines] == [CUDA_PROVIDER, CPU_PROVIDER]


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 64, 500])
def test_gpu_answers_as_the_cpu_does(
    engines: tuple[Engine, Engine], sample: dict[str, np.ndarray], batch: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 28, 28), dtype=np.uint8)
    for images in (sample["images"], noise):
        parts = np.split(images, range(batch, len(images), batch))
        answered, expected = ([engine.answer(part) for part in parts] for engine in engines)
        for ours, theirs in zip(answered, expected, strict=True):
            np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=TOLERANCE)
            np.testing.assert_allclose(ours.is_digit, theirs.is_digit, atol=TOLERANCE)


def test_gpu_decides_all_test_images_as_the_cpu_does(
    engines: tuple[Engine, Engine], full_data: Path
) -> None:
    raw = (full_data / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    images = np.frombuffer(raw, np.uint8).reshape(-1, 28, 28)
    gpu, cpu = (
        np.concatenate([engine.run(part) for part in np.split(images, 10)]) for engine in engines
    )
    assert np.abs(gpu - cpu).max() <= TOLERANCE
    assert (gpu.argmax(axis=1) == cpu.argmax(axis=1)).all()


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_server_takes_fp32_on_the_gpu_and_says_so(
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
    repository: Path,
    device: str,
) -> None:
    server = start_server(f"--device={device}", f"--model-repository={repository}")
    with DigitClient(server.address) as client:
        answer = client.classify(sample["images"])
    assert (answer.model.execution_provider, answer.model.precision) == (CUDA_PROVIDER, "fp32")
    right = np.array(answer.digits) == sample["labels"]
    assert right.mean() > 0.99
    assert server.stop() == 0


def test_no_call_fails_on_reload_and_drain(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray], repository: Path
) -> None:
    server = start_server(
        "--device=cuda", f"--model-repository={repository}", "--reload-interval-s=0.1"
    )
    ended, versions, errors = threading.Event(), [], []

    def call() -> None:
        with DigitClient(server.address, timeout_s=30) as client:
            while not ended.is_set():
                try:
                    versions.append(client.classify(sample["images"][:8]).model.version)
                except Exception as error:  # whatever it is, it is a call that was lost
                    errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    wait_until(lambda: versions)
    copy_release(repository, 2, COMMITTED / "1")
    wait_until(lambda: versions[-1] == "2")
    ended.set()
    for caller in callers:
        caller.join()
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert errors == []
    assert set(versions) == {"1", "2"}
