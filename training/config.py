"""The settings of one training run, saved inside the checkpoint they produced."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from training.model import has_bfloat16, select_device

OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the weights, apart from the code and the library versions.

    The defaults are the default recipe.

    Attributes:
        arch: Name in ``training.model.ARCHITECTURES``.
        kernel_size: Kernel of every convolution, where the architecture lets it be chosen: 3 or 5.
        dropout: Probability of dropping a feature before the last layer, where it can be chosen.
        normalise: Whether pixels are shifted and scaled by the MNIST mean and deviation, or only
            brought to 0-1.
        dataset: Name in ``training.data.DATASETS``.
        validation: Images held out of the training set, for every choice that is made.
        epochs: Passes over the training set.
        batch_size: Images per optimiser step.
        optimizer: One of ``OPTIMIZERS``.
        max_lr: Learning rate; with ``one_cycle`` its peak.
        one_cycle: Whether the rate rises and falls to near zero, or stays.
        weight_decay: Weight decay; decoupled with adamw.
        ema_decay: Per-step decay of the averaged weights that the checkpoint holds; 0 keeps the
            plain ones.
        label_smoothing: Share of the target probability spread over all classes, 0 to 1; without
            effect where there are teachers.
        teachers: SHA-256 of the checkpoints whose mean answer is learnt in place of the label.
        augment: Whether images are warped and degraded at random.
        bfloat16: Whether forward and backward passes compute in bfloat16, with weights in float32:
            twice as fast where the device has instructions for it, which is where the default
            recipe does so, and emulated where not.
        log_every: Batches between printed lines of running loss; 0 prints epochs only.
        seed: Seeds initial weights, shuffling, augmentation and the validation split.
    """

    arch: str = "strided"
    kernel_size: int = 3
    dropout: float = 0.0
    normalise: bool = True
    dataset: str = "mnist"
    validation: int = 2000
    epochs: int = 40
    batch_size: int = 128
    optimizer: str = "adamw"
    max_lr: float = 5e-3
    one_cycle: bool = True
    weight_decay: float = 2e-2
    ema_decay: float = 0.998
    label_smoothing: float = 0.02
    teachers: tuple[str, ...] = ()
    augment: bool = True
    bfloat16: bool = False
    log_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "kernel_size": (3, 5), "dropout": (0, 0.95), "validation": (0, 30_000),
            "epochs": (1, 10_000), "batch_size": (2, 60_000), "max_lr": (1e-9, 100),
            "weight_decay": (0, 10), "ema_decay": (0, 0.999999), "label_smoothing": (0, 0.9),
            "log_every": (0, 10**9), "seed": (0, 2**32 - 1),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected 3 or 5, got {self.kernel_size}")
        if self.optimizer not in OPTIMIZERS:
            expected = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: expected one of {expected}, got {self.optimizer!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and manifests."""
        return asdict(self) | {"teachers": list(self.teachers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The inverse of ``to_dict``, also for values from before there were teachers.

        Raises:
            TypeError: If there is an unknown one.
            ValueError: If one is out of bounds.
        """
        return cls(**values | {"teachers": tuple(values.get("teachers", ()))})


# What most introductions train with: no augmentation, no schedule, no averaging.
CLASSIC: dict[str, Any] = {
    "validation": 5000,
    "epochs": 5,
    "batch_size": 64,
    "optimizer": "adam",
    "max_lr": 1e-3,
    "one_cycle": False,
    "weight_decay": 0.0,
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
    "augment": False,
    "log_every": 100,
}
RECIPES: dict[str, dict[str, Any]] = {"default": {}, "classic": CLASSIC}
# The usual rate of plain SGD, where the recipe's own belongs to Adam.
SGD_LR = 0.01


def make_config(recipe: str, overrides: dict[str, Any]) -> TrainingConfig:
    """The recipe's settings, with some of them said explicitly.

    Raises:
        ValueError: If the recipe or a value is unknown or out of bounds.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    settings = RECIPES[recipe] | overrides
    if recipe == "default":
        settings.setdefault("bfloat16", has_bfloat16(select_device()))
    if settings.get("optimizer") == "sgd" and "max_lr" not in overrides:
        settings["max_lr"] = SGD_LR
    unknown = settings.keys() - {field.name for field in fields(TrainingConfig)}
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    return replace(TrainingConfig(), **settings)
