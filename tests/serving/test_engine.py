"""One session: what it runs on, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from service.artifact.errors import ArtifactError
from service.serving import engine
from service.serving.engine import DeviceError, Engine, TimeLimit, is_exhausted
from tests.conftest import REPOSITORY
from tests.releases import FP32
from tests.service.trap import FOR_EVER, write_trap

MODEL = (REPOSITORY / "1/model.fp32.onnx").read_bytes()


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    code = (
        "import sys, os; import service.serving.engine; "
        "assert 'onnxruntime' in sys.modules; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environ = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environ, text=True)
    assert output == "1\n"


def test_answer_does_not_depend_on_batch_mates(sample: dict[str, np.ndarray]) -> None:
    """Bit for bit, on the CPU with one thread, in every size of batch."""
    runner = Engine(MODEL)
    images = sample["images"][:130]
    alone = np.concatenate([runner.run(image[None]) for image in images])
    for size in (2, 3, 7, 16, 64, 130):
        together = np.concatenate(
            [runner.run(images[start : start + size]) for start in range(0, len(images), size)]
        )
        assert np.array_equal(alone, together), size


def test_warm_up_measures_every_size_that_it_is_given() -> None:
    seconds = Engine(MODEL).warm_up([1, 3, 8])
    assert list(seconds) == [1, 3, 8]
    assert all(taken > 0 for taken in seconds.values())


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (MemoryError(), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 1024"), True),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), True),
        (RuntimeError("pthread_create failed, error code: 11"), True),
        (RuntimeError("[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model"), False),
        (ValueError("No such operator"), False),
    ],
)
def test_lack_of_memory_or_threads_is_told_from_a_bad_model(error: Any, exhausted: bool) -> None:
    assert is_exhausted(error) is exhausted


def test_gpu_without_memory_left_is_no_reason_to_fall_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(engine, "cuda_problem", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", full)
    for device in ("auto", "cuda"):
        with pytest.raises(MemoryError, match="CUDA failure 2"):
            Engine(MODEL, device=device)


def test_cuda_without_a_cuda_build_is_refused_with_the_cause() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    with pytest.raises(DeviceError, match="built without CUDA; install onnxruntime-gpu"):
        Engine(MODEL, device="cuda")


def test_auto_without_cuda_serves_on_the_cpu_and_says_why() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    runner = Engine(MODEL, device="auto")
    assert runner.provider == "CPUExecutionProvider"
    assert "without CUDA" in runner.reason


def test_both_wheels_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_installed", lambda _: True)
    with pytest.raises(DeviceError, match="both installed"):
        Engine(MODEL, device="cuda")


def test_cuda_build_without_a_driver_is_refused_before_a_session_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is an NVIDIA driver")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(engine, "_is_installed", lambda name: name == "onnxruntime-gpu")
    with pytest.raises(DeviceError, match=r"^no NVIDIA driver .* can not be loaded$"):
        Engine(MODEL, device="cuda")


def test_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime with CUDA listed but not loadable creates a CPU session and only logs."""
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(engine, "_driver_problem", lambda: None)
    real = ort.InferenceSession

    def falls_back(model: Any, options: Any, **_: Any) -> Any:
        return real(model, ort.SessionOptions(), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", falls_back)
    with pytest.raises(DeviceError, match="fell back to the CPU"):
        Engine(MODEL, device="cuda")


def test_time_limit_ends_a_run(tmp_path: Path) -> None:
    write_trap(tmp_path / "1")
    endless = (tmp_path / "1" / FP32).read_bytes()
    with pytest.raises(ArtifactError, match=r"ready within 0\.2 s"), TimeLimit(0.2) as limit:
        Engine(endless, limit=limit).run(np.full((1, 28, 28), FOR_EVER, np.uint8))


def test_time_limit_ends_the_opening_of_a_session() -> None:
    limit = TimeLimit(0.0)
    limit._end()
    with pytest.raises(Exception, match="loading canceled"):
        Engine(MODEL, limit=limit)


def test_engine_outlives_its_time_limit(sample: dict[str, np.ndarray]) -> None:
    with TimeLimit(60.0) as limit:
        engine = Engine(MODEL, limit=limit)
    assert not limit._timer.is_alive()
    assert engine.run(sample["images"][:1]).shape == (1, 10)


def test_onnxruntimes_own_format_is_not_read() -> None:
    """It would pass by every check of an ONNX file."""
    with pytest.raises(Exception, match="protobuf parsing failed"):
        Engine(b"\x12\x08\0\0ORTM" + bytes(100))
