"""Makes the tables and the picture of docs/images.md: ``python -m tests.presentations_report``.

Pictures are normalised by the code that the server runs on files, and classified by the model that
it would serve. The suite sends some of them through real servers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
    arguments = parser.parse_args()
    root = data_dir(arguments.data_dir)
    split = load_split("mnist", arguments.split, root)
    if arguments.picture:
        draw(split)
        return
    report = Report()
    report.presentations(split, arguments.limit)
    report.other_digits(arguments.fonts)
    fashion = load_split("fashion-mnist", arguments.split, root).images.numpy()
    report.others(split, fashion, arguments.fonts, arguments.limit)


def normalised(files: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """uint8[N, 28, 28] and plausibility float64[N]."""
    seen = [examine_grey(grey_of(file), judge) for file in files]
    return np.stack([s.pixels for s in seen]), np.array([s.plausibility for s in seen])


def present(name: str, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return normalised(p.PRESENTATIONS[name](digit, rng) for digit in digits)


class Report:
    """Prints the tables."""

    def __init__(self) -> None:
        self._engine = engine()
        self._scores: dict[str, np.ndarray] = {}

    def presentations(self, split: Split, limit: int) -> None:
        """Accuracy of every presentation beside the raw pixels'."""
        digits, labels = split.images[:limit].numpy(), split.labels[:limit].numpy()
        raw = self._accuracy(digits, labels)
        print(f"{len(digits)} digits, raw pixels {raw:.2f} %\n")
        print("| presentation | accuracy | difference |\n|---|---|---|")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            run = partial(present, digits=digits)
            for name, seen in zip(p.PRESENTATIONS, pool.map(run, p.PRESENTATIONS), strict=True):
                accuracy = self._accuracy(seen[0], labels)
                print(f"| {name} | {accuracy:.2f} % | {accuracy - raw:+.2f} |", flush=True)
                self._scores[name] = self._score(*seen)

    def other_digits(self, fonts: list[Path]) -> None:
        """Accuracy on digits that are not MNIST's."""
        print("\n| digits | number | accuracy |\n|---|---|---|")
        sources: dict[str, tuple[list[bytes], list[int]]] = {}
        for name, faces in (("DejaVu fonts", p.bundled_fonts()), ("handwriting fonts", fonts)):
            drawn = [(side, f, d) for side in (40, 100, 300) for f in faces for d in range(10)]
            files = [p.character(str(d), face, side) for side, face, d in drawn]
            sources[name] = files, [d for _, _, d in drawn]
        if importlib.util.find_spec("sklearn"):
            from sklearn.datasets import load_digits

            data = load_digits()
            small = [Image.fromarray((255 - i * 15).astype(np.uint8)) for i in data.images]
            sources["UCI optdigits, 8x8"] = [p.png(image) for image in small], data.target.tolist()
        for name, (files, labels) in sources.items():
            if files:
                accuracy = self._accuracy(normalised(files)[0], np.array(labels))
                print(f"| {name} | {len(files):,} | {accuracy:.2f} % |", flush=True)

    def others(self, split: Split, fashion: np.ndarray, fonts: list[Path], limit: int) -> None:
        """How many of what is no digit pass a threshold that keeps most digits."""
        digits = split.images.numpy()
        makers: dict[str, Callable[[np.random.Generator], bytes]] = {
            "letters, DejaVu": p.letter,
            "Fashion-MNIST, as they are": lambda r: p.unchanged(_any(fashion, r), r),
            "Fashion-MNIST, dark on light 280": lambda r: p.png(p.on_paper(_any(fashion, r))),
            "shapes": p.shape,
            "two digits": lambda r: p.several_digits([_any(digits, r) for _ in range(2)]),
            "three digits": lambda r: p.several_digits([_any(digits, r) for _ in range(3)]),
            "textures": p.texture,
            "white noise": p.white_noise,
            "blank": p.blank,
        }
        if fonts:
            makers["letters, handwriting fonts"] = lambda r: p.letter(r, fonts)
        kept = np.concatenate(list(self._scores.values()))
        plain = self._score(*present("unchanged", digits))  # all of them, whatever the limit
        thresholds = [float(np.quantile(plain, 1 - share)) for share in KEPT]
        shares = " | ".join(
            f"{share:.1%} kept, from {t:.3f}" for share, t in zip(KEPT, thresholds, strict=True)
        )
        print(f"\n| pictures | AUROC | {shares} |\n|---|---|{'---|' * len(KEPT)}")
        self._row("all presentations", kept, plain, thresholds)
        for name, maker in makers.items():
            rng = np.random.default_rng(1)
            scores = self._score(*normalised(maker(rng) for _ in range(limit)))
            self._row(name, scores, plain, thresholds)

    def _row(self, name: str, scores: np.ndarray, digits: np.ndarray, limits: list[float]) -> None:
        ordered = np.sort(digits)
        sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
        auroc = 1 - float(np.mean(sides)) / len(ordered)
        passing = " | ".join(f"{(scores >= limit).mean():.1%}" for limit in limits)
        print(f"| {name} | {auroc:.3f} | {passing} |", flush=True)

    def _accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float((self._engine.run(images).argmax(axis=1) == labels).mean() * 100)

    def _score(self, images: np.ndarray, plausibility: np.ndarray) -> Any:
        probabilities, is_digit = self._engine.answer(images)
        return probabilities.max(axis=1) * is_digit * plausibility


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
