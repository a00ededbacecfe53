"""From a checkpoint to proven versions: fp32, and int8 on top of it where that passes its gate."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.artifact import promote, write_version
from export.check import GateReport
from export.gate import Reporter, gate_fp32, gate_int8
from export.golden import choose_golden
from export.graph import export_model
from export.parity import make_references
from export.quantize import is_quantizable, quantize_model
from export.reference import make_reference
from export.sessions import in_fresh_process, run_session, serving_session
from service.artifact import format as artifact
from service.artifact.format import Golden, write_golden
from service.artifact.repository import promoted, versions
from service.serving.engine import Engine
from training.checkpoint import Checkpoint
from training.data import DataError, Split
from training.evaluate import evaluate, evaluate_corruptions
from training.model import parameter_count

ACCURACY_KEYS = (
    "accuracy", "accuracy_ci95", "correct", "images", "nll", "ece", "class_accuracy", "corruptions",
)  # fmt: skip


class GateError(RuntimeError):
    """A model did not pass; the message names the checks that failed."""


@dataclass(frozen=True)
class Variant:
    """A model that passed its gate.

    Attributes:
        precision: ``fp32`` or ``int8``.
        model: Serialised.
        report: The gate's.
        golden: Digits with the answers of this variant.
        accuracy: On the test split.
        reference: What drift is measured against.
    """

    precision: str
    model: bytes
    report: GateReport
    golden: Golden
    accuracy: dict[str, Any]
    reference: dict[str, Any]


def check_data(checkpoint: Checkpoint, train: Split, test: Split) -> None:
    """Refuses other data than the checkpoint was made with.

    Raises:
        DataError: Naming the split.
    """
    for name, split in (("train", train), ("test", test)):
        expected, got = checkpoint.dataset_sha256[name], split.digest()
        if got != expected:
            raise DataError(f"{name} split: the checkpoint was made with {expected}, this is {got}")


def make_variants(
    checkpoint: Checkpoint,
    train: Split,
    test: Split,
    *,
    name: str,
    precision: str,
    reporter: Reporter,
) -> list[Variant]:
    """Exports, examines and, unless ``precision`` is fp32, quantises and examines again.

    Args:
        checkpoint: What training wrote.
        train: The training split; calibrates int8 and gives the golden digits.
        test: The test split.
        name: Name of the model.
        precision: ``fp32``; ``int8`` for both, or an error; ``best`` for int8 only if it passes.
        reporter: Is told of each check.

    Returns:
        The variants that passed, the one that should serve last.

    Raises:
        GateError: If a model that was asked for did not pass.
    """
    reporter.stage("exporting, here and in a fresh process")
    make = partial(export_model, name=name)
    model, again = make(checkpoint.model), in_fresh_process(make, checkpoint.model)
    reporter.stage("running the trained model on every probe, in float32 and float64")
    references = make_references(checkpoint.model, train, test)
    report = gate_fp32(
        model,
        again=again,
        references=references,
        test=test,
        confusion=checkpoint.metrics["confusion"],
        reporter=reporter,
    )
    make_variant = partial(_variant, train=train, config=checkpoint.config.to_dict())
    variants = [make_variant("fp32", model, report, checkpoint.metrics)]
    if precision == "fp32" or (precision == "best" and not is_quantizable(model)):
        return variants
    reporter.stage("quantising, here and in a fresh process")
    images = train.images.numpy()
    quantized, again = (
        quantize_model(model, images),
        in_fresh_process(quantize_model, model, images),
    )
    report = gate_int8(
        quantized,
        again=again,
        fp32=model,
        references=references,
        test=test,
        reporter=reporter,
    )
    if report.passed or precision == "int8":
        reporter.stage("evaluating int8")
        variants.append(make_variant("int8", quantized, report, _judged(quantized, test)))
    return variants


def _variant(
    precision: str,
    model: bytes,
    report: GateReport,
    metrics: dict[str, Any],
    *,
    train: Split,
    config: dict[str, Any],
) -> Variant:
    if not report.passed:
        raise GateError(f"{precision}: {'; '.join(report.failed)}")
    golden = choose_golden(model, train)
    golden.check(Engine(model).run(golden.images), precision)
    accuracy = {key: metrics[key] for key in ACCURACY_KEYS}
    reference = make_reference(model, train, config)
    return Variant(precision, model, report, golden, accuracy, reference)


def _judged(model: bytes, test: Split) -> dict[str, Any]:
    session = serving_session(model)

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(run_session(session, images.numpy()).logits)

    metrics = evaluate(predict(test.images), test.labels)
    return metrics | {"corruptions": evaluate_corruptions(predict, test)}


def write_variants(
    repository: Path,
    variants: list[Variant],
    checkpoint: Checkpoint,
    *,
    stage: bool = False,
    signing_key: Path | None = None,
    on_written: Callable[[Path, Variant], None],
) -> None:
    """Adds each variant as a version, the last of which serves.

    Args:
        repository: Folder of versions.
        variants: From ``make_variants``.
        checkpoint: What they were made from.
        stage: Whether the version that serves now goes on serving until another is promoted.
        signing_key: PEM file of the Ed25519 key that signs them.
        on_written: Called with each new folder.
    """
    if stage and repository.is_dir() and versions(repository) and promoted(repository) is None:
        promote(repository, int(versions(repository)[0].name))
    for variant in variants:
        files = {
            artifact.MODEL: variant.model,
            artifact.GOLDEN: write_golden(variant.golden),
            artifact.PARITY: variant.report.to_json().encode(),
        }
        manifest = _manifest(repository.name, variant, checkpoint)
        on_written(write_version(repository, files, manifest, signing_key), variant)
    if not stage:
        promote(repository, None)


def _manifest(name: str, variant: Variant, checkpoint: Checkpoint) -> dict[str, Any]:
    metrics = checkpoint.metrics
    tools = ("onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "schema_version": artifact.SCHEMA_VERSION,
        "name": name,
        "version": 0,
        "precision": variant.precision,
        "files": {},
        "labels": artifact.LABELS,
        "input": artifact.INPUT,
        "opset": artifact.OPSET,
        "training": {
            "architecture": checkpoint.config.arch,
            "parameters": parameter_count(checkpoint.model),
            "temperature": metrics["temperature"],
            "config": checkpoint.config.to_dict(),
            "seconds": metrics["train_seconds"],
            "selection": "last epoch; nothing was chosen on the test set",
        },
        "dataset": {"name": checkpoint.config.dataset, "sha256": checkpoint.dataset_sha256},
        "accuracy": variant.accuracy,
        "reference": variant.reference,
        "parity": {f"{c.group}: {c.name}": c.figure for c in variant.report.checks},
        "tools": {
            "python": platform.python_version(),
            **checkpoint.versions,
            **{tool: version(tool) for tool in tools},
        },
        "source_commit": checkpoint.source_commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
