"""Answers to many pictures of which some are bad: one that is refused does not fail the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeAlias

import grpc

from digits.cli.sources import Item
from digits.client import DigitClient, DigitError, Model, Prediction
from digits.formats import PictureError
from digits.inputs import MAX_FILE_BYTES

FIELD = re.compile(r"encoded\.files\[(\d+)\]")
# Of a request that is larger than the server takes, in the words of every gRPC implementation.
SIZES = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")


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
    """
    start, stop = 0, len(items)
    while start < len(items):
        try:
            for answer in client.classify_batches(item.picture for item in items[start:stop]):
                for prediction in answer.predictions:
                    yield Answer(items[start], prediction, answer.model)
                    start += 1
            stop = len(items)
        except (DigitError, OSError, PictureError) as error:
            found = _culprit(error, items[start])
            if found is None:
                raise
            index, reason = found
            if index:
                stop = start + index
            else:
                yield Failure(items[start], reason)
                start, stop = start + 1, len(items)


def _culprit(error: DigitError | OSError | PictureError, first: Item) -> tuple[int, str] | None:
    """Which of the pictures that have no answer yet an error is about, and what it says of it.

    A file is read, and one above ``MAX_FILE_BYTES`` refused for its size, when all before it have
    their answers: then it is the first of these.
    """
    if isinstance(error, OSError):
        return 0, error.strerror or str(error)
    if isinstance(error, PictureError):
        return 0, f"expected {error.expected}, got {error.got}"
    for field, reason in error.violations.items():
        if match := FIELD.fullmatch(field):
            return int(match[1]), reason.removeprefix(f"{field}: ")
    too_large = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not error.transient
    if too_large and _size(first) > MAX_FILE_BYTES:
        return 0, _size_reason(error)
    return None


def _size(item: Item) -> int:
    picture = item.picture
    return len(picture) if isinstance(picture, bytes) else picture.stat().st_size


def _size_reason(error: DigitError) -> str:
    sizes = SIZES.search(error.message)
    if sizes is None:
        return str(error)
    reason = f"expected a file of at most {int(sizes[2]):,} bytes, got {int(sizes[1]):,}"
    hint = "; where Pillow is installed it is shrunk before it is sent: pip install pillow"
    return reason + (hint if find_spec("PIL") is None else "")
