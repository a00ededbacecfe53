"""The GPU wheel where there is no GPU, for real: 300 MB to download, so only on request."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tomllib
import urllib.request
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from digits.client import DigitClient
from tests.conftest import REPOSITORY, ROOT, wait_until

pytestmark = pytest.mark.skipif(
    "TEST_GPU_WHEEL" not in os.environ,
    reason="downloads onnxruntime-gpu (set TEST_GPU_WHEEL=1)",
)
NO_DRIVER = "no NVIDIA driver on this machine: libcuda.so.1 can not be loaded"
BOTH = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"


@dataclass
class Outcome:
    """What became of one start: the exit code of a server that did not serve, and what it said."""

    exit_code: int | None
    said: str
    providers: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the project and onnxruntime-gpu, without the CUDA libraries."""
    folder = tmp_path_factory.mktemp("gpu") / "venv"
    venv.create(folder, with_pip=True)
    install(folder / "bin/python", f"{ROOT / 'proto'}", f"{ROOT}[server]", wheel("gpu"))
    return folder / "bin/python"


@pytest.fixture(scope="module")
def python_with_both(python: Path) -> Path:
    install(python, wheel("cpu"))
    return python


def wheel(extra: Any) -> Any:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (
        each for each in project["optional-dependencies"][extra] if each.startswith("onnxruntime")
    )
    return found.replace("[cuda,cudnn]", "")


def install(python: Any, *requirements: Any) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *requirements], check=True)


def serve(python: Any, device: Any, folder: Path) -> Any:
    command = [python.with_name("digits"), "serve", "--grpc-port=0", "--http-port=0"]
    command += [f"--model-repository={REPOSITORY}", "--log-format=json", f"--device={device}"]
    # Nothing of this checkout must be imported in place of what is installed.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DIGITS_"))}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, cwd=folder, env=environ)
    try:
        return wait_until(lambda: outcome(process, log))
    finally:
        process.terminate()
        process.wait(30)


def outcome(process: Any, log: Any) -> Outcome | None:
    exit_code = process.poll()  # first: what it said before it exited is then complete
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry["message"] == "SERVING":
                return Outcome(None, entry["provider"], providers_told(entry))
    return None if exit_code is None else Outcome(exit_code, log.read_text())


def providers_told(entry: Any) -> Any:
    """As an answer and as /metrics name them."""
    with DigitClient(entry["grpc"]) as client:
        model, _ = client.get_model()
    metrics = urllib.request.urlopen(entry["http"]).read().decode()
    (info,) = (line for line in metrics.splitlines() if line.startswith("digits_model_info{"))
    metric = info.partition('provider="')[2].partition('"')[0]
    return frozenset((model.execution_provider, metric))


def assert_refused_by_cuda_and_served_by_auto(python: Any, cause: Any, folder: Path) -> None:
    refused = serve(python, "cuda", folder)
    assert refused.exit_code == 1
    assert cause in refused.said
    served = serve(python, "auto", folder)
    assert served.exit_code is None
    assert cause in served.said
    assert served.providers == {"CPUExecutionProvider"}


def test_gpu_wheel_without_a_driver(python: Path, tmp_path: Path) -> None:
    assert_refused_by_cuda_and_served_by_auto(python, NO_DRIVER, tmp_path)


def test_both_wheels(python_with_both: Path, tmp_path: Path) -> None:
    assert_refused_by_cuda_and_served_by_auto(python_with_both, BOTH, tmp_path)
