"""Makes the tables and the picture of docs/images.md: ``python -m tests.presentations_report``.

Pictures are normalised by the code that the server runs on files, and classified by the model that
it would serve. The suite sends some of them through real servers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.tables import PRESENTATIONS, others_table, presentations_table
from digits.images import examine_grey, grey_of
from tests import presentations as p
from tests.judge import engine, judge
from training.data import Split, data_dir, load_split

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pictures/images.png"
SHOWN = (
    "dark on light 28", "colours", "ink on nothing", "off centre", "small in a large canvas",
    "cropped to the ink", "thin strokes", "thick strokes", "uneven light", "rough paper", "noise",
    "low contrast", "coarse small jpeg", "framed", "specks",
)  # fmt: skip
TILE, GAP, COLUMNS = 84, 6, 5
# Shares of the digits that a threshold of the score lets pass.
KEPT = (0.999, 0.99, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="as for training (or DIGITS_DATA)")
    parser.add_argument("--limit", type=int, default=10_000, help="pictures of each kind")
    parser.add_argument("--split", default="test", choices=("test", "train"))
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="handwriting fonts")
    parser.add_argument("--picture", action="store_true", help="draw docs/pictures/images.png only")
    parser.add_argument("--commit", action="store_true", help=f"write {PRESENTATIONS}, of the docs")
    arguments = parser.parse_args()
    root = data_dir(arguments.data_dir)
    split = load_split("mnist", arguments.split, root)
    if arguments.picture:
        draw(split)
        return
    fashion = load_split("fashion-mnist", arguments.split, root).images.numpy()
    result = Report(arguments.limit, arguments.fonts).result(split, fashion)
    print(presentations_table(result), others_table(result), sep="\n", end="")
    if arguments.commit:
        PRESENTATIONS.write_text(json.dumps(result, indent=1) + "\n")


def normalised(files: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """uint8[N, 28, 28] and plausibility float64[N]."""
    seen = [examine_grey(grey_of(file), judge) for file in files]
    return np.stack([s.pixels for s in seen]), np.array([s.plausibility for s in seen])


def present(name: str, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return normalised(p.PRESENTATIONS[name](digit, rng) for digit in digits)


class Report:
    """Accuracies and scores for the tables.

    Args:
        limit: Pictures of each kind.
        fonts: Files of handwriting fonts.
    """

    def __init__(self, limit: int, fonts: list[Path]) -> None:
        self._limit, self._fonts = limit, fonts
        self._engine = engine()
        self._scores: list[np.ndarray] = []

    def result(self, split: Split, fashion: np.ndarray) -> dict[str, Any]:
        """Shares, from 0 to 1."""
        digits, labels = (part[: self._limit].numpy() for part in (split.images, split.labels))
        return {
            "limit": len(digits),
            "raw": self._accuracy(digits, labels),
            "right": self._presentations(digits, labels),
            "other_digits": self._other_digits(),
            **self._others(split.images.numpy(), fashion),
        }

    def _presentations(self, digits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        right = {}
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            run = partial(present, digits=digits)
            for name, seen in zip(p.PRESENTATIONS, pool.map(run, p.PRESENTATIONS), strict=True):
                right[name] = self._accuracy(seen[0], labels)
                self._scores.append(self._score(*seen))
        return right

    def _other_digits(self) -> dict[str, tuple[int, float]]:
        """Number and share that is right of digits that are not MNIST's."""
        sources: dict[str, tuple[list[bytes], list[int]]] = {}
        for name, faces in (
            ("DejaVu fonts, three sizes", p.bundled_fonts()), ("handwriting fonts", self._fonts),
        ):  # fmt: skip
            drawn = [(side, f, d) for side in (40, 100, 300) for f in faces for d in range(10)]
            files = [p.character(str(d), face, side) for side, face, d in drawn]
            sources[name] = files, [d for _, _, d in drawn]
        if importlib.util.find_spec("sklearn"):
            from sklearn.datasets import load_digits

            data = load_digits()
            small = [Image.fromarray((255 - i * 15).astype(np.uint8)) for i in data.images]
            sources["UCI optdigits, 8x8"] = [p.png(image) for image in small], data.target.tolist()
        return {
            name: (len(files), self._accuracy(normalised(files)[0], np.array(labels)))
            for name, (files, labels) in sources.items()
            if files
        }

    def _others(self, digits: np.ndarray, fashion: np.ndarray) -> dict[str, Any]:
        """How many of what is no digit pass a threshold that keeps most digits."""
        makers: dict[str, Callable[[np.random.Generator], bytes]] = {
            "letters, DejaVu Serif and Mono": p.letter,
            "Fashion-MNIST, as they are": lambda r: p.unchanged(_any(fashion, r), r),
            "Fashion-MNIST, dark on light, 280 pixels": lambda r: p.png(
                p.on_paper(_any(fashion, r))
            ),
            "shapes": p.shape,
            "two digits": lambda r: p.several_digits([_any(digits, r) for _ in range(2)]),
            "three digits": lambda r: p.several_digits([_any(digits, r) for _ in range(3)]),
            "textures": p.texture,
            "white noise": p.white_noise,
            "blank": p.blank,
        }
        if self._fonts:
            makers["letters, handwriting fonts"] = lambda r: p.letter(r, self._fonts)
        plain = self._score(*present("unchanged", digits))  # all of them, whatever the limit
        thresholds = [float(np.quantile(plain, 1 - share)) for share in KEPT]
        passing = {
            "digits in all presentations": _passing(np.concatenate(self._scores), thresholds)
        }
        auroc = {}
        for name, maker in makers.items():
            rng = np.random.default_rng(1)
            scores = self._score(*normalised(maker(rng) for _ in range(self._limit)))
            passing[name], auroc[name] = _passing(scores, thresholds), _auroc(plain, scores)
        return {
            "kept": KEPT, "thresholds": thresholds, "passing": passing, "auroc": auroc,
        }  # fmt: skip

    def _accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float((self._engine.run(images).argmax(axis=1) == labels).mean())

    def _score(self, images: np.ndarray, plausibility: np.ndarray) -> Any:
        probabilities, is_digit = self._engine.answer(images)
        return probabilities.max(axis=1) * is_digit * plausibility


