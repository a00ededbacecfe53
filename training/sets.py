"""What a run is trained and tested on: published data sets, images of one's own, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from training.config import OWN, TrainingConfig
from training.data import DataError, Split, hold_out, load_split
from training.own import read_own, train_and_test

# Mixed with 60,000 others, a few hundred images of one's own would hardly be seen: they are
# repeated until they are about this share of an epoch.
OWN_SHARE = 0.25


@dataclass(frozen=True)
class Sets:
    """The data of a run, by where it comes from.

    Attributes:
        train_parts: Training images by name: ``own``, or that of a data set.
        test_parts: Test images likewise.
        remarks: What a person should know before training.
    """

    train_parts: Mapping[str, Split]
    test_parts: Mapping[str, Split]
    remarks: list[str] = field(default_factory=list)

    @property
    def train(self) -> Split:
        """All training images."""
        return joined(*self.train_parts.values())

    @property
    def test(self) -> Split:
        """All test images."""
        return joined(*self.test_parts.values())

    def digests(self) -> dict[str, str]:
        """SHA-256 of each split."""
        return {"train": self.train.digest(), "test": self.test.digest()}

    def hold_out(self, count: int) -> tuple[Split, Split]:
        """What is trained on, and ``count`` validation images, of each part its share.

        Images of one's own that are mixed with a data set are repeated in the former.
        """
        total = sum(len(part) for part in self.train_parts.values())
        kept, held = {}, []
        for name, part in self.train_parts.items():
            kept[name], validation = hold_out(part, round(count * len(part) / total))
            held.append(validation)
        others = sum(len(part) for name, part in kept.items() if name != OWN)
        repeats = 1
        if OWN in kept and others:
            repeats = max(1, round(others * OWN_SHARE / (1 - OWN_SHARE) / len(kept[OWN])))
        trained = [
            part for name, part in kept.items() for _ in range(repeats if name == OWN else 1)
        ]
        return joined(*trained), joined(*held)


def joined(*parts: Split) -> Split:
    """One split of several."""
    if len(parts) == 1:
        return parts[0]
    return Split(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )


def load_sets(config: TrainingConfig, root: Path, own: Path | None) -> Sets:
    """Loads the data of a configuration.

    Args:
        config: Says which.
        root: Folder of the published data sets.
        own: Images of one's own, where the configuration asks for them.

    Raises:
        DataError: If something can not be had, or is not what it should be.
    """
    published = config.mix if config.dataset == OWN else config.dataset
    train, test, remarks = {}, {}, []
    if published:
        train[published] = load_split(published, "train", root)
        test[published] = load_split(published, "test", root)
    if config.dataset == OWN:
        if own is None:
            raise DataError("--data: expected the images that were trained on, got none")
        data = read_own(own)
        remarks = data.remarks()
        train[OWN], test[OWN] = train_and_test(data.split)
        if not published and len(missing := _missing(train[OWN])):
            raise DataError(f"--data: {own}: expected images of every digit, got none of {missing}")
    return Sets(train, test, remarks)


def _missing(split: Split) -> str:
    present = set(split.labels.tolist())
    return ", ".join(str(digit) for digit in range(10) if digit not in present)
