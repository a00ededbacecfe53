"""A small network trained for a moment on the committed digits, exported, quantised, and gated."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from rich.console import Console

from export.create import make_variants, write_variants
from export.gate import gate_fp32, gate_int8
from export.graph import export_model
from export.parity import make_references
from export.quantize import quantize_model
from training.checkpoint import Checkpoint
from training.config import TrainingConfig
from training.data import Split
from training.evaluate import evaluate, evaluate_corruptions, predict_logits
from training.train import Trainer

CONFIG = TrainingConfig(epochs=12, batch_size=50, ema_decay=0.9, validation=0)


class Silent:
    """A reporter that shows nothing."""

    def stage(self, text):
        pass

    def check(self, check):
        pass


class Caught(Exception):  # noqa: N818 - it is no error
    """The gate found something."""

    def __init__(self, check):
        super().__init__(f"{check.group}: {check.name}: {check.figure}, {check.bound}")
        self.check = check


class UntilCaught(Silent):
    """A reporter that ends the gate at the first failed check."""

    def check(self, check):
        if not check.passed:
            raise Caught(check)


@pytest.fixture(scope="session")
def split(sample):
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))


def trained(config, split):
    nothing = Split(split.images[:0], split.labels[:0])
    trainer = Trainer(config, split, nothing, Console(file=io.StringIO()))
    model = trainer.run()
    model.temperature.fill_(0.8)
    predict = partial(predict_logits, model)
    return Checkpoint(
        model=model,
        config=config,
        metrics={
            **evaluate(predict(split.images), split.labels),
            "train_seconds": trainer.seconds,
            "temperature": 0.8,
            "corruptions": evaluate_corruptions(predict, split),
        },
        dataset_sha256={"train": split.digest(), "test": split.digest()},
        versions={"torch": str(torch.__version__)},
        source_commit="unknown",
    )


@pytest.fixture(scope="session")
def checkpoint(split):
    return trained(CONFIG, split)


@pytest.fixture(scope="session")
def model(checkpoint):
    return export_model(checkpoint.model, name="digits")


@pytest.fixture(scope="session")
def int8_model(model, split):
    return quantize_model(model, split.images.numpy())


@pytest.fixture(scope="session")
def references(checkpoint, split):
    return make_references(checkpoint.model, split, split)


@pytest.fixture(scope="session")
def variants(checkpoint, split):
    """What ``make export`` would write."""
    return make_variants(
        checkpoint, split, split, name="digits", precision="best", reporter=Silent()
    )


@pytest.fixture
def gate(checkpoint, model, references, split):
    """The fp32 gate, with anything exchanged."""

    def run(examined=model, **changed):
        arguments = {
            "again": examined,
            "references": references,
            "test": split,
            "confusion": checkpoint.metrics["confusion"],
            "reporter": Silent(),
        }
        return gate_fp32(examined, **(arguments | changed))

    return run


@pytest.fixture
def int8_gate(model, int8_model, references, split):
    """The int8 gate, with anything exchanged."""

    def run(examined=int8_model, **changed):
        arguments = {
            "again": examined,
            "fp32": model,
            "references": references,
            "test": split,
            "reporter": Silent(),
        }
        return gate_int8(examined, **(arguments | changed))

    return run


@pytest.fixture
def repository(variants, checkpoint, tmp_path):
    """fp32 as version 1 and int8 as version 2."""
    path = tmp_path / "digits"
    write_variants(path, variants, checkpoint, on_written=lambda *_: None)
    return path


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """PEM files of a private key, its public key, and another public key."""
    folder = tmp_path_factory.mktemp("keys")
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "private.pem").write_bytes(pem)
    for name, key in (("public", private), ("other", other)):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(pem)
    return folder
