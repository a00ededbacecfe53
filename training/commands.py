"""The commands of ``python -m training``, behind its flags."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from training import runs
from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_classifier,
    load_checkpoint,
    save_checkpoint,
)
from training.config import OWN, TrainingConfig, make_config
from training.data import DataError, Split, data_dir, load_split
from training.evaluate import evaluate as measure
from training.evaluate import (
    evaluate_corruptions,
    evaluate_not_digits,
    fit_temperature,
    predict,
    predict_logits,
)
from training.model import (
    Classifier,
    has_bfloat16,
    parameter_count,
    select_device,
    trace_layers,
)
from training.own import overlap, read_own
from training.scoring import fit_is_digit
from training.sets import Sets, load_sets
from training.start import load_start
from training.train import Trainer

# Of few images of one's own, at most this share is held out; an epoch has so many steps at least.
MAX_VALIDATION_SHARE = 0.2
MIN_STEPS = 8


def train(arguments: argparse.Namespace, console: Console) -> int:
    """Trains, and fits the temperature to validation images."""
    if arguments.config.bfloat16 is None:
        native = has_bfloat16(select_device())
        arguments.config = replace(arguments.config, bfloat16=native)
    sets = load_sets(arguments.config, data_dir(arguments.data_dir), arguments.data)
    for remark in sets.remarks:
        console.print(remark, markup=False)
    config, kept, validation = _split(arguments, sets, console)
    start = None
    if arguments.init is not None:
        start, sha256 = load_start(arguments.init, kept)
        if arguments.arch not in (None, start.arch):
            raise CheckpointError(f"--init: expected {arguments.arch} (--arch), got {start.arch}")
        config = replace(config, start=sha256, arch=start.arch)
    try:
        trainer = Trainer(config, kept, validation, console, start=start)
    except ValueError as error:  # fewer images than a batch
        raise DataError(str(error)) from None
    folder = _folder(arguments, config, trainer)
    commit = source_commit()
    console.print(
        f"training {config.arch} on {len(kept):,} images of {' and '.join(sets.train_parts)} in "
        f"{folder}, "
        f"{len(validation):,} held out"
    )
    try:
        model = trainer.run(folder / runs.STATE)
    except KeyboardInterrupt:
        return _interrupted(folder, console)
    console.print("fitting the temperature, and measuring validation images")
    calibrate(model, validation)
    if config.not_digits:
        console.print("learning to tell what is no digit")
        model = fit_is_digit(model, config, kept)
    metrics = _metrics(model, trainer, validation)
    if config.dataset == OWN:
        metrics["before_and_after"] = _before_and_after(sets, start, model, arguments, console)
    checkpoint = Checkpoint(model, config, metrics, sets.digests(), _versions(), commit)
    save_checkpoint(checkpoint, folder / runs.CHECKPOINT)
    _report(checkpoint, validation, folder, console)
    return 0


def _split(
    arguments: argparse.Namespace, sets: Sets, console: Console
) -> tuple[TrainingConfig, Split, Split]:
    """What is trained on and what is held out, and the settings fitted to how much there is."""
    config: TrainingConfig = arguments.config
    if config.dataset == OWN:
        images = len(sets.train)
        config = replace(
            config,
            validation=min(config.validation, int(images * MAX_VALIDATION_SHARE)),
            batch_size=max(2, min(config.batch_size, images // MIN_STEPS)),
        )
    if arguments.validation_data is None:
        return config, *sets.hold_out(config.validation)
    config = replace(config, validation=0)
    kept, _ = sets.hold_out(0)
    validation = read_own(arguments.validation_data).split
    common = overlap(kept, validation)
    console.print(f"{common} of {len(validation):,} validation images are trained on, too")
    return config, kept, validation


def _folder(arguments: argparse.Namespace, config: TrainingConfig, trainer: Trainer) -> Path:
    """The folder of the run; one that goes on restores the trainer's state."""
    if not arguments.resume:
        return runs.new_run(arguments.run_dir, config.arch)
    folder = runs.resumed_run(arguments.run_dir)
    trainer.resume(folder / runs.STATE)
    return folder


def _interrupted(folder: Path, console: Console) -> int:
    if (folder / runs.STATE).exists():
        console.print(f"interrupted; {folder / runs.STATE} holds the last epoch: --resume goes on")
    else:
        console.print("interrupted in the first epoch: nothing was saved")
    return 130


def calibrate(model: Classifier, validation: Split) -> None:
    """Sets the temperature by held-out images; without any it stays 1."""
    if len(validation):
        temperature = fit_temperature(predict_logits(model, validation.images), validation.labels)
        model.temperature.fill_(temperature)


def _metrics(model: Classifier, trainer: Trainer, validation: Split) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "temperature": float(model.temperature),
        "history": trainer.history,
        "train_seconds": round(trainer.seconds, 1),
        "selection": "weights of the last epoch; no validation images, temperature 1",
        "machine": _machine(),
    }
    if len(validation):
        logits = partial(predict_logits, model)
        metrics["validation"] = measure(logits(validation.images), validation.labels)
        metrics["validation"]["corruptions"] = evaluate_corruptions(logits, validation)
        if model.scored:
            answer = partial(predict, model)
            metrics["validation"]["not_digits"] = evaluate_not_digits(answer, validation)
        images = f"{len(validation):,} validation images"
        metrics["selection"] = f"weights of the last epoch; temperature fitted to {images}"
    return metrics


