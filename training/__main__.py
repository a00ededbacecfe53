"""``python -m training``: trains a classifier and writes ``runs/<name>/checkpoint.pt``."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from training.checkpoint import Checkpoint, save_checkpoint
from training.config import TrainingConfig
from training.data import DataError, data_dir, load_split
from training.evaluate import evaluate
from training.model import ARCHITECTURES, parameter_count
from training.train import train

DEFAULT_RUN = Path("runs/default")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags are the fields of ``TrainingConfig``, plus where data comes from and results go."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    defaults = TrainingConfig()
    for field in fields(TrainingConfig):
        default = getattr(defaults, field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default),
            default=default,
            choices=sorted(ARCHITECTURES) if field.name == "arch" else None,
            help=f"default {default}",
        )
    parser.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN, help=f"default {DEFAULT_RUN}")
    return parser.parse_args(argv)


def source_commit() -> str:
    """The commit this code is at, ``-dirty`` when tracked files differ, ``unknown`` without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(  # noqa: S603 - a fixed command
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: list[str]) -> int:
    """Trains, evaluates on the test split once, at the end, and saves. Returns the exit code."""
    arguments = parse_arguments(argv)
    config = TrainingConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainingConfig)})
    console = Console(soft_wrap=True)
    root = data_dir(arguments.data_dir)
    try:
        train_split = load_split(config.dataset, "train", root)
        test_split = load_split(config.dataset, "test", root)
        commit = source_commit()
        console.print(f"training {config.arch} on {len(train_split):,} {config.dataset} images")
        model, seconds = train(config, train_split, console)
    except (DataError, ValueError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    metrics = evaluate(model, test_split)
    metrics["train_seconds"] = round(seconds, 1)
    checkpoint = Checkpoint(
        model=model,
        config=config,
        metrics=metrics,
        dataset_sha256={"train": train_split.digest(), "test": test_split.digest()},
        versions={
            "python": platform.python_version(),
            "torch": version("torch"),
            "torchvision": version("torchvision"),
        },
        source_commit=commit,
    )
    save_checkpoint(checkpoint, arguments.run_dir / "checkpoint.pt")
    (arguments.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    low, high = metrics["accuracy_ci95"]
    console.print(
        f"test accuracy {metrics['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"{parameter_count(model):,} parameters, {seconds:.0f} s, "
        f"last epoch, saved to {arguments.run_dir / 'checkpoint.pt'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
