"""The checkpoint file: weights and where they came from, loadable with ``weights_only=True``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainingConfig
from training.model import Classifier, Knobs

SCHEMA_VERSION = 4


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or written by another version of this project."""


def build_classifier(config: TrainingConfig) -> Classifier:
    """The untrained classifier of a configuration."""
    knobs = Knobs(config.kernel_size, config.dropout)
    return Classifier(config.arch, knobs, scored=config.not_digits)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its provenance.

    Attributes:
        model: The classifier, in evaluation mode, on the CPU.
        config: How it was trained.
        metrics: On the validation images (``validation``, as of ``training.evaluate.evaluate``),
            ``temperature``, ``history``, ``train_seconds``, ``selection`` and ``machine``.
        dataset_sha256: Digest of each split that was used.
        versions: Library versions that trained it.
        source_commit: Commit of this repository, or ``unknown``; ``-dirty`` when modified.
    """

    model: Classifier
    config: TrainingConfig
    metrics: dict[str, Any]
    dataset_sha256: dict[str, str]
    versions: dict[str, str]
    source_commit: str


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the file atomically: a reader sees the old one or the new one."""
    write_file(
        {
            "schema_version": SCHEMA_VERSION,
            "weights": checkpoint.model.state_dict(),
            "config": checkpoint.config.to_dict(),
            "metrics": checkpoint.metrics,
            "dataset_sha256": checkpoint.dataset_sha256,
            "versions": checkpoint.versions,
            "source_commit": checkpoint.source_commit,
        },
        path,
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without unpickling arbitrary objects.

    Raises:
        CheckpointError: Naming what is wrong with the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run 'make train' first")
    stored = read_file(path)
    found = stored.get("schema_version")
    if found != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema_version: expected {SCHEMA_VERSION}, got {found}")
    try:
        config = TrainingConfig.from_dict(stored["config"])
        model = build_classifier(config)
        model.load_state_dict(stored["weights"])
        return Checkpoint(
            model=model.eval(),
            config=config,
            metrics=stored["metrics"],
            dataset_sha256=stored["dataset_sha256"],
            versions=stored["versions"],
            source_commit=stored["source_commit"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project: {error}") from error


def write_file(content: dict[str, Any], path: Path) -> None:
    """Saves tensors and plain values, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def read_file(path: Path) -> dict[str, Any]:
    """Loads what ``write_file`` saved; a file that would run code is refused.

    Raises:
        CheckpointError: If it is missing, damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on damaged files
        # Not PyTorch's own words, which advise to load it in a way that runs code.
        raise CheckpointError(f"{path}: not a readable checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    return content
