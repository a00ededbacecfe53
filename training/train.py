"""The training loop: one path for every architecture and device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.config import TrainingConfig
from training.data import Split, augment
from training.model import Classifier, select_device


@dataclass
class _Running:
    """Loss and accuracy over the images seen so far in an epoch."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += float(loss.detach()) * len(labels)
        self.correct += int((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels)

    def __str__(self) -> str:
        images = max(1, self.images)
        return f"loss {self.loss / images:.4f}  accuracy {self.correct / images:7.3%}"


def _batches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of one shuffled epoch; a short last one, bad for batch norm, is left out."""
    order = torch.randperm(len(split), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def train(config: TrainingConfig, split: Split, console: Console) -> tuple[Classifier, float]:
    """Trains a classifier; the same config, data, machine and thread count give the same weights.

    Args:
        config: The recipe.
        split: Training images and labels.
        console: Where progress goes: a live bar on a terminal, a line per epoch anywhere.

    Returns:
        The averaged-weights classifier on the CPU in evaluation mode, and the seconds it took.

    Raises:
        ValueError: If the split is smaller than one batch.
    """
    if len(split) < config.batch_size:
        raise ValueError(f"batch_size: expected at most {len(split)}, got {config.batch_size}")
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    device = select_device()
    # channels_last is 1.4 times as fast as the default layout on the CPU.
    model = Classifier(config.arch).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.max_lr, weight_decay=config.weight_decay
    )
    steps = len(split) // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.max_lr, epochs=config.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    started = time.monotonic()
    with _progress(console) as progress:
        task = progress.add_task("training", total=config.epochs * steps, detail="")
        for epoch in range(1, config.epochs + 1):
            model.train()
            running = _Running()
            epoch_started = time.monotonic()
            for index in _batches(split, config.batch_size, generator):
                images = augment(split.images[index].float(), generator).to(device)
                labels = split.labels[index].to(device)
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                averaged.update_parameters(model)
                running.add(loss, logits, labels)
                _show(progress, task, epoch, running, epoch_started)
            speed = running.images / (time.monotonic() - epoch_started)
            console.print(f"epoch {epoch:3d}/{config.epochs}  {running}  {speed:,.0f} images/s")
    trained = Classifier(config.arch).eval()
    trained.load_state_dict(averaged.module.state_dict())
    return trained, time.monotonic() - started


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _show(progress: Progress, task: TaskID, epoch: int, running: _Running, since: float) -> None:
    speed = running.images / max(1e-9, time.monotonic() - since)
    detail = f"{running}  {speed:,.0f} images/s"
    progress.update(task, advance=1, description=f"epoch {epoch}", detail=detail)
