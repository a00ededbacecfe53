"""``python -m training``: train a classifier, or look at architectures, runs and digits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import (
    RECIPES,
    TrainingConfig,
    make_config,
    options,
)
from training.runs import LATEST, RunError

if TYPE_CHECKING:
    from rich.console import Console

# Threads wait for each other at every layer, and PyTorch's spin while they do: one that has to
# share its CPU stops all. Two alone on their machine are 1.3 times as fast as one.
THREADS = 1
# Known errors: told in one line. Everything else is a bug and shows its traceback.
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of ``TrainingConfig``; one that is not given leaves the recipe's."""
    parser.add_argument(
        "--recipe", choices=sorted(RECIPES), default="default",
        help="settings to begin with (default %(default)s)",
    )  # fmt: skip
    for field in options():
        choices = field.metadata["choices"]
        if choices is not None:  # "own" is what --data says
            choices = [choice for choice in choices if choice not in ("", "own")]
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']} (default recipe: {field.default or 'none'})"
        if field.default is None or isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=text)
        else:
            kind = type(field.default)
            parser.add_argument(flag, type=kind, choices=choices, help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and report (the default command)")
    train.add_argument(
        "--data", type=Path, metavar="PATH",
        help="images of your own: a folder with folders 0 to 9 of image files, idx files, .npz or "
        ".csv; see docs/own-digits.md",
    )  # fmt: skip
    train.add_argument(
        "--validation-data", type=Path, metavar="PATH",
        help="validation images, as for --data, in place of some that are held out",
    )  # fmt: skip
    train.add_argument(
        "--init", type=Path, metavar="PATH",
        help="weights to go on from: a checkpoint, or a release such as models/digits/1",
    )  # fmt: skip
    train.add_argument(
        "--run-dir", type=Path, help="folder of the run (default runs/<date>-<time>-<arch>)"
    )
    train.add_argument(
        "--resume", action="store_true",
        help=f"go on where the run in --run-dir (default {LATEST}) was interrupted",
    )  # fmt: skip
    train.add_argument(
        "--threads", type=int, metavar="N",
        help=f"CPU threads of PyTorch (default $OMP_NUM_THREADS, else {THREADS}: with more, an "
        "epoch takes many times as long as soon as other work needs a CPU)",
    )  # fmt: skip
    _add_config_flags(train)
    evaluate = commands.add_parser("evaluate", help="accuracy of a run on the test images")
    evaluate.add_argument("run", nargs="?", type=Path, default=LATEST, help="default %(default)s")
    evaluate.add_argument("--data", type=Path, help="images of your own that it was trained on")
    for command in (train, evaluate):
        command.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    describe = commands.add_parser("describe", help="print the layers of an architecture")
    describe.add_argument("--arch", default=TrainingConfig.arch, help="as of train")
    describe.add_argument("--kernel-size", type=int, choices=(3, 5), default=3)
    describe.add_argument("--batch", type=int, default=64, help="images in the batch")
    compare = commands.add_parser("compare", help="validation accuracy against cost of runs")
    compare.add_argument("runs", nargs="+", type=Path)
    compare.add_argument(
        "--out", type=Path, default=Path("runs"),
        help="folder of comparison.json and comparison.png (default %(default)s)",
    )  # fmt: skip
    explain = commands.add_parser("explain", help="draw what the first layers do to a digit")
    explain.add_argument("image", type=Path, help="an image file of a digit")
    explain.add_argument("--run-dir", type=Path, default=LATEST, help="default %(default)s")
    explain.add_argument("--out", type=Path, default=Path("runs/explanation"))
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        argv = ["train", *argv]
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "train":
            arguments.config = _config(arguments)
    except ValueError as error:
        parser.error(str(error))
    # Read by PyTorch as it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    if getattr(arguments, "threads", None) is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from rich.console import Console  # noqa: PLC0415 - a wrong flag is told before anything loads

    console = Console(soft_wrap=True, highlight=False)
    if arguments.command != "explain":
        console.print("loading PyTorch")
    from training import commands  # noqa: PLC0415 - PyTorch
    from training.checkpoint import CheckpointError  # noqa: PLC0415
    from training.data import DataError  # noqa: PLC0415

    try:
        return _run(arguments, console, commands)
    except (CheckpointError, DataError, RunError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return FAILED


def _run(arguments: argparse.Namespace, console: Console, commands: Any) -> int:
    function = getattr(commands, arguments.command)
    code: int = function(arguments, console)
    return code


def _config(arguments: argparse.Namespace) -> TrainingConfig:
    """The settings that were asked for.

    Raises:
        ValueError: If one is out of bounds, or some do not go together.
    """
    names = [field.name for field in options()]
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    if arguments.data is not None and "dataset" in given:
        raise ValueError("--data: expected no --dataset beside it; --mix adds one")
    if arguments.data is None and given.get("mix"):
        raise ValueError("--mix: expected --data beside it, got none")
    if arguments.data is not None:
        given["dataset"] = "own"
    return make_config(arguments.recipe, given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
