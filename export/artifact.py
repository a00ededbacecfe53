"""Writes a model version: complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.gate import GateReport
from service import artifact
from service.artifact import Golden, write_golden
from training.checkpoint import Checkpoint
from training.model import parameter_count

ACCURACY_KEYS = (
    "accuracy", "accuracy_ci95", "correct", "images", "nll", "ece", "class_accuracy", "corruptions",
)  # fmt: skip


def next_version(repository: Path) -> int:
    """One more than the highest version there is."""
    taken = [int(p.name) for p in repository.glob("*") if p.name.isdecimal()]
    return max(taken, default=0) + 1


def write_artifact(
    repository: Path, model: bytes, golden: Golden, report: GateReport, checkpoint: Checkpoint
) -> Path:
    """Adds a version to the repository.

    The files are written to a hidden folder beside it, synced, and renamed in one step, so a
    reader, or a crash at any moment, sees the whole version or none of it.

    Returns:
        The new version's folder.

    Raises:
        ValueError: If the gate did not pass.
    """
    if not report.passed:
        raise ValueError("the gate did not pass; nothing may be written")
    repository.mkdir(parents=True, exist_ok=True)
    number = next_version(repository)
    contents = {
        artifact.MODEL: model,
        artifact.GOLDEN: write_golden(golden),
        artifact.PARITY: _json(report.to_dict()),
    }
    manifest = _manifest(repository.name, number, contents, report, checkpoint)
    contents[artifact.MANIFEST] = _json(manifest)
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        for name, data in contents.items():
            _write_synced(temporary / name, data)
        temporary.chmod(0o755)  # mkdtemp makes it private; a server may run as another user
        _sync_folder(temporary)
        folder = repository / str(number)
        temporary.rename(folder)
        _sync_folder(repository)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _manifest(
    name: str,
    number: int,
    contents: dict[str, bytes],
    report: GateReport,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    metrics = checkpoint.metrics
    return {
        "schema_version": artifact.SCHEMA_VERSION,
        "name": name,
        "version": number,
        "precision": "fp32",
        "files": {name: artifact.sha256(data) for name, data in contents.items()},
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
        "accuracy": {key: metrics[key] for key in ACCURACY_KEYS},
        "parity": {check.name: check.figure for check in report.checks},
        "tools": {
            **checkpoint.versions,
            **{tool: version(tool) for tool in ("onnx", "onnxscript", "onnxruntime")},
        },
        "source_commit": checkpoint.source_commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
