"""Data sets as whole tensors.

A 60,000-image set is 47 MB: it is held in memory and indexed, without a DataLoader.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from training.config import OWN


@dataclass(frozen=True)
class Dataset:
    """A data set, and what a model that was trained on it is.

    Attributes:
        source: torchvision's class.
        model_name: Name of such a model, and of its repository.
        labels: Of the classes, in the order of the labels 0 to 9.
        min_accuracy: Of a release on the test images, unless told otherwise; any sound training
            reaches more.
    """

    source: Callable[..., Any]
    model_name: str
    labels: tuple[str, ...]
    min_accuracy: float


DATASETS = {
    OWN: Dataset(datasets.MNIST, "digits", tuple("0123456789"), 0.9),
    "mnist": Dataset(datasets.MNIST, "digits", tuple("0123456789"), 0.97),
    "fashion-mnist": Dataset(
        datasets.FashionMNIST, "fashion-mnist",
        (
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot",
        ),
        0.85,
    ),
}  # fmt: skip
DEFAULT_DATA_DIR = Path("data")
# Of every split into training, validation and test images, whatever the seed of the run: runs are
# compared on images that none of them was trained on.
SPLIT_SEED = 0
SPLIT_SIZES = {"train": 60_000, "test": 10_000}
# ``Split.digest`` of what the data sets' authors published.
PUBLISHED_SHA256 = {
    ("mnist", "train"): "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
    ("mnist", "test"): "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
    ("fashion-mnist", "train"): "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    ("fashion-mnist", "test"): "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}


class DataError(RuntimeError):
    """The data set is missing, unreadable, or not what its name says."""


@dataclass(frozen=True)
class Split:
    """One split, whole.

    Attributes:
        images: uint8[N, 28, 28], 0 (background) to 255 (ink).
        labels: int64[N], 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def digest(self) -> str:
        """SHA-256 over pixels, then labels as bytes."""
        hasher = hashlib.sha256(self.images.numpy().tobytes())
        hasher.update(self.labels.to(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)


def data_dir(flag: Path | None) -> Path:
    """Where data sets live: the flag, else ``DIGITS_DATA``, else ``data/``."""
    return flag or Path(os.environ.get("DIGITS_DATA", DEFAULT_DATA_DIR))


def load_split(dataset: str, split: str, root: Path) -> Split:
    """Loads a split, downloading it through torchvision when it is not under ``root``.

    Args:
        dataset: Name in ``DATASETS``.
        split: ``train`` or ``test``.
        root: Folder in torchvision's layout (``MNIST/raw/...``).

    Raises:
        DataError: If it cannot be had, or is not what was published.
    """
    source = DATASETS[dataset].source
    try:
        try:
            data = source(root, train=split == "train", download=False)
        except RuntimeError:  # torchvision's way of saying "not there"
            data = source(root, train=split == "train", download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error) or "a damaged file"  # torchvision asserts what the head says
        raise DataError(f"{dataset} {split} split under {root}: {reason}") from error
    loaded = Split(data.data, data.targets)
    expected = (SPLIT_SIZES[split], 28, 28)
    if tuple(loaded.images.shape) != expected or len(loaded.labels) != expected[0]:
        got = f"{tuple(loaded.images.shape)} images and {len(loaded.labels)} labels"
        raise DataError(f"{dataset} {split} split under {root}: expected {expected}, got {got}")
    digest, published = loaded.digest(), PUBLISHED_SHA256[dataset, split]
    if digest != published:
        where = f"{dataset} {split} split under {root}"
        raise DataError(f"{where}: expected sha256 {published}, got {digest}: a damaged file")
    return loaded


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Splits into what is trained on and ``count`` images that are not, always the same ones."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, kept = order[:count].sort().values, order[count:].sort().values
    return (
        Split(split.images[kept], split.labels[kept]),
        Split(split.images[held], split.labels[held]),
    )
