"""Several runs side by side: accuracy against what they cost."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from training.model import parameter_count, trace_layers
from training.runs import CHECKPOINT

BATCH = 64
ROUNDS = 12
COLUMNS = (
    "architecture", "parameters", "MACs", "images/s", "validation accuracy", "runs", "training",
)  # fmt: skip


def measure_throughput(checkpoints: list[Checkpoint]) -> list[float]:
    """Images per second of each, exported, in onnxruntime: fp32, one thread, batches of 64.

    All are timed in turn, several times, and the best counts: a shared machine drifts.
    """
    # Only here does training need the packages of export and service.
    from export.graph import export_model  # noqa: PLC0415
    from service.serving.engine import Engine  # noqa: PLC0415

    engines = [Engine(export_model(c.model, name=c.config.arch, labels=())) for c in checkpoints]
    seconds = [float("inf")] * len(engines)
    for _ in range(ROUNDS):
        for number, engine in enumerate(engines):
            took = engine.warm_up([BATCH])[BATCH] / BATCH
            seconds[number] = min(seconds[number], took)
    return [1 / value for value in seconds]


def compare(runs: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """One row an architecture and recipe, averaged over its runs, the most accurate last.

    Accuracy is that on validation images, which are there to choose by; test images are not.

    Args:
        runs: Folders of runs; others among them, as in ``runs/*``, are skipped.

    Returns:
        The rows, and what was skipped and why.
    """
    groups: dict[str, list[Checkpoint]] = {}
    skipped = []
    for run in dict.fromkeys(path.resolve() for path in runs):
        try:
            checkpoint = load_checkpoint(run / CHECKPOINT)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if "validation" not in checkpoint.metrics:
            skipped.append(f"{run}: it has no validation images")
        else:
            groups.setdefault(_group(checkpoint), []).append(checkpoint)
    rows = []
    throughput = measure_throughput([checkpoints[0] for checkpoints in groups.values()])
    image = torch.zeros((1, 28, 28), dtype=torch.uint8)
    for (name, checkpoints), images_per_s in zip(groups.items(), throughput, strict=True):
        model = checkpoints[0].model
        accuracies = torch.tensor(
            [c.metrics["validation"]["accuracy"] for c in checkpoints]
        ).double()
        rows.append(
            {
                "arch": name,
                "parameters": parameter_count(model),
                "macs": sum(layer.macs for layer in trace_layers(model, image)),
                "images_per_s": images_per_s,
                "accuracy": float(accuracies.mean()),
                "by_seed": {
                    c.config.seed: float(a) for c, a in zip(checkpoints, accuracies, strict=True)
                },
                "sd": float(accuracies.std()) if len(accuracies) > 1 else None,
                "runs": len(checkpoints),
                "train_seconds": sum(c.metrics["train_seconds"] for c in checkpoints)
                / len(checkpoints),
            }
        )
    return sorted(rows, key=lambda row: row["accuracy"]), skipped


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


def paired(rows: list[dict[str, Any]]) -> list[str]:
    """Differences between architectures on the seeds that both have, in points of accuracy.

    The interval is that of a paired t-test: the same seed has the same validation images and the
    same order of training images.
    """
    lines = []
    for worse, better in combinations(rows, 2):
        seeds = sorted(worse["by_seed"].keys() & better["by_seed"].keys())
        if len(seeds) < 2:
            continue
        before, after = ([100 * row["by_seed"][seed] for seed in seeds] for row in (worse, better))
        test = stats.ttest_rel(after, before)
        low, high = test.confidence_interval(0.95)
        lines.append(
            f"{better['arch']} over {worse['arch']}, {len(seeds)} seeds: "
            f"{sum(after) / len(seeds) - sum(before) / len(seeds):+.3f} points, "
            f"95 % interval {low:+.3f} to {high:+.3f}"
        )
    return lines
