"""Several runs side by side: accuracy against what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import Checkpoint, load_checkpoint
from training.model import parameter_count, trace_layers

BATCH = 64
COLUMNS = ("architecture", "parameters", "MACs", "images/s", "test accuracy", "runs", "training")


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        parameters: Trainable parameters.
        macs: Multiply-accumulates.
        images_per_s: onnxruntime throughput, fp32, one thread, batches of 64.
    """

    parameters: int
    macs: int
    images_per_s: float


def measure_cost(checkpoint: Checkpoint) -> Cost:
    """Counts, and times the exported model on this machine."""
    # Only here does training need the packages of export and service.
    from export.graph import export_model  # noqa: PLC0415
    from service.engine import Engine  # noqa: PLC0415

    image = torch.zeros((1, 28, 28), dtype=torch.uint8)
    layers = trace_layers(checkpoint.model, image)
    engine = Engine(export_model(checkpoint.model, name=checkpoint.config.arch))
    return Cost(
        parameters=parameter_count(checkpoint.model),
        macs=sum(layer.macs for layer in layers),
        images_per_s=1 / engine.warm_up(BATCH),
    )


def compare(runs: list[Path]) -> list[dict[str, Any]]:
    """One row an architecture and recipe: its runs are averaged.

    Args:
        runs: Folders of runs.

    Raises:
        CheckpointError: If one has no readable checkpoint.
    """
    groups: dict[str, list[Checkpoint]] = {}
    for run in runs:
        checkpoint = load_checkpoint(run / "checkpoint.pt")
        groups.setdefault(_group(checkpoint), []).append(checkpoint)
    rows = []
    for name, checkpoints in groups.items():
        cost = measure_cost(checkpoints[0])
        accuracies = torch.tensor([c.metrics["accuracy"] for c in checkpoints]).double()
        rows.append(
            {
                "arch": name,
                **vars(cost),
                "accuracy": float(accuracies.mean()),
                "sd": float(accuracies.std()) if len(accuracies) > 1 else None,
                "runs": len(checkpoints),
                "train_seconds": sum(c.metrics["train_seconds"] for c in checkpoints)
                / len(checkpoints),
            }
        )
    return sorted(rows, key=lambda row: row["accuracy"])


def _group(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    return config.arch if config.augment else f"{config.arch} (classic)"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        cells = (
            row["arch"],
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['images_per_s']:,.0f}",
            f"{100 * row['accuracy']:.2f}{spread} %",
            row["runs"],
            f"{row['train_seconds']:.0f} s",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
