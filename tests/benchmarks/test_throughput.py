"""The benchmark runs and checks its own answers; its figures are no test's business."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import throughput
from benchmarks.harness import BenchmarkError, h2load, running_server

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)"
)


@needs_h2load
def test_short_run_reports_every_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "RESULTS", tmp_path / "throughput.json")
    assert throughput.main(["--rounds=1", "--scale=0.02"]) in {0, 1}  # 1: a target was missed
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert set(result["summary"]) == {name for name, *_ in throughput.CASES}
    assert all(row["images_per_s"] > 0 for row in result["summary"].values())
    assert "ratio" in capsys.readouterr().out


@needs_h2load
def test_calls_that_fail_behind_http_200_spoil_the_measurement():
    with running_server("--max-images-per-request=1") as server:
        with pytest.raises(BenchmarkError, match="expected 10 calls answered with OK"):
            h2load(server, images=2, in_flight=1, calls=10)
        assert h2load(server, images=1, in_flight=1, calls=10).calls == 10
