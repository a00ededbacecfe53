"""The training loop: one path for every architecture, recipe and device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from training.augment import augment
from training.checkpoint import (
    CheckpointError,
    build_classifier,
    read_file,
    write_file,
)
from training.config import TrainingConfig
from training.data import Split
from training.drawn import Drawn
from training.evaluate import predict_logits
from training.model import Classifier, select_device


@dataclass
class _Running:
    """Loss and accuracy over the images seen so far in an epoch."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += float(loss.detach()) * len(labels)
        self.correct += int((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels)

    def summary(self) -> dict[str, float]:
        images = max(1, self.images)
        speed = self.images / max(1e-9, time.monotonic() - self.began)
        return {
            "loss": self.loss / images,
            "accuracy": self.correct / images,
            "images_per_s": speed,
        }

    def __str__(self) -> str:
        now = self.summary()
        return (
            f"loss {now['loss']:.4f}  accuracy {now['accuracy']:7.3%}  "
            f"{now['images_per_s']:6,.0f} images/s"
        )


class Trainer:
    """One training run, from its first epoch or from where it was interrupted.

    The same config, data, machine and thread count give the same weights, interrupted or not.

    Args:
        config: The recipe.
        train: Images and labels to learn from.
        validation: Images and labels that are only looked at; may be empty.
        console: Where progress goes: a live bar on a terminal, lines anywhere.
        start: Classifier whose weights training goes on from; None for random ones.

    Attributes:
        history: Loss, accuracy and speed of each finished epoch.
        seconds: Time spent in epochs.

    Raises:
        ValueError: If the training split is smaller than one batch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        train: Split,
        validation: Split,
        console: Console,
        *,
        start: Classifier | None = None,
    ) -> None:
        if len(train) < config.batch_size:
            raise ValueError(f"batch_size: expected at most {len(train)}, got {config.batch_size}")
        self._config, self._train, self._validation = config, train, validation
        self._console = console
        self._device = select_device()
        torch.manual_seed(config.seed)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._steps = len(train) // config.batch_size
        self._drawn = Drawn(config, self._steps)
        # channels_last is 1.4 times as fast as the default layout on the CPU.
        self._model = _unscored(config).to(  # type: ignore[call-overload]
            device=self._device, memory_format=torch.channels_last
        )
        if start is not None:
            self._model.load_state_dict(start.state_dict(), strict=False)
        average = partial(_average, config.ema_decay)
        self._averaged = AveragedModel(self._model, multi_avg_fn=average, use_buffers=True)
        self._optimizer = _optimizer(config, self._model)
        self._schedule = _schedule(config, self._optimizer, self._steps)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def run(self, state_path: Path | None = None) -> Classifier:
        """Trains the epochs that are left, saving the state after each.

        Returns:
            The trained classifier, on the CPU, in evaluation mode.
        """
        with _progress(self._console) as progress:
            total = self._config.epochs * self._steps
            task = progress.add_task("training", total=total, detail="")
            progress.update(task, completed=len(self.history) * self._steps)
            while len(self.history) < self._config.epochs:
                began = time.monotonic()
                running = self._epoch(progress, task)
                self.seconds += time.monotonic() - began
                self._record(running)
                if state_path is not None:
                    write_file(self._state(), state_path)
        return self._result()

    def _epoch(self, progress: Progress, task: TaskID) -> _Running:
        config, number = self._config, len(self.history) + 1
        self._model.train()
        running, recent = _Running(), _Running()
        for batch, index in enumerate(self._batches(), start=1):
            loss, logits, labels = self._step(index)
            running.add(loss, logits, labels)
            recent.add(loss, logits, labels)
            progress.update(task, advance=1, description=f"epoch {number}", detail=str(running))
            if config.log_every and batch % config.log_every == 0:
                self._console.print(f"epoch {number} batch {batch}/{self._steps}  {recent}")
                recent = _Running()
        return running

    def _step(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the optimiser: the loss, logits and labels of the batch."""
        config = self._config
        drawn = self._drawn.some(round(config.drawn * config.batch_size), self._generator)
        images = torch.cat([self._train.images[index], drawn.images]).float()
        labels = torch.cat([self._train.labels[index], drawn.labels])
        if config.augment:
            images = augment(images, self._generator)
        images, labels = images.to(self._device), labels.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bool(config.bfloat16)):
            logits = self._model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        if config.ema_decay:
            self._averaged.update_parameters(self._model)
        return loss, logits, labels

    def _batches(self) -> Iterator[Tensor]:
        """Index batches of one shuffled epoch; a short last one, bad for batch norm, is left."""
        order = torch.randperm(len(self._train), generator=self._generator)
        size = self._config.batch_size
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]

    def _record(self, running: _Running) -> None:
        entry = running.summary()
        text = f"epoch {len(self.history) + 1:3d}/{self._config.epochs}  {running}"
        if len(self._validation):
            logits = predict_logits(self._result(), self._validation.images)
            labels = self._validation.labels
            entry["validation_loss"] = float(F.cross_entropy(logits, labels))
            entry["validation_accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
            text += f"  validation {entry['validation_accuracy']:7.3%}"
        self.history.append(entry)
        self._console.print(text)

    def _result(self) -> Classifier:
        source = self._averaged.module if self._config.ema_decay else self._model
        result = _unscored(self._config)
        result.load_state_dict(source.state_dict())
        return result.eval()

    def _state(self) -> dict[str, Any]:
        return {
            "config": self._config.to_dict(),
            "model": self._model.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def resume(self, state_path: Path) -> None:
        """Goes on from a state that ``run`` saved.

        Raises:
            CheckpointError: If the file is unreadable or belongs to another configuration.
        """
        state = read_file(state_path)
        if state.get("config") != self._config.to_dict():
            raise CheckpointError(f"{state_path}: was saved by another configuration")
        self._model.load_state_dict(state["model"])
        self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.history, self.seconds = state["history"], state["seconds"]


def _unscored(config: TrainingConfig) -> Classifier:
    """Whether an image is a digit is learned when the network has been trained."""
    return build_classifier(replace(config, not_digits=False))


def _average(decay: float, averaged: Any, current: Any, count: Any) -> None:
    """Moves averaged weights towards the current ones; the first steps count more, as they come.

    Source of the warm-up: tf.train.ExponentialMovingAverage.
    """
    weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
    for kept, new in zip(averaged, current, strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, weight)
        else:
            kept.copy_(new)


def _optimizer(config: TrainingConfig, model: Classifier) -> torch.optim.Optimizer:
    """Weight decay is for what multiplies features: not for biases and batch norms."""
    kernels = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.max_lr, momentum=0.9)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, config.max_lr)
    return torch.optim.AdamW(groups, config.max_lr)


def _schedule(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if not config.one_cycle:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.max_lr, epochs=config.epochs, steps_per_epoch=steps, pct_start=0.2
    )


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
