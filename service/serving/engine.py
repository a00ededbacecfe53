"""Inference: one onnxruntime session on the device that was asked for, or a clear refusal."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Self

import numpy as np
import numpy.typing as npt

# Official Linux builds of onnxruntime report home unless told not to before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from service.artifact.errors import ArtifactError
from service.serving.model import Answers

PROBABILITIES, IS_DIGIT = "probabilities", "is_digit"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# TF32 would break parity with the exported answers; exhaustive search re-tunes every batch shape.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
MISSING_LIBRARY = (
    "the CUDA provider can not be loaded: a CUDA or cuDNN library is missing or too old"
)
# Runs that are timed at warm-up for each size, after one that is not; the fastest counts.
WARM_UP_RUNS = 5
# What onnxruntime and CUDA say when there was no memory, or no thread, to be had. onnxruntime has
# no type for it: most of its errors are of one, which bad models raise, too.
EXHAUSTED = (
    "bad_alloc", "bad allocation", "failed to allocate memory", "out of memory",
    "cannot allocate memory", "cuda_error_out_of_memory", "cudaerrormemoryallocation",
    "pthread_create failed",
)  # fmt: skip
# onnxruntime's own log would go past ours; every error comes as an exception, too.
FATAL = 4


class DeviceError(RuntimeError):
    """The device that was asked for can not serve; the message says why."""


class TimeLimit:
    """Ends what onnxruntime does in this block, such as a loop without end, when its time is up.

    Between two operators, and between two rounds of a loop. What it ends raises an error.

    Args:
        seconds: From here on.

    Raises:
        ArtifactError: At the end of the block, if the time was up.
    """

    def __init__(self, seconds: float) -> None:
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = FATAL
        self._seconds = seconds
        self._opening: ort.SessionOptions | None = None
        self._is_up = False
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()  # from here on nothing is ended
        if self._is_up:
            raise ArtifactError(f"expected a model that is ready within {self._seconds:g} s")

    def opens(self, options: ort.SessionOptions) -> None:
        """A session is about to be made with these."""
        with self._lock:
            self._opening = options
            options.set_load_cancellation_flag(self._is_up)

    def _end(self) -> None:
        with self._lock:
            self._is_up = True
            self.run_options.terminate = True
            if self._opening is not None:
                self._opening.set_load_cancellation_flag(True)


class Engine:
    """Runs a model. Thread-safe: ``session.run`` may be called from several threads.

    Args:
        model: A serialised ONNX model, ``image`` uint8[batch, 28, 28] to ``probabilities``
            float32[batch, 10] and, if it was trained to tell, ``is_digit`` float32[batch, 1].
        device: ``auto``, ``cpu`` or ``cuda``.
        intra_op_threads: Threads inside one run.
        limit: Ends the opening of the session, and every run; None for no limit.

    Attributes:
        provider: The execution provider the session really uses.
        reason: Why it is that one.
        fell_back: Whether that is the CPU although onnxruntime-gpu is installed and the CPU was not
            asked for.

    Raises:
        DeviceError: If ``cuda`` was asked for and does not work.
        MemoryError: If the GPU has no memory left.
    """

    def __init__(
        self,
        model: bytes,
        *,
        device: str = "cpu",
        intra_op_threads: int = 1,
        limit: TimeLimit | None = None,
    ) -> None:
        def options() -> ort.SessionOptions:
            made = session_options(intra_op_threads)
            if limit is not None:
                limit.opens(made)
            return made

        self._run_options = limit.run_options if limit else None
        self._session, self.reason = _open_session(model, device, options)
        self.provider: str = self._session.get_providers()[0]
        self._scored = IS_DIGIT in self.signature()[1]
        self._outputs = [PROBABILITIES, IS_DIGIT] if self._scored else [PROBABILITIES]
        self.fell_back = (
            self.provider == CPU_PROVIDER and device != "cpu" and _is_installed("onnxruntime-gpu")
        )

    def signature(self) -> tuple[list[str], list[str]]:
        """Names of the model's inputs and outputs."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        return [value.name for value in inputs], [value.name for value in outputs]

    def answer(self, images: npt.NDArray[np.uint8]) -> Answers:
        """Classifies images uint8[N, 28, 28]."""
        count = len(images)
        outputs: list[npt.NDArray[np.float32]] = self._session.run(
            self._outputs, {"image": images}, self._run_options
        )
        probabilities = outputs[0]
        if probabilities.shape != (count, 10):
            expected = f"float32[{count}, 10]"
            raise RuntimeError(f"probabilities: expected {expected}, got {probabilities.shape}")
        if not self._scored:
            return Answers(probabilities, np.ones(count, np.float32))
        return Answers(probabilities, outputs[1].reshape(count))

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The probabilities of ``answer``."""
        return self.answer(images).probabilities

    def warm_up(self, sizes: Iterable[int]) -> dict[int, float]:
        """Runs batches of these sizes; returns the seconds that each takes."""
        return {size: self._fastest(np.zeros((size, 28, 28), np.uint8)) for size in sizes}

    def _fastest(self, images: npt.NDArray[np.uint8]) -> float:
        self.run(images)
        fastest = float("inf")
        for _ in range(WARM_UP_RUNS):
            started = time.perf_counter()
            self.run(images)
            fastest = min(fastest, time.perf_counter() - started)
        return fastest


def _open_session(
    model: bytes, device: str, options: Callable[[], ort.SessionOptions]
) -> tuple[ort.InferenceSession, str]:
    if device == "cpu":
        return _cpu_session(model, options()), "cpu was asked for"
    try:
        session = _cuda_session(model, options())
    except DeviceError as error:
        if device == "cuda":
            raise
        return _cpu_session(model, options()), f"auto: {error}"
    return session, f"{device}: the CUDA provider works"


def session_options(threads: int) -> ort.SessionOptions:
    """What every session of this project runs with: ``threads`` inside one run, no spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    # onnxruntime would also take its own format, which nothing here has checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Parallelism comes from batches side by side; a spinning pool would burn the CPU they need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _cpu_session(model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    # The fallback would load a model that is damaged a second time, and print about it.
    return ort.InferenceSession(model, options, providers=[CPU_PROVIDER], enable_fallback=0)


