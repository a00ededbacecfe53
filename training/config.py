"""The settings of one training run, saved inside the checkpoint they produced."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the weights, apart from the code and the library versions.

    Attributes:
        arch: Name in ``training.model.ARCHITECTURES``.
        dataset: Name in ``training.data.DATASETS``.
        epochs: Passes over the training set.
        batch_size: Images per optimiser step.
        max_lr: Peak of the one-cycle learning rate; it ends near zero.
        weight_decay: Decoupled weight decay of AdamW.
        ema_decay: Per-step decay of the averaged weights that the checkpoint holds.
        label_smoothing: Share of the target probability spread over all classes, 0 to 1.
        seed: Seeds initial weights, shuffling and augmentation.
    """

    arch: str = "strided"
    dataset: str = "mnist"
    epochs: int = 20
    batch_size: int = 128
    max_lr: float = 5e-3
    weight_decay: float = 2e-2
    ema_decay: float = 0.998
    label_smoothing: float = 0.02
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and manifests."""
        return asdict(self)
