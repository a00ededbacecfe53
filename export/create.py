"""From a checkpoint to a proven release: fp32, int8 beside it if it passes, and who is better."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.artifact import promote, write_release
from export.check import GateError, GateReport, write_reports
from export.gate import Reporter, gate_fp32, gate_int8
from export.golden import choose_golden
from export.graph import export_model
from export.judge import Candidate, Comparison
from export.parity import make_references
from export.quantize import is_quantizable, quantize_model
from export.reference import make_reference
from export.sessions import Images, in_fresh_process, run_session, serving_session
from service.artifact import format as artifact
from service.artifact.golden import GOLDEN, Golden, write_golden
from service.artifact.repository import promoted, releases
from service.serving.engine import Engine
from training import not_digits
from training.checkpoint import Checkpoint
from training.data import DATASETS, DataError, Split
from training.evaluate import (
    Answer,
    evaluate,
    evaluate_corruptions,
    evaluate_not_digits,
    predict,
)
from training.model import parameter_count
from training.sets import Sets

# Of what sets the ranges of int8, beside the training images.
NOT_DIGITS = 0.1
ACCURACY_KEYS = (
    "accuracy", "accuracy_ci95", "correct", "images", "nll", "ece", "class_accuracy", "corruptions",
    "not_digits",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A model that passed its gate.

    Attributes:
        precision: ``fp32`` or ``int8``.
        model: Serialised.
        report: The gate's.
        accuracy: On the test split.
        reference: What drift is measured against.
    """

    precision: str
    model: bytes
    report: GateReport
    accuracy: dict[str, Any]
    reference: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """Everything of a release that is made of a checkpoint.

    Attributes:
        checkpoint: What it was made of.
        variants: Those that passed, fp32 first.
        golden: The golden digits.
        left_out: Why there is no int8; empty if there is.
    """

    checkpoint: Checkpoint
    variants: list[Variant]
    golden: Golden
    left_out: str

    @property
    def candidate(self) -> Candidate:
        """What is compared with the release in service."""
        dataset = DATASETS[self.checkpoint.config.dataset]
        models = {variant.precision: variant.model for variant in self.variants}
        return Candidate(dataset.model_name, "", dataset.labels, _dataset(self.checkpoint), models)


def check_data(checkpoint: Checkpoint, sets: Sets) -> None:
    """Rejects other data than the checkpoint was made with.

    Raises:
        DataError: Naming the split.
    """
    for name, got in sets.digests().items():
        expected = checkpoint.dataset_sha256[name]
        if got != expected:
            raise DataError(f"{name} split: the checkpoint was made with {expected}, this is {got}")


def make_release(checkpoint: Checkpoint, sets: Sets, *, precision: str, reporter: Reporter) -> Made:
    """Exports and examines; unless ``precision`` is fp32, quantises and examines again.

    Args:
        checkpoint: What training wrote.
        sets: Its data. Training images calibrate int8 and are the golden digits; test images are
            what accuracy is measured on.
        precision: ``fp32``; ``int8`` for both, or an error; ``best`` for int8 only if it passes.
        reporter: Gets each check.

    Raises:
        GateError: If a model that was asked for did not pass.
    """
    dataset = DATASETS[checkpoint.config.dataset]
    train, test = sets.train, sets.test
    _, held_out = sets.hold_out(checkpoint.config.validation)
    make_variant = partial(_variant, train=train, held_out=held_out)
    reporter.stage("measuring the trained model on test images")
    metrics = _measured(partial(predict, checkpoint.model), test, checkpoint.model.scored)
    reporter.stage("exporting, here and in a fresh process")
    make = partial(export_model, name=dataset.model_name, labels=dataset.labels)
    model, again = make(checkpoint.model), in_fresh_process(make, checkpoint.model)
    reporter.stage("running the trained model on every probe, in float32 and float64")
    references = make_references(checkpoint.model, train, test)
    report = gate_fp32(
        model, labels=dataset.labels, again=again, references=references, test=test,
        confusion=metrics["confusion"], reporter=reporter,
    )  # fmt: skip
    variants = [make_variant("fp32", model, report, metrics)]
    left_out = "" if precision != "fp32" else "fp32 was asked for"
    if precision == "best" and not is_quantizable(model):
        left_out = "the network has no convolution, which is what int8 makes cheaper"
    if not left_out:
        reporter.stage("quantising, here and in a fresh process")
        images = _calibration_images(checkpoint, train)
        quantized = quantize_model(model, images)
        again = in_fresh_process(quantize_model, model, images)
        report = gate_int8(
            quantized, labels=dataset.labels, again=again, fp32=model, references=references,
            validation=held_out, test=test, reporter=reporter,
        )  # fmt: skip
        if report.passed or precision == "int8":
            reporter.stage("evaluating int8")
            variants.append(make_variant("int8", quantized, report, _exported(quantized, test)))
        else:
            left_out = f"it did not pass its gate: {'; '.join(report.failed)}"
    reporter.stage("choosing golden digits")
    golden = choose_golden({v.precision: v.model for v in variants}, train, dataset.labels)
    for variant in variants:
        golden.check(*Engine(variant.model).answer(golden.images), variant.precision)
    return Made(checkpoint, variants, golden, left_out)


