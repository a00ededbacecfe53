"""``python -m training``: train a classifier, or look at architectures, runs and digits."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_classifier,
    load_checkpoint,
    save_checkpoint,
)
from training.config import RECIPES, TrainingConfig, make_config
from training.data import DATASETS, DataError, Split, data_dir, hold_out, load_split
from training.evaluate import evaluate, evaluate_corruptions, fit_temperature, predict_logits
from training.model import ARCHITECTURES, Classifier, parameter_count, trace_layers
from training.teachers import load_teachers
from training.train import Trainer

DEFAULT_RUN = Path("runs/default")
STATE = "state.pt"
CHOICES = {"arch": sorted(ARCHITECTURES), "dataset": sorted(DATASETS)}


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of ``TrainingConfig``; one that is not given leaves the recipe's."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="default")
    defaults = TrainingConfig()
    for field in fields(TrainingConfig):
        if field.name == "teachers":  # given as files
            continue
        default = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        text = f"default recipe: {default}"
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=text)
        else:
            choices = CHOICES.get(field.name)
            parser.add_argument(flag, type=type(default), choices=choices, help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and report (the default command)")
    _add_config_flags(train)
    train.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    train.add_argument("--run-dir", type=Path, default=DEFAULT_RUN, help=f"default {DEFAULT_RUN}")
    train.add_argument(
        "--teacher", type=Path, action="append", default=[], metavar="CHECKPOINT",
        help="learn its answers in place of the labels; given several times, their mean",
    )  # fmt: skip
    train.add_argument("--resume", action="store_true", help="go on where a run was interrupted")
    describe = commands.add_parser("describe", help="print the layers of an architecture")
    describe.add_argument("--arch", choices=sorted(ARCHITECTURES), default=TrainingConfig.arch)
    describe.add_argument("--kernel-size", type=int, default=3)
    describe.add_argument("--batch", type=int, default=64, help="images in the batch")
    compare = commands.add_parser("compare", help="accuracy against cost of several runs")
    compare.add_argument("runs", nargs="+", type=Path)
    compare.add_argument("--plot", type=Path, default=Path("runs/comparison.png"))
    explain = commands.add_parser("explain", help="draw what the first layers do to a digit")
    explain.add_argument("image", type=Path, help="an image file of a digit")
    explain.add_argument("--run-dir", type=Path, default=DEFAULT_RUN)
    explain.add_argument("--out", type=Path, default=Path("runs/explanation"))
    return parser


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        argv = ["train", *argv]
    arguments = _parser().parse_args(argv)
    commands = {"train": _train, "describe": _describe, "compare": _compare, "explain": _explain}
    try:
        return commands[arguments.command](arguments, Console(soft_wrap=True, highlight=False))
    except (CheckpointError, DataError, ValueError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1


def _train(arguments: argparse.Namespace, console: Console) -> int:
    """Trains, calibrates on validation images, and looks at the test split once, at the end."""
    config, teachers = _config(arguments)
    run_dir: Path = arguments.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    root = data_dir(arguments.data_dir)
    full = load_split(config.dataset, "train", root)
    test = load_split(config.dataset, "test", root)
    train, validation = hold_out(full, config.validation, config.seed)
    trainer = Trainer(config, train, validation, console, teachers)
    if arguments.resume:
        trainer.resume(run_dir / STATE)
    commit = source_commit()
    console.print(f"training {config.arch} on {len(train):,} {config.dataset} images")
    try:
        model = trainer.run(run_dir / STATE)
    except KeyboardInterrupt:
        console.print(f"interrupted; {run_dir / STATE} holds the last epoch: --resume goes on")
        return 130
    calibrate(model, validation)
    checkpoint = Checkpoint(
        model=model,
        config=config,
        metrics=_metrics(model, trainer, validation, test),
        dataset_sha256={"train": full.digest(), "test": test.digest()},
        versions={
            "python": platform.python_version(),
            "torch": version("torch"),
            "torchvision": version("torchvision"),
        },
        source_commit=commit,
    )
    save_checkpoint(checkpoint, run_dir / "checkpoint.pt")
    _report(checkpoint, test, run_dir, console)
    return 0


def _config(arguments: argparse.Namespace) -> tuple[TrainingConfig, list[Checkpoint]]:
    """The settings that were asked for, and the teachers."""
    names = [field.name for field in fields(TrainingConfig) if hasattr(arguments, field.name)]
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    config = make_config(arguments.recipe, given)
    teachers, digests = load_teachers(arguments.teacher, config.dataset)
    return replace(config, teachers=digests), teachers


def calibrate(model: Classifier, validation: Split) -> None:
    """Sets the temperature by held-out images; without any it stays 1."""
    if len(validation):
        temperature = fit_temperature(predict_logits(model, validation.images), validation.labels)
        model.temperature.fill_(temperature)


def _metrics(model: Classifier, trainer: Trainer, validation: Split, test: Split) -> dict[str, Any]:
    predict = partial(predict_logits, model)
    metrics = evaluate(predict(test.images), test.labels)
    metrics["corruptions"] = evaluate_corruptions(predict, test)
    metrics["temperature"] = float(model.temperature)
    metrics["history"] = trainer.history
    metrics["train_seconds"] = round(trainer.seconds, 1)
    if len(validation):
        held = evaluate(predict(validation.images), validation.labels)
        metrics["validation"] = {key: held[key] for key in ("images", "correct", "accuracy", "nll")}
    return metrics


def _report(checkpoint: Checkpoint, test: Split, run_dir: Path, console: Console) -> None:
    from training.report import summary, write_report  # noqa: PLC0415 - matplotlib is slow

    write_report(checkpoint, test, run_dir)
    for key, value in summary(checkpoint).items():
        console.print(f"{key:>27}  {value}")
    console.print(f"{'report':>27}  {run_dir / 'report.html'}")


def _describe(arguments: argparse.Namespace, console: Console) -> int:
    knobs = {"kernel_size": arguments.kernel_size}
    model = build_classifier(make_config("default", {"arch": arguments.arch, **knobs}))
    images = torch.zeros((arguments.batch, 28, 28), dtype=torch.uint8)
    table = Table("layer", "shape after it", "parameters", "MACs per image", title=arguments.arch)
    table.add_row("input", str((arguments.batch, 1, 28, 28)), "", "")
    layers = trace_layers(model, images)
    for layer in layers:
        table.add_row(layer.name, str(layer.shape), f"{layer.parameters:,}", f"{layer.macs:,}")
    total = sum(layer.macs for layer in layers)
    table.add_row("total", "", f"{parameter_count(model):,}", f"{total:,}", style="bold")
    console.print(table)
    return 0


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    from training import pictures  # noqa: PLC0415 - matplotlib is slow
    from training.compare import compare, markdown  # noqa: PLC0415

    rows = compare(arguments.runs)
    console.print(markdown(rows), markup=False)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    arguments.plot.write_bytes(pictures.comparison(rows))
    console.print(f"drawn in {arguments.plot}")
    return 0


def _explain(arguments: argparse.Namespace, console: Console) -> int:
    from digits.images import normalise  # noqa: PLC0415 - Pillow, for this command alone
    from training import pictures  # noqa: PLC0415 - matplotlib is slow

    image = torch.from_numpy(normalise(arguments.image))
    model = load_checkpoint(arguments.run_dir / "checkpoint.pt").model
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = {
        "steps": pictures.explanation(model, image),
        "layers": pictures.feature_maps(model, image),
    }
    for name, data in drawn.items():
        (arguments.out / f"{name}.png").write_bytes(data)
        console.print(f"drawn in {arguments.out / name}.png")
    return 0


def source_commit() -> str:
    """The commit this code is at, ``-dirty`` when tracked files differ, ``unknown`` without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(  # noqa: S603 - a fixed command
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
