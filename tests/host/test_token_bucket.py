"""Token buckets: over time nobody exceeds the rate, and what is remembered is bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.host.token_bucket import MAX_KEYS, TokenBucket, TokenBuckets


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5000)), max_size=60))
def test_nobody_exceeds_the_rate_by_more_than_a_burst_and_one_request(steps: Any) -> None:
    buckets, now, taken = TokenBuckets(100), 1000.0, 0
    for pause, units in steps:
        now += pause
        wait_s = buckets.take("a", units, now)
        if not wait_s:
            taken += units
        else:
            now += 1.001 * wait_s
            assert buckets.take("a", 1, now) == 0, "the hint is enough"
            taken += 1
    largest = max((units for _, units in steps), default=0)
    assert taken <= 100 * (now - 1000.0) + 100 + largest + 1e-6


def test_request_of_any_size_is_served_and_its_debt_paid() -> None:
    bucket = TokenBucket(per_s=10, burst=10)
    assert bucket.refill(1000.0) == 10
    bucket.take(1010)
    assert bucket.refill(1000.0) == -1000
    assert bucket.wait_s == pytest.approx(100)
    assert bucket.refill(1101.0) == pytest.approx(10)


def test_keys_that_are_remembered_are_bounded() -> None:
    buckets = TokenBuckets(1)
    buckets.take("busy", 5, 1000.0)
    for key in range(2 * MAX_KEYS):
        assert buckets.take(str(key), 5, 1000.0) == 0
        assert buckets.take("busy", 1, 1000.0) > 0, "what is used is kept"
    assert len(buckets._buckets) == MAX_KEYS
    assert buckets.take(str(2 * MAX_KEYS - 1), 1, 1000.0) > 0, "the newest are kept"