def _passing(scores: np.ndarray, thresholds: list[float]) -> list[float]:
    return [float((scores >= threshold).mean()) for threshold in thresholds]


def _auroc(digits: np.ndarray, others: np.ndarray) -> float:
    """The probability that a digit has the higher score; ties count half."""
    ordered = np.sort(digits)
    sides = [np.searchsorted(ordered, others, side) for side in ("left", "right")]
    return 1 - float(np.mean(sides)) / len(ordered)


def _any(images: np.ndarray, rng: np.random.Generator) -> Any:
    return images[rng.integers(len(images))]


def draw(split: Split) -> None:
    """What was sent, and beside it what the network saw."""
    rng = np.random.default_rng(4)
    rows = -(-len(SHOWN) // COLUMNS)
    width, height = COLUMNS * (2 * TILE + 3 * GAP), rows * (TILE + 2 * GAP)
    sheet = Image.new("RGB", (width, height), (120, 130, 140))
    for place, name in enumerate(SHOWN):
        digit = split.images[place].numpy()
        file = p.PRESENTATIONS[name](digit, rng)
        left = GAP + (place % COLUMNS) * (2 * TILE + 3 * GAP)
        top = GAP + (place // COLUMNS) * (TILE + 2 * GAP)
        sent = p.opened_for_display(file)
        sent.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        if max(sent.size) < TILE:
            sent = sent.resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(sent, (left + (TILE - sent.width) // 2, top + (TILE - sent.height) // 2))
        seen = Image.fromarray(examine_grey(grey_of(file), judge).pixels)
        sheet.paste(seen.resize((TILE, TILE), Image.Resampling.NEAREST), (left + TILE + GAP, top))
    sheet.save(PICTURE, optimize=True)
    print(f"drawn in {PICTURE}")


if __name__ == "__main__":
    main()
