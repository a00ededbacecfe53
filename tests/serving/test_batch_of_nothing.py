"""A batch of which every request was dropped: nothing is run, and nothing is learned from it."""

from __future__ import annotations

from service.serving.request import Refusal
from tests.serving.core import Bench


def test_batch_of_dropped_requests_takes_no_time_and_changes_no_estimate() -> None:
    bench = Bench()
    bench.batcher.expect({4: 0.5})
    expected_s = bench.batcher._cost.seconds(4)
    late = bench.request(1, deadline=bench.clock.now)
    bench.submit(late)
    batch = bench.step()
    assert late.refusal is Refusal.EXPIRED
    assert (bench.runs, batch.images, batch.seconds) == ([], 0, 0.0)
    assert bench.batcher._cost.seconds(4) == expected_s
