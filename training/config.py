"""The settings of one training run, saved inside the checkpoint that it produced."""

from __future__ import annotations

import re
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

# Named here and not where they are made, so that a wrong one is told before PyTorch is loaded.
ARCHITECTURE_NAMES = (
    "mlp", "conv16", "conv16-32", "conv16-32-fc128", "conv32-64-fc128", "conv32-64-128",
)  # fmt: skip
# Or the layers themselves: ``training.model.from_text``.
LAYERS = re.compile(r"[1-9]\d{0,2}(-([1-9]\d{0,2}s?|p))*")
OWN = "own"
DATASET_NAMES = ("mnist", "fashion-mnist", OWN)
OPTIMIZERS = ("adamw", "adam", "sgd")


def option(
    default: Any,
    help: str,  # noqa: A002 - argparse's name for it
    *,
    bounds: tuple[float, float] | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A field that is a flag of ``python -m training``."""
    metadata = {"help": help, "bounds": bounds, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the weights, apart from data, code and library versions.

    The defaults are the default recipe. ``start`` holds the SHA-256 of the weights to go on from.

    Raises:
        ValueError: If a value is out of bounds.
    """

    arch: str = option(
        "16-24-48s-48-p",
        f"architecture: {', '.join(ARCHITECTURE_NAMES)}, or layers such as 32-p-48-48s-p",
    )
    kernel_size: int = option(
        3, "kernel of every convolution, where the architecture has the choice", choices=(3, 5)
    )
    dropout: float = option(
        0.0, "probability of dropping a feature before the last layer, where there is the choice",
        bounds=(0, 0.95),
    )  # fmt: skip
    dataset: str = option("mnist", "data set; --data makes it own", choices=DATASET_NAMES)
    mix: str = option("", "data set that is added to --data", choices=("", "mnist"))
    validation: int = option(
        2000, "images held out of the training set, for every choice that is made",
        bounds=(0, 30_000),
    )  # fmt: skip
    epochs: int = option(60, "passes over the training set", bounds=(1, 10_000))
    batch_size: int = option(128, "images per optimiser step", bounds=(2, 60_000))
    optimizer: str = option("adamw", "optimiser", choices=OPTIMIZERS)
    max_lr: float = option(
        5e-3, "learning rate; with one_cycle its peak", bounds=(1e-9, 100)
    )  # fmt: skip
    one_cycle: bool = option(True, "let the rate rise and fall to near zero")
    weight_decay: float = option(2e-2, "weight decay; decoupled with adamw", bounds=(0, 10))
    ema_decay: float = option(
        0.998, "per-step decay of the averaged weights that are kept; 0 keeps the plain ones",
        bounds=(0, 0.999999),
    )  # fmt: skip
    label_smoothing: float = option(
        0.02, "share of the target probability that is spread over all classes", bounds=(0, 0.9)
    )
    augment: bool = option(True, "warp and degrade images at random")
    drawn: float = option(
        0.08, "digits drawn in other hands, as a share of the images of a batch; digits only",
        bounds=(0, 1),
    )  # fmt: skip
    not_digits: bool = option(
        True, "also learn to tell whether an image is a digit; digits only",
    )  # fmt: skip
    bfloat16: bool | None = option(
        None, "compute in bfloat16, with weights in float32; none: where the device has "
        "instructions for it",
    )  # fmt: skip
    log_every: int = option(
        0, "batches between printed lines of running loss; 0 prints epochs only", bounds=(0, 10**9)
    )
    seed: int = option(
        0, "seeds initial weights, shuffling and augmentation", bounds=(0, 2**32 - 1)
    )
    start: str = ""

    def __post_init__(self) -> None:
        check_arch(self.arch)
        for each in options():
            _check(each, getattr(self, each.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and manifests."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The inverse of ``to_dict``.

        Raises:
            TypeError: If there is an unknown one.
            ValueError: If one is out of bounds.
        """
        return cls(**values)


def options() -> list[Field[Any]]:
    """The fields that are flags."""
    return [each for each in fields(TrainingConfig) if each.metadata]


def check_arch(arch: str) -> None:
    """Raises ValueError if there is no such architecture."""
    if arch not in ARCHITECTURE_NAMES and not LAYERS.fullmatch(arch):
        expected = f"one of {', '.join(ARCHITECTURE_NAMES)}, or layers such as 32-p-48-48s-p"
        raise ValueError(f"arch: expected {expected}, got {arch!r}")


def _check(each: Field[Any], value: Any) -> None:
    bounds, choices = each.metadata["bounds"], each.metadata["choices"]
    if bounds and not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"{each.name}: expected {bounds[0]:g} to {bounds[1]:g}, got {value}")
    if choices and value not in choices:
        expected = ", ".join(str(choice) for choice in choices if choice != "")
        raise ValueError(f"{each.name}: expected one of {expected}, got {value!r}")


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
    "drawn": 0.0,
    "not_digits": False,
    "bfloat16": False,
    "log_every": 100,
}
RECIPES: dict[str, dict[str, Any]] = {"default": {}, "classic": CLASSIC}
# The usual rate of plain SGD, where the recipe's own belongs to Adam.
SGD_LR = 0.01


def make_config(recipe: str, overrides: dict[str, Any]) -> TrainingConfig:
    """The recipe's settings, with some of them given explicitly.

    Raises:
        ValueError: If the recipe or a value is unknown or out of bounds.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    settings = RECIPES[recipe] | overrides
    unknown = settings.keys() - {field.name for field in fields(TrainingConfig)}
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    if settings.get("optimizer") == "sgd" and "max_lr" not in overrides:
        settings["max_lr"] = SGD_LR
    if settings.get("dataset") not in (None, "mnist", OWN):
        given = [name for name in ("drawn", "not_digits") if overrides.get(name)]
        if given:
            raise ValueError(
                f"{given[0]}: expected a data set of digits, got {settings['dataset']}"
            )
        settings |= {"drawn": 0.0, "not_digits": False}
    return replace(TrainingConfig(), **settings)
