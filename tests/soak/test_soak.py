"""The short form of ``make soak``, and that a soak would notice what it is for."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.harness import BenchmarkError
from tests.soak import soak
from tests.soak.traffic import Code

pytestmark = pytest.mark.full


def test_seconds_of_mixed_traffic_and_reloads_are_answered_as_expected() -> None:
    with soak.soaked_server("http2") as (server, versions):
        result = soak.soak(server, versions, seconds=4, seed=1)
    assert result["reloads"] >= 4
    assert result["refused versions"] >= 1
    assert result["calls"]["single"] > 0
    assert result["server counts"]["Classify INVALID_ARGUMENT"] > 0
    # Memory needs longer to settle; threads and descriptors do not.
    assert not {"threads", "descriptors"} & set(soak.not_flat(result["used"]))


def test_wrong_answer_ends_the_soak() -> None:
    with soak.soaked_server("http2") as (server, versions):
        versions.expected["1"] = versions.expected["1"][::-1]
        with pytest.raises(BenchmarkError, match="a wrong answer of version 1"):
            soak.soak(server, versions, seconds=4, seed=1)


def test_call_that_the_server_did_not_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.soak.traffic.TIMEOUT_S", 0.1)
    seen, left = Counter({("Classify", Code.OK): 1}), Counter({"Classify": 0})
    with soak.soaked_server("http2") as (server, _):
        soak.check_counts(server, Counter(), left)
        with pytest.raises(BenchmarkError, match="callers saw"):
            soak.check_counts(server, seen, left)


def test_memory_that_grows_at_the_end_is_noticed() -> None:
    samples = soak.Samples(
        [0, 50, 100, 100, 100, 101, 103, 103], [9] * 8, [9, 9, 9, 9, 9, 9, 14, 14]
    )
    used = {name: samples.quarters(name) for name in soak.FLAT}
    assert used["rss_mib"] == [25, 100, 100.5, 103]
    assert soak.not_flat(used) == ["descriptors"]
    assert soak.not_flat(used | {"rss_mib": [25, 100, 100, 109]}) == ["rss_mib", "descriptors"]
