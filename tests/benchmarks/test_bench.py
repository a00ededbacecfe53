"""The benchmarks run and check their own answers; their figures are no test's business."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import __main__ as bench
from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError, Run, h2load, running_server

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)"
)


@needs_h2load
@pytest.mark.parametrize("suite", bench.SUITES)
def test_short_run_of_every_suite_reports_its_figures(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert bench.main([suite, "--rounds=1", "--scale=0.02"]) in {0, 1}  # 1: a target was missed
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["figures"]
    for figure in result["figures"]:
        assert all(value > 0 for value in figure["rounds"]), figure
        assert figure["name"] in capsys.readouterr().out or len(result["figures"]) > 1


@needs_h2load
def test_calls_that_fail_behind_http_200_spoil_the_measurement():
    with running_server("--max-images-per-request=1") as server:
        with pytest.raises(BenchmarkError, match="expected 10 calls answered with OK"):
            h2load(server, Run(images=2, in_flight=1, calls=10))
        load = h2load(server, Run(images=1, in_flight=1, calls=10), latencies=True)
    assert load.calls == len(load.latencies_s) == 10
    assert 0 < load.quantile_s(0.5) < load.seconds


def test_target_is_a_lower_or_an_upper_bound_on_the_median():
    assert Figure("rate", [1, 5, 9], 5.0).met
    assert not Figure("rate", [1, 4, 9], 5.0).met
    assert Figure("wait", [1, 4, 9], 5.0, at_least=False).met
    assert not Figure("wait", [1, 6, 9], 5.0, at_least=False).met


def test_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "got speed" in capsys.readouterr().err
