"""The rate limit by itself, on a clock of its own."""

from __future__ import annotations

import pytest

from service.call import Call
from service.job import Refusal
from service.security.limit import RateLimit
from service.security.tokens import MAX_TOKENS


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limit(clock):
    return RateLimit(100, clock)


def call(count, caller="anna"):
    made = Call(b"", received=0.0, deadline=None)
    made.count, made.caller = count, caller
    return made


def test_one_seconds_worth_is_admitted_at_once(limit):
    calls = [call(1) for _ in range(150)]
    refused = limit.refuse(calls)
    # The call that finds nothing left is lent to, so it is one more.
    assert refused == calls[101:]
    assert {c.refusal for c in refused} == {Refusal.RATE_LIMITED}
    assert calls[0].refusal is None


def test_debt_is_told_exactly_and_paid_by_waiting(limit, clock):
    assert limit.refuse([call(1000)]) == []
    [late] = limit.refuse([call(1)])
    assert late.retry_after_s == pytest.approx(9.0)
    clock.now += 8.99
    assert limit.refuse([call(1)])
    clock.now += 0.02
    assert limit.refuse([call(1)]) == []


def test_over_time_nobody_gets_more_than_the_rate(limit, clock):
    got = 0
    for _ in range(1000):
        clock.now += 0.01
        burst = [call(3) for _ in range(5)]
        got += 3 * (len(burst) - len(limit.refuse(burst)))
    assert got == pytest.approx(100 * 10 + 100, abs=6)  # ten seconds, and what was saved up


def test_callers_do_not_share(limit):
    assert limit.refuse([call(1000), call(1, "bert")]) == []
    assert [c.caller for c in limit.refuse([call(1), call(1, "bert")])] == ["anna"]


def test_refused_calls_are_not_charged(limit, clock):
    limit.refuse([call(101)])
    for _ in range(50):
        assert limit.refuse([call(1000)])
    clock.now += 0.02
    assert limit.refuse([call(1)]) == []


def test_callers_that_are_gone_are_forgotten(limit, clock):
    for generation in range(20):
        limit.refuse([call(200, f"{generation}-{n}") for n in range(MAX_TOKENS)])
        clock.now += 3
    assert len(limit._paid_until) <= 2 * MAX_TOKENS