def _cuda_session(model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session that runs on CUDA alone.

    onnxruntime by itself would fall back to the CPU with a log line; every way it can do so is
    closed here.
    """
    problem = cuda_problem()  # first: a try that must fail prints what it missed, and misleads
    if problem is not None:
        raise DeviceError(problem)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            session = ort.InferenceSession(
                model, options, providers=[(CUDA_PROVIDER, CUDA_OPTIONS)], enable_fallback=0
            )
        session.disable_fallback()
    except Exception as error:  # onnxruntime raises many types here
        if is_exhausted(error):
            raise MemoryError(_first_line(error)) from error
        raise DeviceError(f"{MISSING_LIBRARY} ({_first_line(error)})") from error
    if session.get_providers()[0] != CUDA_PROVIDER:
        raise DeviceError(f"{MISSING_LIBRARY} (onnxruntime fell back to the CPU)")
    return session


def _check_wheels() -> None:
    """CUDA needs the GPU wheel, and needs it alone."""
    installed = {name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)}
    if len(installed) == 2:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "uninstall both, then install onnxruntime-gpu"
        )
    if CUDA_PROVIDER not in ort.get_available_providers():
        wheel = next(iter(installed), "onnxruntime")
        raise DeviceError(f"{wheel} is built without CUDA; install onnxruntime-gpu in its place")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cuda_problem() -> str | None:
    """Why no session can run on CUDA here; None when nothing is known against it."""
    try:
        _check_wheels()
    except DeviceError as error:
        return str(error)
    return _driver_problem()


def _driver_problem() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine: libcuda.so.1 can not be loaded"
    devices = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(devices)) or not devices.value:
        return "the NVIDIA driver sees no GPU"
    return None


def is_exhausted(error: BaseException) -> bool:
    """Whether an error of onnxruntime says that memory or threads ran out.

    That is nothing a model can be blamed for.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in EXHAUSTED)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
