"""``python -m export``: checkpoint to verified artifact; on any doubt, nothing is written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from export.artifact import write_artifact
from export.gate import Check, run_gate
from export.golden import choose_golden
from export.graph import export_model
from service.artifact import ArtifactError, sha256
from service.engine import Engine
from training.checkpoint import CheckpointError, load_checkpoint
from training.data import DataError, data_dir, load_split


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """What to export, and where to."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/default/checkpoint.pt"))
    parser.add_argument("--model-repository", type=Path, default=Path("models/digits"))
    parser.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exports, proves, writes. Returns the exit code."""
    arguments = parse_arguments(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        return _export(arguments, console)
    except (CheckpointError, DataError, ArtifactError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1


def _export(arguments: argparse.Namespace, console: Console) -> int:
    checkpoint = load_checkpoint(arguments.checkpoint)
    root = data_dir(arguments.data_dir)
    train_split = load_split(checkpoint.config.dataset, "train", root)
    test_split = load_split(checkpoint.config.dataset, "test", root)
    for name, split in (("train", train_split), ("test", test_split)):
        expected, got = checkpoint.dataset_sha256[name], split.digest()
        if got != expected:
            raise DataError(f"{name} split: the checkpoint was made with {expected}, this is {got}")
    repository: Path = arguments.model_repository
    model = export_model(checkpoint.model, name=repository.name)
    report = run_gate(
        model,
        export_again=lambda: export_model(checkpoint.model, name=repository.name),
        classifier=checkpoint.model,
        split=test_split,
        recorded_correct=checkpoint.metrics["correct"],
        on_check=lambda check: _print_check(console, check),
    )
    if not report.passed:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        print(f"export: gate failed, nothing was written: {failed}", file=sys.stderr)
        return 1
    golden = choose_golden(model, train_split)
    golden.check(Engine(model).run(golden.images))
    folder = write_artifact(repository, model, golden, report, checkpoint)
    console.print(f"wrote {folder}: {len(model):,} bytes, sha256 {sha256(model)}")
    return 0


def _print_check(console: Console, check: Check) -> None:
    verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
    name = check.name.replace("[", "\\[")
    console.print(f"{verdict}  {name}: ", end="")
    console.print(f"{check.figure}  ({check.bound})", markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
