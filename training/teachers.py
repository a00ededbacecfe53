"""Trained classifiers whose mean answer a student learns in place of the label.

The mean of several networks is right more often than each of them, and says of an ambiguous image
what else it could be. Sources: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural
Network; Beyer et al. 2022, Knowledge distillation: A good teacher is patient and consistent, from
which come the same augmented images for both, and no label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from training.fused import fused


class Teachers:
    """Several classifiers that only answer.

    Args:
        checkpoints: At least one.
        device: Where they run.
        bfloat16: Whether they compute in bfloat16.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], device: torch.device, *, bfloat16: bool
    ) -> None:
        self._dtype = torch.bfloat16 if bfloat16 else torch.float32
        self._classifiers = [checkpoint.model.to(device) for checkpoint in checkpoints]
        self._networks = [
            fused(model.network).to(  # type: ignore[call-overload]
                device=device, dtype=self._dtype, memory_format=torch.channels_last
            )
            for model in self._classifiers
        ]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The mean of what they say at the temperature they were trained with.

        Args:
            images: uint8 or float [N, 28, 28], 0 (background) to 255 (ink), on their device.

        Returns:
            float32[N, 10].
        """
        answers = [
            network(model.scale(images).to(self._dtype)).float().softmax(dim=1)
            for model, network in zip(self._classifiers, self._networks, strict=True)
        ]
        return torch.stack(answers).mean(dim=0)


def load_teachers(paths: Sequence[Path], dataset: str) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """Reads checkpoints to learn from.

    Returns:
        Them, and the SHA-256 of each file.

    Raises:
        CheckpointError: If one can not be read, or was trained on another data set.
    """
    checkpoints = [load_checkpoint(path) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if checkpoint.config.dataset != dataset:
            got = checkpoint.config.dataset
            raise CheckpointError(f"teacher: {path}: expected one of {dataset}, got one of {got}")
    return checkpoints, tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
