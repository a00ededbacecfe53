"""NVIDIA's own client, as published, against the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, SAMPLES, RunningServer

pytestmark = pytest.mark.full

CALLER = ROOT / "tests/triton_caller.py"
INSTALL_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with tritonclient and nothing of ours, or a skip."""
    folder = tmp_path_factory.mktemp("tritonclient")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command: list[Any] = [folder / "bin/pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["--retries=1", "--timeout=15", "tritonclient[grpc]>=2.50"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install tritonclient within {INSTALL_TIMEOUT_S} s")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"pip can not install tritonclient: {errors[-1:]}")
    return folder / "bin/python"


def test_tritonclient_gets_what_it_asks_for(
    python: Path, server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    done = subprocess.run(
        [python, "-I", CALLER, server.address, SAMPLES / "mnist-500.npz"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["live"]
    assert got["ready"]
    assert got["model_ready"] == [True, False]
    assert got["server"]["name"] == "digits-serving"
    assert got["metadata"]["inputs"] == [
        {"name": "image", "datatype": "UINT8", "shape": ["-1", "28", "28"]}
    ]
    assert got["config"]["input"][0] == {
        "name": "image", "data_type": "TYPE_UINT8", "dims": ["28", "28"],
    }  # fmt: skip
    assert "dynamic_batching" in got["config"]
    assert got["id"] == "seven"
    labels = sample["labels"][:100].tolist()
    assert sum(a == b for a, b in zip(got["digits"], labels, strict=True)) >= 98
    assert (got["dtype"], got["probabilities"]) == ("int64", [100, 10])
    assert got["same_in_fp32"]
    assert (got["chosen"], got["same_chosen"]) == (["digit"], True)
    assert got["unknown"] == ["StatusCode.NOT_FOUND", "name: expected digits, got 'cats'"]
    code, message = got["of_0_to_255"]
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("inputs[0]: expected values from 0 (background) to 1 (ink), got ")
