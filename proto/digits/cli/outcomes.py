"""Answers to many pictures of which some are bad: one that is refused does not fail the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from digits.cli.sources import Item
from digits.client import DigitClient, DigitError, Model, Prediction

FIELD = re.compile(r"encoded\.files\[(\d+)\]")


@dataclass(frozen=True)
class Answer:
    """A picture that was classified, and by what."""

    item: Item
    prediction: Prediction
    model: Model


@dataclass(frozen=True)
class Failure:
    """A picture that was not, and why."""

    item: Item
    reason: str


Outcome: TypeAlias = Answer | Failure


def outcomes(client: DigitClient, items: Sequence[Item]) -> Iterator[Outcome]:
    """What became of each picture, in order.

    A request is refused whole. What comes before the picture that it was refused for is then sent
    again, and that picture once more at the head of a request: what is refused there is bad
    itself, not too much beside the others.

    Raises:
        DigitError: For what has nothing to do with a picture.
        OSError: Likewise.
    """
    start, stop = 0, len(items)
    while start < len(items):
        try:
            for answer in client.classify_batches(item.picture for item in items[start:stop]):
                for prediction in answer.predictions:
                    yield Answer(items[start], prediction, answer.model)
                    start += 1
            stop = len(items)
        except (DigitError, OSError) as error:
            found = _culprit(error, items[start:stop])
            if found is None:
                raise
            index, reason = found
            if index:
                stop = start + index
            else:
                yield Failure(items[start], reason)
                start, stop = start + 1, len(items)


def _culprit(error: DigitError | OSError, items: Sequence[Item]) -> tuple[int, str] | None:
    """Which of the pictures that have no answer yet an error is about, and what it says of it."""
    if isinstance(error, OSError):
        named = (i for i, item in enumerate(items) if str(item.picture) == str(error.filename))
        index = next(named, None) if error.filename is not None else None
        return None if index is None else (index, error.strerror or str(error))
    for field, reason in error.violations.items():
        if match := FIELD.fullmatch(field):
            return int(match[1]), reason.removeprefix(f"{field}: ")
    return None