def _calibration_images(checkpoint: Checkpoint, train: Split) -> Images:
    """Training images, and what is no digit where the network was trained with it."""
    images = train.images.numpy()
    if not checkpoint.model.scored:
        return images
    count = round(NOT_DIGITS * len(images))
    others = not_digits.make(count, images, np.random.default_rng(checkpoint.config.seed))
    return np.concatenate([images, others])


def _variant(
    precision: str,
    model: bytes,
    report: GateReport,
    metrics: dict[str, Any],
    *,
    train: Split,
    held_out: Split,
) -> Variant:
    if not report.passed:
        raise GateError(f"{precision}: {'; '.join(report.failed)}")
    accuracy = {key: metrics[key] for key in ACCURACY_KEYS if key in metrics}
    return Variant(precision, model, report, accuracy, make_reference(model, train, held_out))


def _exported(model: bytes, test: Split) -> dict[str, Any]:
    session = serving_session(model)

    def answer(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = run_session(session, images.numpy())
        return torch.from_numpy(outputs.logits), torch.from_numpy(outputs.is_digit)

    return _measured(answer, test, len(session.get_outputs()) == len(artifact.OUTPUTS))


def _measured(answer: Answer, test: Split, scored: bool) -> dict[str, Any]:
    metrics = evaluate(answer(test.images)[0], test.labels)
    metrics["corruptions"] = evaluate_corruptions(lambda images: answer(images)[0], test)
    if scored:
        metrics["not_digits"] = evaluate_not_digits(answer, test)
    return metrics


def publish(
    repository: Path,
    made: Made,
    comparison: Comparison,
    *,
    stage: bool = False,
    signing_key: Path | None = None,
) -> Path:
    """Adds a release to the repository, and lets it serve if it may.

    Args:
        repository: Folder of releases.
        made: From ``make_release``.
        comparison: Whether it may serve.
        stage: The release in service goes on serving in any case.
        signing_key: PEM file of the Ed25519 key that signs it.

    Returns:
        The new release's folder.
    """
    present = releases(repository) if repository.is_dir() else []
    if stage and present and promoted(repository) is None:
        promote(repository, int(present[0].name))
    folder = write_release(
        repository,
        {artifact.model_file(v.precision): v.model for v in made.variants},
        {
            GOLDEN: write_golden(made.golden),
            artifact.PARITY: write_reports({v.precision: v.report for v in made.variants}),
        },
        _manifest(made, comparison),
        signing_key,
    )
    if comparison.publish and not stage:
        promote(repository, None)
    return folder


def _dataset(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    name = f"{config.dataset} and {config.mix}" if config.mix else config.dataset
    return {"name": name, "sha256": checkpoint.dataset_sha256}


def _manifest(made: Made, comparison: Comparison) -> dict[str, Any]:
    checkpoint, metrics = made.checkpoint, made.checkpoint.metrics
    tools = ("onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "schema_version": artifact.SCHEMA_VERSION,
        "name": made.candidate.name,
        "version": 0,
        "variants": {variant.precision: _described(variant) for variant in made.variants},
        "files": {},
        "labels": list(made.candidate.labels),
        "input": artifact.INPUT,
        "opset": artifact.OPSET,
        "training": {
            "architecture": checkpoint.config.arch,
            "parameters": parameter_count(checkpoint.model),
            "temperature": metrics["temperature"],
            "config": checkpoint.config.to_dict(),
            "seconds": metrics["train_seconds"],
            "selection": metrics["selection"],
            "machine": metrics["machine"],
        },
        "dataset": made.candidate.dataset,
        "comparison": comparison.to_manifest(),
        "tools": {
            "python": platform.python_version(),
            **checkpoint.versions,
            **{tool: version(tool) for tool in tools},
        },
        "source_commit": checkpoint.source_commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _described(variant: Variant) -> dict[str, Any]:
    return {
        "sha256": variant.report.model_sha256,
        "bytes": len(variant.model),
        "accuracy": variant.accuracy,
        "parity": {f"{c.group}: {c.name}": c.figure for c in variant.report.checks},
        "reference": variant.reference,
    }
