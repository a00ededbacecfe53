from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest

from service import engine
from service.engine import DeviceError, Engine
from tests.conftest import REPOSITORY

MODEL = (REPOSITORY / "1/model.onnx").read_bytes()


def test_telemetry_is_off_before_onnxruntime_is_imported():
    code = (
        "import sys, os; import service.engine; "
        "assert 'onnxruntime' in sys.modules; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environ = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environ, text=True)
    assert output == "1\n"


def test_answer_does_not_depend_on_batch_mates(sample):
    """Bit for bit, on the CPU with one thread, in every size of batch."""
    runner = Engine(MODEL)
    images = sample["images"][:130]
    alone = np.concatenate([runner.run(image[None]) for image in images])
    for size in (2, 3, 7, 16, 64, 130):
        together = np.concatenate(
            [runner.run(images[start : start + size]) for start in range(0, len(images), size)]
        )
        assert np.array_equal(alone, together), size


def test_warm_up_measures_a_positive_cost():
    assert 0 < Engine(MODEL).warm_up(8) < 1


def test_cuda_without_a_cuda_build_is_refused_with_the_cause():
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    with pytest.raises(DeviceError, match="built without CUDA; install onnxruntime-gpu"):
        Engine(MODEL, device="cuda")


def test_auto_without_cuda_serves_on_the_cpu_and_says_why():
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    runner = Engine(MODEL, device="auto")
    assert runner.provider == "CPUExecutionProvider"
    assert "without CUDA" in runner.reason


def test_both_wheels_installed_are_named(monkeypatch):
    monkeypatch.setattr(engine, "_is_installed", lambda _: True)
    with pytest.raises(DeviceError, match="both installed"):
        Engine(MODEL, device="cuda")


def test_cuda_build_without_a_driver_is_refused_before_a_session_is_tried(monkeypatch):
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


def test_session_that_fell_back_to_the_cpu_is_refused(monkeypatch):
    """onnxruntime with CUDA listed but not loadable creates a CPU session and only logs."""
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(engine, "_driver_problem", lambda: None)
    real = ort.InferenceSession

    def falls_back(model, options, **_):
        return real(model, ort.SessionOptions(), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", falls_back)
    with pytest.raises(DeviceError, match="fell back to the CPU"):
        Engine(MODEL, device="cuda")
