"""``make cuda-refusal``: the GPU wheel where there is no GPU, for real.

Installs the project with onnxruntime-gpu into a scratch environment, then with both wheels, and
starts ``digits serve`` there: ``--device cuda`` must exit and name the cause, ``auto`` must serve
on the CPU and say why. Prints what came of each; exit code 1 if one is otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import REPOSITORY
from digits.client import DigitClient

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60
NO_DRIVER = "no NVIDIA driver on this machine: libcuda.so.1 can not be loaded"
BOTH = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"


@dataclass(frozen=True)
class Outcome:
    """What became of one start.

    Attributes:
        exit_code: Of a server that did not serve, else None.
        said: Its reason: the error, or why this provider.
        provider: As an answer names it; empty without one.
        metric: The provider that /metrics names.
    """

    exit_code: int | None
    said: str
    provider: str = ""
    metric: str = ""

    def is_right(self, device: str, cause: str) -> bool:
        """Whether it is what must be on a machine without a GPU, for this cause."""
        if device == "cuda":
            return self.exit_code == 1 and cause in self.said
        on_cpu = self.provider == self.metric == "CPUExecutionProvider"
        return self.exit_code is None and on_cpu and cause in self.said


def main() -> int:
    """Tries both environments; returns the exit code."""
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        python = _environment(Path(scratch, "venv"))
        _install(python, f"{ROOT}[server]", _wheel("gpu"))
        right &= _try(python, "onnxruntime-gpu alone", NO_DRIVER)
        _install(python, _wheel("cpu"))
        right &= _try(python, "both wheels", BOTH)
    return 0 if right else 1


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


def _wheel(extra: str) -> str:
    """The extra's onnxruntime, without the CUDA libraries that the gpu extra adds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"][extra]
    (wheel,) = (each for each in requirements if each.startswith("onnxruntime"))
    return wheel.replace("[cuda,cudnn]", "")


def _install(python: Path, *requirements: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *requirements], check=True)


def _try(python: Path, installed: str, cause: str) -> bool:
    right = True
    for device in ("cuda", "auto"):
        outcome = _serve(python, device)
        fits = outcome.is_right(device, cause)
        right &= fits
        became = "serves" if outcome.exit_code is None else f"exits with {outcome.exit_code}"
        print(f"{installed}, --device {device}: {became}{'' if fits else '  UNEXPECTED'}")
        print(f"    says      {outcome.said}")
        if outcome.provider:
            print(f"    provider  {outcome.provider} (ModelRef), {outcome.metric} (metrics)")
        sys.stdout.flush()
    return right


def _serve(python: Path, device: str) -> Outcome:
    command = [str(python.with_name("digits")), "serve", "--grpc-port=0", "--http-port=0"]
    command += [f"--model-repository={REPOSITORY.absolute()}", "--log-format=json"]
    # Nothing of this checkout must be imported in place of what is installed.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DIGITS_"))}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        process = subprocess.Popen(
            [*command, f"--device={device}"], stderr=log, cwd=folder, env=environ
        )
        try:
            return _outcome(process, log.fileno())
        finally:
            process.terminate()
            process.wait(30)


def _outcome(process: subprocess.Popen[bytes], log: int) -> Outcome:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up:
        exit_code = process.poll()  # first: what it said before it exited is then complete
        for entry in _entries(log):
            if entry["message"] == "SERVING":
                return _asked(entry)
            if exit_code is not None and entry["message"].startswith("can not serve"):
                return Outcome(exit_code, entry["message"])
        if exit_code is not None:
            return Outcome(exit_code, os.pread(log, 2**20, 0).decode()[-500:])
        time.sleep(0.05)
    return Outcome(None, f"nothing within {START_TIMEOUT_S} s")


def _entries(log: int) -> Iterator[dict[str, str]]:
    for line in os.pread(log, 2**20, 0).decode().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _asked(entry: dict[str, str]) -> Outcome:
    """What a serving server tells of its provider, by every way there is."""
    with DigitClient(entry["grpc"]) as client:
        model, _ = client.get_model()
    metrics = urllib.request.urlopen(entry["http"]).read().decode()
    (info,) = (line for line in metrics.splitlines() if line.startswith("digits_model_info{"))
    metric = info.partition('provider="')[2].partition('"')[0]
    return Outcome(None, entry["provider"], model.execution_provider, metric)


if __name__ == "__main__":
    sys.exit(main())
