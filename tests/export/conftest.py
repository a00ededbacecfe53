"""A small network trained for a moment on the committed digits, exported, quantised, and gated."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console

from export import judge
from export.create import make_release, publish
from export.gate import gate_fp32, gate_int8
from export.graph import export_model
from export.judge import Comparison
from export.parity import make_references
from export.quantize import quantize_model
from tests.releases import write_keys
from training.checkpoint import Checkpoint
from training.config import TrainingConfig
from training.data import Split
from training.evaluate import evaluate, predict_logits
from training.scoring import fit_is_digit
from training.sets import Sets
from training.train import Trainer

LABELS = tuple("0123456789")
CONFIG = TrainingConfig(epochs=12, batch_size=50, ema_decay=0.9, validation=0)


class Silent:
    """A reporter that shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def check(self, check: Any) -> None:
        pass


class Caught(Exception):  # noqa: N818 - it is no error
    """The gate found something."""

    def __init__(self, check: Any) -> None:
        super().__init__(f"{check.group}: {check.name}: {check.figure}, {check.bound}")
        self.check = check


class UntilCaught(Silent):
    """A reporter that ends the gate at the first failed check."""

    def check(self, check: Any) -> None:
        if not check.passed:
            raise Caught(check)


def altered(model: Any, ending: Any, change: Any) -> bytes:
    """The model with one stored tensor changed in place, in its own type."""
    proto = onnx.load_from_string(model)
    [tensor] = [t for t in proto.graph.initializer if t.name.endswith(ending)]
    values = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(values), values.dtype), tensor.name))
    return proto.SerializeToString()


@pytest.fixture(autouse=True)
def _same_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a model is slower than another is not measured beside other work."""
    monkeypatch.setattr(judge, "images_per_s", lambda models, _: [1000.0] * len(models))


@pytest.fixture(scope="session")
def split(sample: dict[str, np.ndarray]) -> Split:
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))


def trained(config: Any, split: Any) -> Checkpoint:
    nothing = Split(split.images[:0], split.labels[:0])
    trainer = Trainer(config, split, nothing, Console(file=io.StringIO()))
    model = trainer.run()
    model.temperature.fill_(0.8)
    if config.not_digits:
        model = fit_is_digit(model, config, split)
    return Checkpoint(
        model=model,
        config=config,
        metrics={
            "train_seconds": trainer.seconds,
            "temperature": 0.8,
            "selection": "weights of the last epoch",
            "machine": {"device": "cpu"},
        },
        dataset_sha256={"train": split.digest(), "test": split.digest()},
        versions={"torch": str(torch.__version__)},
        source_commit="unknown",
    )


def correct(checkpoint: Any, split: Any) -> Any:
    """Images that the trained model gets right."""
    return evaluate(predict_logits(checkpoint.model, split.images), split.labels)["correct"]


@pytest.fixture(scope="session")
def sets(split: Split) -> Sets:
    return Sets({"mnist": split}, {"mnist": split})


@pytest.fixture(scope="session")
def checkpoint(split: Split) -> Checkpoint:
    return trained(CONFIG, split)


@pytest.fixture(scope="session")
def model(checkpoint: Checkpoint) -> Any:
    return export_model(checkpoint.model, name="digits", labels=LABELS)


@pytest.fixture(scope="session")
def int8_model(model: Any, split: Split) -> Any:
    return quantize_model(model, split.images.numpy())


@pytest.fixture(scope="session")
def references(checkpoint: Checkpoint, split: Split) -> Any:
    return make_references(checkpoint.model, split, split)


@pytest.fixture(scope="session")
def made(checkpoint: Checkpoint, sets: Sets) -> Any:
    """What ``make export`` would write."""
    return make_release(checkpoint, sets, precision="best", reporter=Silent())


@pytest.fixture
def gate(checkpoint: Checkpoint, model: Any, references: Any, split: Split) -> Callable[..., Any]:
    """The fp32 gate, with anything exchanged."""
    answers = predict_logits(checkpoint.model, split.images)

    def run(examined: Any = model, **changed: Any) -> Any:
        arguments = {
            "labels": LABELS,
            "again": examined,
            "references": references,
            "test": split,
            "confusion": evaluate(answers, split.labels)["confusion"],
            "reporter": Silent(),
        }
        return gate_fp32(examined, **(arguments | changed))

    return run


@pytest.fixture
def int8_gate(model: Any, int8_model: Any, references: Any, split: Split) -> Callable[..., Any]:
    """The int8 gate, with anything exchanged."""

    def run(examined: Any = int8_model, **changed: Any) -> Any:
        arguments = {
            "labels": LABELS,
            "again": examined,
            "fp32": model,
            "references": references,
            "validation": split,
            "test": split,
            "reporter": Silent(),
        }
        return gate_int8(examined, **(arguments | changed))

    return run


@pytest.fixture
def repository(made: Any, tmp_path: Path) -> Path:
    """Two releases of the same models, judged fit to serve."""
    path = tmp_path / "digits"
    for _ in range(2):
        publish(path, made, Comparison(""))
    return path


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEM files of a private key, its public key, and another public key."""
    return write_keys(tmp_path_factory.mktemp("keys"))
