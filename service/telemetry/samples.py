"""Keeps a bounded sample of the images that were classified, for people to label and train with.

Of each second the sample is drawn without replacement, an image weighing more the less sure the
model was. Nothing of its caller is kept. Files are written on a thread of their own: what goes
wrong there costs samples, and never a call.
"""

from __future__ import annotations

import heapq
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.serving.batch import Batch
from service.serving.request import IMAGE_BYTES, IMAGE_SIDE, Request

logger = logging.getLogger(__name__)

CLASSES = 10
# Beside 1 - confidence: an image that the model is certain of is drawn, too, twenty times as seldom
# as one of which it is not.
BASE_WEIGHT = 0.05
# Then nothing is written until files have been taken out: nobody's work is deleted. At 4 KiB
# each on the disk, 80 MiB.
MAX_FILES = 20_000
FLUSH_S = 1.0
# For the thread to end.
STOP_S = 1.0
WRITTEN, FAILED, FULL = "written", "failed", "full"


class SampleError(RuntimeError):
    """The folder for samples can not be used; the message says why."""


@dataclass(frozen=True, order=True, slots=True)
class _Drawn:
    """A drawn image; of two, the one with the larger key is kept."""

    key: float
    pixels: bytes
    digit: int
    confidence: float


class Samples:
    """Draws images from batches and writes them; a ``BatchListener``. Thread-safe.

    A file is ``<folder>/<class>/<confidence>-<time>-<number>.png``, so that a person finds the
    doubtful ones first, moves the wrong ones, and trains with the folder (docs/own-digits.md).

    Args:
        folder: Made if it is not there, for this user alone.
        per_s: Images that are kept of each second.
        count: Is called with ``written``, ``failed`` or ``full`` and a number of images.

    Raises:
        SampleError: If the folder can not be made or written to.
    """

    def __init__(self, folder: Path, per_s: int, count: Callable[[str, int], None]) -> None:
        self._folder = folder
        self._per_s = per_s
        self._count = count
        self._rng = np.random.default_rng()
        self._lock = threading.Lock()
        self._drawn: list[_Drawn] = []
        self._ended = threading.Event()
        self._failure = ""
        self._numbers = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for digit in range(CLASSES):
                (folder / str(digit)).mkdir(mode=0o700, exist_ok=True)
            _write(folder, "0/.probe", b"")
            (folder / "0/.probe").unlink()
        except OSError as error:
            raise SampleError(f"--sample-dir: {folder}: {error.strerror}") from None
        self._files = self._found()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()

    def batch(self, batch: Batch) -> None:
        """See ``BatchListener``: draws among the images of a batch."""
        if batch.predictions is None:
            return
        probabilities = batch.predictions.probabilities
        confidence = probabilities.max(axis=1)
        with self._lock:
            # Weighted reservoir, the largest keys win: Efraimidis and Spirakis 2006, IPL 97(5).
            keys = self._rng.random(len(confidence)) ** (1 / (BASE_WEIGHT + 1 - confidence))
            room = len(self._drawn) < self._per_s
            rows = range(len(keys)) if room else np.flatnonzero(keys > self._drawn[0].key).tolist()
            if rows:
                self._keep(batch, rows, keys, probabilities)

    def _keep(
        self,
        batch: Batch,
        rows: Sequence[int],
        keys: npt.NDArray[np.float64],
        probabilities: npt.NDArray[np.float32],
    ) -> None:
        """Puts images of a batch in the place of those with smaller keys; the lock is held."""
        begin, wanted = 0, set(rows)
        for request, first, count in batch.parts:
            for row in wanted.intersection(range(begin, begin + count)):
                at = (first + row - begin) * IMAGE_BYTES
                digit = int(probabilities[row].argmax())
                drawn = _Drawn(
                    float(keys[row]), bytes(request.images[at : at + IMAGE_BYTES]), digit,
                    float(probabilities[row, digit]),
                )  # fmt: skip
                push = heapq.heappush if len(self._drawn) < self._per_s else heapq.heappushpop
                push(self._drawn, drawn)
            begin += count

    def refused(self, requests: Sequence[Request]) -> None:
        """See ``BatchListener``: nothing was answered."""

    def close(self) -> None:
        """Writes what was drawn, and ends."""
        self._ended.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._ended.wait(FLUSH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            drawn, self._drawn = self._drawn, []
        for number, image in enumerate(drawn):
            if self._files >= MAX_FILES:
                self._files = self._found()
            if self._files >= MAX_FILES:
                self._tell(f"{self._folder} holds {MAX_FILES:,} files, the most that are kept")
                self._count(FULL, len(drawn) - number)
                return
            try:
                self._write(image)
            except OSError as error:
                self._tell(f"{self._folder}: {error.strerror}")
                self._count(FAILED, len(drawn) - number)
                return
        if drawn:
            self._failure = ""
            self._count(WRITTEN, len(drawn))

    def _write(self, image: _Drawn) -> None:
        self._numbers += 1
        data = io.BytesIO()
        pixels = np.frombuffer(image.pixels, np.uint8).reshape(IMAGE_SIDE, IMAGE_SIDE)
        Image.fromarray(pixels).save(data, "PNG")
        moment = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{self._numbers}"
        name = f"{image.digit}/{image.confidence:.3f}-{moment}.png"
        _write(self._folder, name, data.getvalue())
        self._files += 1

    def _tell(self, failure: str) -> None:
        if failure != self._failure:  # once, and not every second
            logger.error("samples are not written: %s", failure)
        self._failure = failure

    def _found(self) -> int:
        return sum(1 for _ in self._folder.glob("*/*.png"))


def _write(folder: Path, name: str, data: bytes) -> None:
    """Writes a file that appears whole, for this user alone."""
    path = folder / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - it is open already
        file.write(data)
    temporary.replace(path)


class Listeners:
    """Several ``BatchListener``s as one; one that raises keeps nothing from the others."""

    def __init__(self, *listeners: Any) -> None:
        self._listeners = listeners

    def batch(self, batch: Batch) -> None:
        """See ``BatchListener``."""
        for listener in self._listeners:
            try:
                listener.batch(batch)
            except Exception:
                logger.exception("%s failed; this is a bug", type(listener).__name__)

    def refused(self, requests: Sequence[Request]) -> None:
        """See ``BatchListener``."""
        for listener in self._listeners:
            try:
                listener.refused(requests)
            except Exception:
                logger.exception("%s failed; this is a bug", type(listener).__name__)