def _machine() -> dict[str, Any]:
    """What the weights may depend on, beside settings, data and versions."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if "model name" in line]
    return {
        "device": select_device().type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu": names[0] if names else platform.machine(),
    }


def _cpu_lines() -> Iterator[str]:
    try:
        yield from Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return


def _versions() -> dict[str, str]:
    tools = ("torch", "torchvision")
    return {"python": platform.python_version(), **{tool: version(tool) for tool in tools}}


def _report(checkpoint: Checkpoint, validation: Split, folder: Path, console: Console) -> None:
    console.print("drawing the report")
    from training.report import summary, write_report  # noqa: PLC0415 - matplotlib is slow

    write_report(checkpoint, validation, folder)
    for key, value in summary(checkpoint).items():
        console.print(f"{key:>27}  {value}", markup=False)
    console.print(f"{'report':>27}  {folder / 'report.html'}", markup=False)


def _before_and_after(
    sets: Sets,
    start: Classifier | None,
    model: Classifier,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, str]:
    """Accuracy on test images of one's own and of MNIST; nothing is chosen by it."""
    parts = dict(sets.test_parts)
    if "mnist" not in parts:
        try:
            parts["mnist"] = load_split("mnist", "test", data_dir(arguments.data_dir))
        except DataError as error:
            console.print(f"accuracy on MNIST was not measured: {error}", markup=False)
    lines = {}
    for name, part in parts.items():
        before = "random weights" if start is None else _accuracy(start, part)
        lines[f"{len(part):,} {name} test images"] = f"{before} → {_accuracy(model, part)}"
    return lines


def _accuracy(model: Classifier, split: Split) -> str:
    predicted = predict_logits(model, split.images).argmax(dim=1)
    return f"{float((predicted == split.labels).double().mean()):.2%}"


def evaluate(arguments: argparse.Namespace, console: Console) -> int:
    """Measures a run on the test images, which nothing was chosen by."""
    checkpoint = load_checkpoint(arguments.run / runs.CHECKPOINT)
    sets = load_sets(checkpoint.config, data_dir(arguments.data_dir), arguments.data)
    predict = partial(predict_logits, checkpoint.model)
    found = {}
    for name, part in sets.test_parts.items():
        found[name] = measure(predict(part.images), part.labels)
        found[name]["corruptions"] = evaluate_corruptions(predict, part)
        low, high = found[name]["accuracy_ci95"]
        console.print(
            f"{found[name]['accuracy']:.2%} of {len(part):,} {name} test images "
            f"(95 % interval {low:.2%} to {high:.2%})"
        )
        for corruption, accuracy in found[name]["corruptions"].items():
            console.print(f"  {accuracy:.2%} {corruption}")
    path = arguments.run / "test.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written to {path}", markup=False)
    return 0


def describe(arguments: argparse.Namespace, console: Console) -> int:
    """Prints the layers of an architecture."""
    knobs = {"kernel_size": arguments.kernel_size}
    try:
        model = build_classifier(make_config("classic", {"arch": arguments.arch, **knobs}))
    except ValueError as error:  # an architecture without that choice
        raise runs.RunError(str(error)) from None
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


def compare(arguments: argparse.Namespace, console: Console) -> int:
    """Prints, draws and writes down runs side by side."""
    from training import pictures  # noqa: PLC0415 - matplotlib is slow
    from training.compare import compare as side_by_side  # noqa: PLC0415
    from training.compare import markdown, paired  # noqa: PLC0415

    rows, skipped = side_by_side(arguments.runs)
    for reason in skipped:
        console.print(f"skipped {reason}", markup=False)
    if not rows:
        raise runs.RunError("expected at least one finished run with validation images, got none")
    console.print("\n".join([markdown(rows), *paired(rows)]), markup=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot, table = arguments.out / "comparison.png", arguments.out / "comparison.json"
    plot.write_bytes(pictures.comparison(rows))
    vnni = any({"avx_vnni", "avx512_vnni"} & set(line.split()) for line in _cpu_lines())
    machine = _machine() | {"vnni": vnni}
    table.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    console.print(f"written to {table}, drawn in {plot}", markup=False)
    return 0


def explain(arguments: argparse.Namespace, console: Console) -> int:
    """Draws what the first layers do to a digit."""
    from digits.images import PictureError, normalise  # noqa: PLC0415 - Pillow, for this alone
    from training import pictures  # noqa: PLC0415 - matplotlib is slow

    try:
        image = torch.from_numpy(normalise(arguments.image))
    except PictureError as error:
        raise DataError(f"{arguments.image}: {error}") from None
    model = load_checkpoint(arguments.run_dir / runs.CHECKPOINT).model
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        steps = pictures.explanation(model, image)
    except ValueError as error:  # a network without convolutions
        raise runs.RunError(str(error)) from None
    drawn = {"steps": steps, "layers": pictures.feature_maps(model, image)}
    for name, data in drawn.items():
        (arguments.out / f"{name}.png").write_bytes(data)
        console.print(f"drawn in {arguments.out / name}.png", markup=False)
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
