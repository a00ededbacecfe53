"""The end of the threads of the core: each comes to it, whichever of them is the last to know."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from service.serving.batch import Batch
from service.serving.preparing import Preparer
from tests.conftest import wait_until
from tests.serving.core import GatedBench, results, twice


def test_preparer_that_was_never_started_has_nothing_to_wait_for() -> None:
    assert Preparer().stop(0)


def test_slot_that_waits_for_the_other_part_of_a_request_ends_with_it() -> None:
    bench = GatedBench()
    split, other = bench.request(*range(6)), bench.request(6, 7)
    bench.batcher.submit([split, other])
    for _ in range(2):
        assert bench.running.acquire(timeout=30)
    ended: list[bool] = []
    stopping = threading.Thread(target=lambda: ended.append(bench.batcher.stop(20)))
    stopping.start()
    while not bench.batcher._stopping:
        stopping.join(0.01)
    bench.gate.release(2)
    stopping.join(60)
    assert ended == [True]
    assert (results(split), results(other)) == (twice(*range(6)), twice(6, 7))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_slot_that_a_bug_ends_keeps_no_other_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = GatedBench()
    bench.batcher.submit([bench.request(*range(6)), bench.request(6, 7)])
    for _ in range(2):
        assert bench.running.acquire(timeout=30)
    distribute = bench.batcher.distribute

    def broken(batch: Batch) -> Any:
        if bench.batcher._idle:
            raise RuntimeError("a bug")
        return distribute(batch)

    monkeypatch.setattr(bench.batcher, "distribute", broken)
    ended: list[bool] = []
    stopping = threading.Thread(target=lambda: ended.append(bench.batcher.stop(20)))
    stopping.start()
    wait_until(lambda: bench.batcher._stopping)
    bench.gate.release()
    wait_until(lambda: bench.batcher._idle)
    bench.gate.release()
    stopping.join(60)
    assert ended == [True]
