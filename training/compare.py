"""Several runs side by side: accuracy against what they cost."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from training.corruptions import HELD_OUT
from training.model import parameter_count, trace_layers
from training.runs import CHECKPOINT

BATCHES = (1, 8, 16, 64)
ROUNDS = 12


def measure_cost(checkpoints: list[Checkpoint]) -> list[dict[str, float]]:
    """Microseconds an image of each takes by the size of its batch, exported, on one thread.

    In int8, or in fp32 if there is no convolution. All are timed in turn, several times, and the
    best counts: a shared machine drifts.
    """
    # Only here does training need the packages of export and service.
    from export.graph import export_model  # noqa: PLC0415
    from export.quantize import is_quantizable, quantize_model  # noqa: PLC0415
    from service.serving.engine import Engine  # noqa: PLC0415

    noise = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    engines = []
    for checkpoint in checkpoints:
        model = export_model(checkpoint.model, name=checkpoint.config.arch, labels=())
        # What it is calibrated with does not change how long it takes.
        engines.append(Engine(quantize_model(model, noise) if is_quantizable(model) else model))
    seconds: list[dict[int, float]] = [dict.fromkeys(BATCHES, float("inf")) for _ in engines]
    for _ in range(ROUNDS):
        for best, engine in zip(seconds, engines, strict=True):
            for batch, took in engine.warm_up(BATCHES).items():
                best[batch] = min(best[batch], took / batch)
    return [{str(batch): 1e6 * took for batch, took in best.items()} for best in seconds]


def compare(runs: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """One row an architecture and recipe, averaged over its runs, the most accurate last.

    Accuracy is that on validation images, which are there to choose by; test images are not.

    Args:
        runs: Folders of runs; others among them, as in ``runs/*``, are skipped.

    Returns:
        The rows, of plain values, and what was skipped and why.
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
    costs = measure_cost([checkpoints[0] for checkpoints in groups.values()])
    image = torch.zeros((1, 28, 28), dtype=torch.uint8)
    for (name, checkpoints), cost in zip(groups.items(), costs, strict=True):
        model = checkpoints[0].model
        measured = [c.metrics["validation"] for c in checkpoints]
        accuracies = torch.tensor([each["accuracy"] for each in measured]).double()
        robust = [each["corruptions"][kind] for each in measured for kind in HELD_OUT]
        rows.append(
            {
                "arch": name,
                "parameters": parameter_count(model),
                "macs": sum(layer.macs for layer in trace_layers(model, image)),
                "cost": cost,
                "epochs": checkpoints[0].config.epochs,
                "robust": sum(robust) / len(robust),
                "accuracy": float(accuracies.mean()),
                "by_seed": {
                    c.config.seed: float(a) for c, a in zip(checkpoints, accuracies, strict=True)
                },
                "sd": float(accuracies.std()) if len(accuracies) > 1 else None,
                "runs": len(checkpoints),
            }
        )
    return sorted(rows, key=lambda row: row["accuracy"]), skipped


def _group(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    return config.arch if config.augment else f"{config.arch} (classic)"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    names = ["architecture", "parameters", "MACs", *(f"µs in {batch}" for batch in BATCHES)]
    names += ["validation accuracy", "corrupted", "runs"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        cells = [row["arch"], f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f} M"]
        cells += [f"{cost:.1f}" for cost in row["cost"].values()]
        cells += [f"{100 * row['accuracy']:.2f}{spread} %", f"{100 * row['robust']:.1f} %"]
        lines.append("| " + " | ".join([*cells, f"{row['runs']} of {row['epochs']} epochs"]) + " |")
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
