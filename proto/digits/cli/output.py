"""The output of ``digits classify``: a table with pictures, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from digits.cli.flags import printable
from digits.cli.outcomes import Answer, Failure
from digits.cli.sources import Item
from digits.client import Model

# Both halves of a character, from the upper pixel and the lower one.
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
# Lighter ink is not drawn.
DRAWN_FROM = 96
# Columns of a terminal that are left for names.
MAX_NAME = 40


class Printer(Protocol):
    """Takes answers as they come; standard error gets the failures as well."""

    def row(self, answer: Answer) -> None:
        """One picture was classified."""

    def failure(self, failure: Failure) -> None:
        """One was not."""

    def end(self) -> None:
        """There are no more."""


class TablePrinter:
    """A line for each picture, and below it, where asked for, the picture itself.

    Args:
        items: All that will come.
        labels: Asks the server for the labels of its classes.
        pictures: Whether they are drawn.
    """

    def __init__(
        self, items: Sequence[Item], labels: Callable[[], Sequence[str]], *, pictures: bool
    ) -> None:
        self._ask_labels = labels
        self._labels: Sequence[str] = [str(digit) for digit in range(10)]
        longest = max((len(item.name) for item in items), default=0)
        self._width = min(MAX_NAME, max(len("file"), longest))
        self._pictures = pictures
        self._models: list[Model] = []

    def row(self, answer: Answer) -> None:
        """See ``Printer.row``."""
        item, prediction, model = answer.item, answer.prediction, answer.model
        if not self._models:
            self._begin(model)
        if model not in self._models:
            self._models.append(model)
        second = int(prediction.probabilities.argsort()[-2])
        score = prediction.digit_score
        print(
            f"{_shortened(item.name, self._width):<{self._width}}  "
            f"{self._labels[prediction.digit]:>{self._label_width}}  "
            f"{prediction.confidence:>10.2%}  {'-' if score is None else f'{score:.2f}':>5}  "
            f"{self._labels[second]} ({prediction.probabilities[second]:.2%})"
        )
        if self._pictures:
            print("\n".join(f"  {line}" for line in _picture(item)))
        sys.stdout.flush()

    def failure(self, failure: Failure) -> None:
        """Has no line."""

    def _begin(self, model: Model) -> None:
        """Prints the head; a model of other things than digits has labels to be asked for."""
        if model.name != "digits":
            self._labels = [printable(label) for label in self._ask_labels()]
        title = "digit" if model.name == "digits" else "label"
        self._label_width = max(len(text) for text in (title, *self._labels))
        columns = f"{title:>{self._label_width}}  confidence  score  runner-up"
        print(f"{'file':<{self._width}}  {columns}")

    def end(self) -> None:
        """See ``Printer.end``."""
        for number, model in enumerate(self._models):
            line = f"model {model.name}/{model.version} {model.precision} {model.sha256[:12]}"
            print(
                f"{'' if number else chr(10)}{printable(f'{line} on {model.execution_provider}')}"
            )


class JsonPrinter:
    """One document: predictions, the models that made them, and what has none.

    Args:
        passed_over: Files in folders that were not looked at, by their suffixes.
    """

    def __init__(self, passed_over: Mapping[str, int]) -> None:
        self._passed_over = dict(passed_over)
        self._predictions: list[dict[str, Any]] = []
        self._errors: list[dict[str, str]] = []
        self._models: list[Model] = []

    def row(self, answer: Answer) -> None:
        """See ``Printer.row``."""
        prediction, model = answer.prediction, answer.model
        self._predictions.append(
            {
                "file": answer.item.name,
                "digit": prediction.digit,
                "confidence": prediction.confidence,
                "digit_score": prediction.digit_score,
                "model_version": model.version,
                "probabilities": [float(p) for p in prediction.probabilities],
            }
        )
        if model not in self._models:
            self._models.append(model)

    def failure(self, failure: Failure) -> None:
        """See ``Printer.failure``."""
        self._errors.append({"file": failure.item.name, "error": failure.reason})

    def end(self) -> None:
        """See ``Printer.end``."""
        document = {
            "predictions": self._predictions,
            "errors": self._errors,
            "passed_over": self._passed_over,
            "models": [vars(model) for model in self._models],
        }
        print(json.dumps(document, indent=2))


def _picture(item: Item) -> Iterator[str]:
    """The 28x28 image that the network saw, normalised as the server does it."""
    from digits.images import normalise  # noqa: PLC0415 - needs Pillow

    try:
        yield from drawn(normalise(item.picture))
    except (OSError, ValueError) as error:  # gone meanwhile, or a server that reads more than we
        yield f"(not drawn: {error})"


def drawn(image: npt.NDArray[np.uint8]) -> Iterator[str]:
    """Lines of half blocks: two rows of pixels each, without the empty ones above and below."""
    ink = image >= DRAWN_FROM
    rows = np.flatnonzero(ink.any(axis=1))
    if not rows.size:
        yield "(no ink)"
        return
    for row in range(rows[0] // 2 * 2, rows[-1] + 1, 2):
        halves = zip(ink[row].tolist(), ink[row + 1].tolist(), strict=True)
        yield "".join(HALVES[pair] for pair in halves).rstrip()


def _shortened(name: str, width: int) -> str:
    """The end of a long name, which tells it from its neighbours."""
    name = printable(name)
    return name if len(name) <= width else "…" + name[1 - width :]
