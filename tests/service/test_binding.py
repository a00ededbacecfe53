"""I/O binding on the memory that this machine has; on CUDA the same calls name another device."""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime as ort
import pytest

from service.binding import BoundRunner, bucket_of
from service.engine import CPU_PROVIDER, CUDA_PROVIDER, Engine, session_options
from tests.conftest import REPOSITORY

MODEL = (REPOSITORY / "1/model.onnx").read_bytes()


@pytest.fixture
def session():
    return ort.InferenceSession(MODEL, session_options(1), providers=[CPU_PROVIDER])


@pytest.mark.parametrize(
    ("count", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64), (65, 256)]
)
def test_batches_are_padded_to_powers_of_four(count, bucket):
    assert bucket_of(count) == bucket


@pytest.mark.parametrize("count", [1, 2, 5, 64, 65])
def test_padded_batch_gets_the_answers_of_its_own_rows(session, sample, count):
    runner, images = BoundRunner(session, "cpu"), sample["images"]
    plain = session.run(["probabilities"], {"image": images[:count]})[0]
    runner.run(images[100:200])  # leaves its rows in the buffers
    np.testing.assert_array_equal(runner.run(images[:count]), plain)


def test_answer_survives_the_next_run(session, sample):
    runner = BoundRunner(session, "cpu")
    first = runner.run(sample["images"][:4])
    kept = first.copy()
    runner.run(sample["images"][4:8])
    np.testing.assert_array_equal(first, kept)


def test_threads_do_not_share_buffers(session, sample):
    runner, images = BoundRunner(session, "cpu"), sample["images"]
    expected = session.run(["probabilities"], {"image": images})[0]
    wrong = []

    def call(start):
        for _ in range(50):
            answered = runner.run(images[start : start + 8])
            if not np.array_equal(answered, expected[start : start + 8]):
                wrong.append(start)

    threads = [threading.Thread(target=call, args=(8 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class CudaSession:
    """A session that says it runs on CUDA and notes what is asked of it."""

    def __init__(self, real):
        self._real = real
        self.plain_runs = 0
        self.bound_runs = 0

    def get_providers(self):
        return [CUDA_PROVIDER]

    def run(self, *arguments):
        self.plain_runs += 1
        return self._real.run(*arguments)

    def io_binding(self):
        return self._real.io_binding()

    def run_with_iobinding(self, binding):
        self.bound_runs += 1
        self._real.run_with_iobinding(binding)


def test_engine_binds_when_the_session_is_on_cuda(session, sample, monkeypatch):
    on_cuda = CudaSession(session)
    monkeypatch.setattr("service.engine._open_session", lambda *_: (on_cuda, "a test"))
    monkeypatch.setattr(
        "service.engine.BoundRunner", lambda opened, _device: BoundRunner(opened, "cpu")
    )
    engine = Engine(MODEL, device="cuda")
    engine.warm_up(20)
    assert on_cuda.bound_runs >= len([1, 4, 16, 64])
    answered = engine.run(sample["images"][:3])
    np.testing.assert_array_equal(
        answered, session.run(["probabilities"], {"image": sample["images"][:3]})[0]
    )
    assert on_cuda.plain_runs == 0


def test_engine_on_the_cpu_runs_plainly(monkeypatch):
    def never(*_):
        raise AssertionError("bound on the CPU")

    monkeypatch.setattr("service.engine.BoundRunner", never)
    assert Engine(MODEL).provider == CPU_PROVIDER
