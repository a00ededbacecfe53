"""Digits drawn in other hands than those of the training set, which batches get a few of."""

from __future__ import annotations

import numpy as np
import torch

from training.config import TrainingConfig
from training.data import Split
from training.strokes import DIGITS, draw

# Made before the first epoch; each is warped anew in every batch, as the training images are.
MAX_DRAWN = 8_000


class Drawn:
    """A stock of drawn digits.

    Args:
        config: Says how many a batch gets.
        steps: Batches of an epoch.
    """

    def __init__(self, config: TrainingConfig, steps: int) -> None:
        needed = round(config.drawn * config.batch_size) * steps * config.epochs
        images, names = draw(DIGITS, min(MAX_DRAWN, needed), np.random.default_rng(config.seed))
        labels = torch.tensor([int(name) for name in names], dtype=torch.int64)
        self._stock = Split(torch.from_numpy(images), labels)

    def some(self, count: int, generator: torch.Generator) -> Split:
        """Any ``count`` of them, chosen by a CPU generator."""
        index = torch.randint(max(1, len(self._stock)), (count,), generator=generator)
        return Split(self._stock.images[index], self._stock.labels[index])
