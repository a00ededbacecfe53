"""Images of one's own as a data set: folders of files, idx pairs, npz or CSV."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from training.data import SPLIT_SEED, DataError, Split

CLASSES = 10
IDX_IMAGES, IDX_LABELS = 0x803, 0x801
# Every fifth image of each class is tested on, and never trained or validated with.
TEST_EVERY = 5
MIN_OF_A_CLASS = 20
FORMATS = (
    "a folder with folders 0 to 9 of image files, a folder with *images*idx3* and *labels*idx1* "
    "files, a .npz with images and labels, or a .csv of label and 784 pixels"
)


@dataclass(frozen=True)
class OwnData:
    """What was read.

    Attributes:
        split: All images, without duplicates.
        skipped: Files that could not be read, each with the reason.
        duplicates: Images that came more than once and were dropped.
    """

    split: Split
    skipped: list[str] = field(default_factory=list)
    duplicates: int = 0

    def remarks(self) -> list[str]:
        """What a person should know before training."""
        counts = Counter(self.split.labels.tolist())
        listed = ", ".join(f"{digit}: {counts[digit]}" for digit in range(CLASSES))
        lines = [f"{len(self.split):,} images, by digit {listed}"]
        few = [str(digit) for digit in range(CLASSES) if counts[digit] < MIN_OF_A_CLASS]
        if few:
            lines.append(f"warning: fewer than {MIN_OF_A_CLASS} images of {', '.join(few)}")
        if self.duplicates:
            lines.append(f"{self.duplicates} duplicates were dropped")
        if self.skipped:
            lines.append(f"{len(self.skipped)} files were skipped:")
            lines.extend(f"  {reason}" for reason in self.skipped)
        return lines


def read_own(path: Path) -> OwnData:
    """Reads a data set in any of ``FORMATS``.

    Raises:
        DataError: If it is in none of them, or damaged, or holds no image.
    """
    skipped: list[str] = []
    images: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    try:
        if path.is_dir() and (pair := _idx_pair(path)):
            images, labels = (_read_idx(each) for each in pair)
        elif path.is_dir():
            images, labels = _read_folders(path, skipped)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                images, labels = arrays["images"], arrays["labels"]
        elif path.suffix == ".csv":
            images, labels = _read_csv(path)
        else:
            raise DataError(f"--data: expected {FORMATS}, got {path}")
    except (OSError, ValueError, KeyError, EOFError, struct.error) as error:
        raise DataError(f"--data: {path}: {error or type(error).__name__}") from error
    return _checked(path, images, labels, skipped)


def _checked(
    path: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any], skipped: list[str]
) -> OwnData:
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) != len(labels):
        expected = "images uint8[N, 28, 28] and as many labels"
        got = f"{images.dtype}{list(images.shape)} and {len(labels)}"
        raise DataError(f"--data: {path}: expected {expected}, got {got}")
    if not len(images):
        reasons = "".join(f"\n  {reason}" for reason in skipped)
        raise DataError(f"--data: {path}: expected images, got none that can be read{reasons}")
    labels = labels.astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if len(wrong):
        got = f"{labels[wrong[0]]} at {wrong[0]}"
        raise DataError(f"--data: {path}: labels: expected 0 to 9, got {got}")
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    kept = np.sort(first)
    split = Split(torch.from_numpy(images[kept].copy()), torch.from_numpy(labels[kept]))
    return OwnData(split, skipped, len(images) - len(kept))


def _read_folders(
    path: Path, skipped: list[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Image files, brought to MNIST's form by the code that serves."""
    from digits.images import PictureError, normalise  # noqa: PLC0415 - Pillow, for this alone

    images, labels = [], []
    folders = [path / str(digit) for digit in range(CLASSES)]
    if not any(folder.is_dir() for folder in folders):
        raise DataError(f"--data: expected {FORMATS}, got {path}")
    for digit, folder in enumerate(folders):
        files = [each for each in folder.rglob("*") if each.is_file()] if folder.is_dir() else []
        for file in sorted(files):
            try:
                images.append(normalise(file))
            except (PictureError, OSError) as error:
                skipped.append(f"{file.relative_to(path)}: {error}")
            else:
                labels.append(digit)
    return np.array(images, np.uint8).reshape(-1, 28, 28), np.array(labels, np.int64)


def _idx_pair(path: Path) -> tuple[Path, Path] | None:
    images, labels = (sorted(path.glob(f"*{name}*")) for name in ("images*idx3", "labels*idx1"))
    return (images[0], labels[0]) if images and labels else None


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An idx file, packed or not. Source: the format's description beside the MNIST files."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    (magic,) = struct.unpack_from(">I", data)
    if magic not in (IDX_IMAGES, IDX_LABELS):
        expected = f"a head of {IDX_IMAGES:#x} or {IDX_LABELS:#x}"
        raise ValueError(f"{path.name}: expected {expected}, got {magic:#x}")
    axes = magic & 0xFF
    shape = struct.unpack_from(f">{axes}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    return values.reshape(shape)


def _read_csv(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with path.open() as file:
        has_head = not file.readline().split(",")[0].strip().lstrip("-").isdigit()
    rows = np.loadtxt(path, np.int64, delimiter=",", skiprows=int(has_head), ndmin=2)
    if rows.shape[1] != 785 or rows[:, 1:].min(initial=0) < 0 or rows[:, 1:].max(initial=0) > 255:
        raise ValueError(f"expected rows of a label and 784 values from 0 to 255, got {rows.shape}")
    return rows[:, 1:].astype(np.uint8).reshape(-1, 28, 28), rows[:, 0]


def train_and_test(split: Split) -> tuple[Split, Split]:
    """Splits images of one's own, each class alike, the same way every time.

    Raises:
        DataError: If a class has no image to train or to test on.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    tested = torch.zeros(len(split), dtype=torch.bool)
    for digit in range(CLASSES):
        members = (split.labels == digit).nonzero().flatten()
        if 0 < len(members) < 2:
            raise DataError(f"--data: digit {digit}: expected at least 2 images, got 1")
        order = members[torch.randperm(len(members), generator=generator)]
        tested[order[: max(1, len(members) // TEST_EVERY)]] = True
    return (
        Split(split.images[~tested], split.labels[~tested]),
        Split(split.images[tested], split.labels[tested]),
    )


def overlap(train: Split, other: Split) -> int:
    """Images of ``other`` that are in ``train``, pixel by pixel."""
    known = {image.numpy().tobytes() for image in train.images}
    return sum(image.numpy().tobytes() in known for image in other.images)
