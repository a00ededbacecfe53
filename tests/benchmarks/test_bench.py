"""The benchmarks run and check their own answers; their figures are no test's business."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks import mosec, results
from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError, running_server
from benchmarks.load import Run, h2load
from benchmarks.pairs import NATIVE

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)"
)
# What a suite compares with, in an environment that it would have to download.
PEERS = {"front": NATIVE, "mosec": mosec.ENVIRONMENT}


@pytest.mark.full
@needs_h2load
@pytest.mark.parametrize("suite", [*bench.SUITES, *bench.OTHERS])
def test_short_run_of_every_suite_reports_its_figures(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if suite in PEERS and not PEERS[suite].is_installed:
        pytest.skip(f"{PEERS[suite].name} is not installed (make bench ARGS={suite})")
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "none")
    output = tmp_path / "bench.json"
    assert bench.main([suite, "--rounds=1", "--scale=0.02", f"--output={output}"]) == 0
    figures = results.read(output).figures
    printed = capsys.readouterr().out
    assert figures
    for figure in figures:
        # A difference of two times may be below 0 where others keep the machine busy.
        assert all(math.isfinite(v) and (v > 0 or figure.unit) for v in figure.rounds), figure
        assert figure.name in printed


@pytest.mark.full
@needs_h2load
def test_calls_that_fail_behind_http_200_spoil_the_measurement() -> None:
    with running_server("--max-images-per-request=1") as server:
        with pytest.raises(BenchmarkError, match="expected 10 calls answered with OK"):
            h2load(server, Run(images=2, in_flight=1, calls=10))
        load = h2load(server, Run(images=1, in_flight=1, calls=10), latencies=True)
    assert load.calls == len(load.latencies_s) == 10
    assert 0 < load.quantile_s(0.5) < load.seconds


def test_target_is_a_lower_or_an_upper_bound_on_the_median() -> None:
    assert Figure("rate", "rate", [1, 5, 9], 5.0).met
    assert not Figure("rate", "rate", [1, 4, 9], 5.0).met
    assert Figure("wait", "wait", [1, 4, 9], 5.0, at_least=False).met
    assert not Figure("wait", "wait", [1, 6, 9], 5.0, at_least=False).met


@pytest.mark.parametrize(
    ("at_least", "value", "worse"),
    [(True, 0.81, False), (True, 0.79, True), (False, 1.19, False), (False, 1.21, True)],
)
def test_figure_is_worse_when_it_leaves_the_tolerance_on_the_wrong_side(
    at_least: bool, value: float, worse: bool
) -> None:
    committed = Figure("rate", "rate", [1.0], at_least=at_least)
    figure = Figure("rate", "rate", [value], at_least=at_least, tolerance=0.2)
    assert (figure.regression(committed) is not None) is worse


def test_absolute_values_are_not_compared_between_machines() -> None:
    slow = Figure("start", "start", [9.0], at_least=False, unit="s", tolerance=None)
    assert slow.regression(Figure("start", "start", [0.1], at_least=False)) is None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A bench whose one suite measures what it is told, beside results that are committed."""
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(results, "LOCAL", tmp_path / "local.json")

    def run(value: Any, *arguments: Any) -> Any:
        suite = {"rate": lambda rounds, scale: [Figure("rate", "the rate", [value] * rounds)]}
        monkeypatch.setattr(bench, "SUITES", suite)
        return bench.main([*arguments])

    return run


def test_regression_against_the_committed_result_fails_and_is_named(
    measured: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured(1.0, "--commit") == 0
    assert "nothing to compare with" in capsys.readouterr().out
    assert measured(0.9) == 0
    assert measured(0.8) == 1
    assert "WORSE  the rate: expected at least 0.85, got 0.8" in capsys.readouterr().out
    assert json.loads(results.committed_path().read_text())["figures"][0]["rounds"] == [1.0] * 5


def test_part_of_a_run_can_not_be_committed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["latency", "--commit"])
    assert "all rows of a result are of one run" in capsys.readouterr().err


def test_unknown_suite_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "got speed" in capsys.readouterr().err
