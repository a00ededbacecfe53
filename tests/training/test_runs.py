"""Runs have names, nothing is overwritten, and what is notified of them is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from training import __main__ as command
from training import commands, sets
from training.config import ARCHITECTURE_NAMES, DATASET_NAMES, OWN, TrainingConfig
from training.data import DATASETS, Split
from training.model import ARCHITECTURES
from training.runs import CHECKPOINT, LATEST
from training.train import Trainer

QUICK = ["--recipe=classic", "--arch=mlp", "--epochs=1", "--validation=50"]


@pytest.fixture(autouse=True)
def in_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: dict[str, np.ndarray]
) -> None:
    split = Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    monkeypatch.chdir(tmp_path)


def test_run_is_named_by_date_and_architecture_and_is_the_latest() -> None:
    assert command.main(QUICK) == 0
    [run] = [path for path in LATEST.parent.iterdir() if path != LATEST]
    assert run.name.endswith("-mlp")
    assert LATEST.resolve() == run.resolve()
    assert (LATEST / CHECKPOINT).is_file()


def test_run_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*QUICK, "--run-dir=one"]) == 0
    assert command.main([*QUICK, "--run-dir=one"]) == 1
    assert "--run-dir: one holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("finished", "said"), [(0, "nothing was saved"), (1, "state.pt holds the last epoch")]
)
def test_interrupt_says_what_was_saved(
    finished: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Trainer._epoch, []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_epoch", interrupted)
    assert command.main([*QUICK, "--epochs=3"]) == 130
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arch=resnet"], "or layers such as 32-p-48-48s-p, got 'resnet'"),
        (["--epochs=0"], "epochs: expected 1 to 10000, got 0"),
        (["--mix=mnist"], "--mix: expected --data beside it"),
        (["--bogus"], "unrecognized arguments"),
    ],
)
def test_wrong_use_exits_with_2(flags: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(flags)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_wrong_use_is_told_before_pytorch_is_loaded() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from training.__main__ import main;"
        "main(['--arch=resnet'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_pytorch_gets_one_thread_before_it_is_loaded() -> None:
    code = (
        "import os, sys; os.environ.pop('OMP_NUM_THREADS', None); sys.modules['torch'] = None\n"
        "from training.__main__ import main\n"
        "try: main([])\n"
        "except ImportError: print(os.environ['OMP_NUM_THREADS'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("loading PyTorch\n1\n", "")


def test_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(commands, "describe", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        command.main(["describe"])


def test_what_a_network_does_not_have_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([*QUICK, "--run-dir=mlp"]) == 0
    seven = str(ROOT / "tests/samples/7.png")
    assert command.main(["explain", seven, "--run-dir=mlp"]) == 1
    assert "mlp has no convolution to explain" in capsys.readouterr().err
    assert command.main(["describe", "--kernel-size=5"]) == 1
    assert f"{TrainingConfig.arch} has no such choice" in capsys.readouterr().err


def test_names_are_those_of_what_there_is() -> None:
    assert set(ARCHITECTURE_NAMES) == set(ARCHITECTURES)
    assert set(DATASET_NAMES) == set(DATASETS)
    assert OWN in DATASETS
