"""Signs written as strokes, with pens and hands at random, in the network's form.

MNIST's writers hardly write a 1 with a long flag, a 4 in one stroke or a 9 with a flourish, and no
letters or shapes at all. A sign is a text: points ``xy`` on a grid from 0 to 9, y downwards, spaces
between them; a comma lifts the pen; ``~`` draws a smooth curve through the points that follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from digits.form import box_of, formed

Points = npt.NDArray[np.float64]
Images = npt.NDArray[np.uint8]

# Several ways to write each digit. The first ones are everybody's, the others are rare in MNIST.
DIGITS: Mapping[str, Sequence[str]] = {
    "0": ("~50 81 94 96 78 49 18 05 03 21 50 71", "~50 82 94 86 59 27 14 22 50 72, 81 18"),
    "1": (
        "50 59", "34 50 59", "25 50 59", "16 50 59", "07 50 59", "~36 42 50, 50 59",
        "25 50 59, 29 79", "16 50 59, 29 79",
    ),
    "2": (
        "~12 30 60 82 74 19, 19 89", "~02 40 72 55 09, 09 99", "~12 30 60 82 75 37 28 18 27 48 89",
    ),
    "3": (
        "~11 40 71 72 44, ~44 75 87 59 18", "10 80 44, ~44 75 87 59 18",
        "~11 40 72 54 34 54 86 59 18",
    ),
    "4": (
        "69 60 06 96", "30 15 85, 70 69", "10 15 85, 73 79", "60 15 85 39", "50 15 84 49",
        "70 06 95 59", "20 25 85, 80 89", "50 05 85, 63 69", "40 16 86, 73 69",
        "~60 30 16 47 86, 64 59", "~40 25 27 56 84, ~74 66 59",
    ),
    "5": (
        "80 20 14, ~14 43 75 87 59 18", "~80 30 23 54 86 59 08", "20 14, ~14 53 86 59 18, 20 90",
    ),
    "6": (
        "~70 32 16 38 69 87 65 26", "~60 25 17 49 87 65 26", "30 16, ~16 39 69 86 54 16",
        "~80 40 15 28 69 86 54 26",
    ),
    "7": (
        "00 90 49", "10 80 49, 25 75", "02 00 90 39, 24 74", "~11 30 60 90, 90 49",
        "10 80, ~80 53 49", "02 00 80 59", "00 90, ~90 54 49, 25 85",
    ),
    "8": (
        "~82 50 22 45 77 59 27 45 72 81", "~50 31 33 54 73 71 50, ~54 26 38 59 78 76 54",
        "~71 40 22 54 86 59 26 54 72 71",
    ),
    "9": (
        "~82 50 14 46 83, 82 79", "~83 50 13 35 65 82, ~82 86 69 38 17",
        "~82 50 14 46 82, ~82 86 59 19", "~82 50 13 46 82, ~82 77 89 98", "~83 50 13 35 83, 83 59",
        "~82 50 14 46 83, ~82 87 69 49 28 37", "~71 40 21 33 72, ~72 77 59 19",
        "~61 40 22 43 62, ~62 76 68 49 18", "~72 40 22 34 72, 72 78 19",
    ),
}  # fmt: skip
# Without those that are digits in some hands: I O S Z B Q b g i j l o q s z.
LETTERS: Mapping[str, Sequence[str]] = {
    "A": ("09 50 99, 25 75", "~09 14 50 84 89, 15 85"),
    "C": ("~82 50 14 16 59 87",),
    "D": ("10 19, ~10 60 94 59 19",),
    "E": ("80 10 19 89, 14 64", "~80 30 22 44 26 38 88"),
    "F": ("80 10 19, 14 64",),
    "G": ("~82 50 14 16 59 87, 85 55, 85 88",),
    "H": ("10 19, 80 89, 15 85",),
    "J": ("70, 70 76, ~76 59 28 16",),
    "K": ("10 19, 80 15 89", "10 19, ~80 54 15, ~25 56 89"),
    "L": ("10 19 89",),
    "M": ("09 10 55 80 99",),
    "N": ("19 10 89 80",),
    "P": ("10 19, ~10 60 82 65 15",),
    "R": ("10 19, ~10 60 82 65 15, 45 89",),
    "T": ("00 90, 50 59",),
    "U": ("10 16, ~16 38 59 78 86, 86 80",),
    "V": ("00 59 90",),
    "W": ("00 29 53 79 90", "~00 28 53 78 90"),
    "X": ("00 99, 90 09",),
    "Y": ("00 54 90, 54 59",),
    "a": ("~83 53 15 28 68 84, ~83 87 99", "~24 63 84 88, ~85 45 17 39 87"),
    "d": ("~84 54 16 29 69 85, 80 89",),
    "e": ("~16 85 63 24 17 49 88",),
    "f": ("~81 50 43 49, 24 74",),
    "h": ("10 19, ~15 43 75 79",),
    "k": ("10 19, 73 16 79",),
    "m": ("03 09, ~05 23 45 49, ~45 63 95 99",),
    "n": ("13 19, ~15 43 75 79",),
    "p": ("12 19, ~14 42 84 57 16",),
    "r": ("23 29, ~26 44 73",),
    "t": ("40 47, ~46 49 78, 13 73",),
    "u": ("13 17, ~16 39 69 86, 83 89",),
    "v": ("13 59 93",),
    "w": ("03 29 55 79 93",),
    "x": ("13 89, 83 19", "~13 38 69 88, ~83 56 28 19"),
    "y": ("13 56, 83 29",),
}  # fmt: skip
SHAPES: Mapping[str, Sequence[str]] = {
    "square": ("00 90 99 09 00",),
    "rectangle": ("02 92 97 07 02", "20 70 79 29 20"),
    "triangle": ("50 99 09 50", "00 90 59 00", "00 95 09 00"),
    "heart": ("~53 30 12 25 59, ~53 70 92 85 59",),
    "diamond": ("50 95 59 05 50",),
    "star": ("59 30 96 06 70 39 59", "50 29 93 03 79 50"),
    "plus": ("50 59, 05 95",),
    "asterisk": ("50 59, 13 86, 83 16",),
    "arrow": ("05 95, 62 95 68", "59 50, 23 50 83", "09 90, 40 90 95"),
    "check": ("05 39 90", "~05 27 39 62 90"),
    "zigzag": ("00 92 04 96 08", "05 20 49 60 95"),
    "equals": ("03 93, 06 96",),
    "hash": ("30 29, 70 69, 03 93, 06 96",),
    "spiral": ("~55 65 66 46 43 73 78 28 21 91",),
    "wave": ("~05 22 45 68 95",),
    "flat": ("05 95", "~04 36 95"),
    "angle": ("90 05 99", "00 95 09"),
    "face": ("~50 84 77 59 27 14 50 63, 34 35, 64 65, ~37 58 67",),
    "house": ("09 04 50 94 99 09", "09 05 50 95 99 09 95"),
    "omega": ("~19 39 15 50 85 69 89",),
    "infinity": ("~05 23 45 67 85 93 83 65 47 25 05",),
    "door": ("20 29, 70 79, 24 74, 20 70",),
    "parallelogram": ("30 90 69 09 30", "00 60 99 39 00"),
    "kite": ("50 83 59 23 50",),
    "half": ("~05 21 50 71 95, 95 05", "~50 81 95 78 59, 59 50"),
    "quarter": ("00 09 99, ~99 63 00",),
    "bolt": ("60 16 55 39 94 54 80 60",),
    "cross": ("30 60 63 93 96 66 69 39 36 06 03 33 30",),
    "hourglass": ("10 80 19 89 10",),
    "umbrella": ("~05 21 50 71 95, 05 95, ~55 58 49 38",),
    "mushroom": ("~04 21 50 71 94, 94 04, 35 39 69 65",),
    "fork": ("50 59, ~20 23 55, ~80 83 55",),
    "stairs": ("09 06 36 33 63 60 90",),
    "comb": ("00 90, 00 09, 30 39, 60 69, 90 99",),
    "box": ("03 63 69 09 03 30 90 96 69, 63 90",),
    "cone": ("~03 30 60 93, 03 59 93 03",),
    "eye": ("~05 33 63 95 67 37 05, ~50 62 58 42 50, 54 56",),
    "clover": ("~55 23 40 55 73 90 55, ~55 46 28 55 66 88 55, 55 59",),
    "brackets": ("30 00 09 39, 60 90 99 69",),
    "percent": ("~10 22 14 02 10, ~78 96 88 99 78, 80 19",),
    "cross-hairs": ("~50 85 59 15 50 72, 50 59, 05 95",),
}  # fmt: skip
# Never trained on: what a network that has seen the others makes of shapes that it has not.
HELD_OUT_SHAPES: Mapping[str, Sequence[str]] = {
    "pentagon": ("50 94 79 29 04 50",),
    "crescent": ("~60 24 26 69 45 43 60",),
    "trapezoid": ("20 70 99 09 20",),
    "envelope": ("01 91 98 08 01 55 91",),
    "flag": ("10 19, 10 82 14",),
    "cup": ("10 29 69 80, ~82 95 66",),
    "tree": ("50 94 04 50, 54 59",),
    "ladder": ("20 29, 70 79, 22 72, 25 75, 28 78",),
    "fish": ("~95 62 25 68 95, 25 02 08 25",),
    "note": ("~48 27 09 28 48, 48 40 73",),
    "bow": ("00 99 90 09 00",),
    "anchor": ("50 59, ~05 28 59 88 95, 32 72",),
}  # fmt: skip
# Of these shapes, the share that is filled.
CLOSED = frozenset({"square", "rectangle", "triangle", "heart", "diamond", "star"})
FILLED = 0.3

CANVAS = 64
# In shares of the sign's height.
PEN = (0.05, 0.2)
JITTER = 0.03
SLANT, TURN = 0.35, math.radians(10)
WIDTH = (0.5, 1.15)
# How often the pen has a broad edge, and how broad it is, in pens.
BROAD, BROADEST = 0.3, 2.5


def draw(
    signs: Mapping[str, Sequence[str]], count: int, rng: np.random.Generator
) -> tuple[Images, list[str]]:
    """Writes signs, each as often as the others.

    Args:
        signs: Ways to write each, as the module says.
        count: How many.
        rng: Decides everything.

    Returns:
        uint8[count, 28, 28] in the network's form, ink 255 on 0; and the name of each.
    """
    names = [list(signs)[number % len(signs)] for number in range(count)]
    images = [_written(signs[name], rng, closed=name in CLOSED) for name in names]
    return np.stack(images) if images else np.empty((0, 28, 28), np.uint8), names


def _written(ways: Sequence[str], rng: np.random.Generator, *, closed: bool) -> Images:
    strokes = _hand(
        [_points(stroke) for stroke in ways[int(rng.integers(len(ways)))].split(", ")], rng
    )
    picture = Image.new("L", (CANVAS, CANVAS), 0)
    brush = ImageDraw.Draw(picture)
    height = max(np.ptp(np.concatenate(strokes), axis=0).max(), 1.0)
    pen = rng.uniform(*PEN) * height
    nib, edge = rng.uniform(0, math.pi), 0.0
    if rng.random() < BROAD:
        edge = pen * rng.uniform(0.5, BROADEST - 1)
    for offset in np.linspace(-edge / 2, edge / 2, 1 + math.ceil(edge)):
        moved = offset * np.array([math.cos(nib), math.sin(nib)])
        for stroke in strokes:
            _line(brush, stroke + moved, pen)
    if closed and rng.random() < FILLED:
        brush.polygon([(x, y) for x, y in strokes[0]], fill=255)
    ink = np.asarray(picture, np.float32)
    return formed(ink, box_of(ink))[0]


def _points(stroke: str) -> Points:
    """What a text says, with y downwards, on the square from -0.5 to 0.5."""
    points: Points
    points = np.array([[int(p[0]), int(p[1])] for p in stroke.removeprefix("~").split()]) / 9 - 0.5
    if not stroke.startswith("~") or len(points) < 3:
        return points
    # Catmull-Rom: a cubic between neighbours, its slope there that of the chord beside.
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    spans = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
               + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False)
    ]  # fmt: skip
    return np.concatenate([*spans, points[-1:]])


def _hand(strokes: list[Points], rng: np.random.Generator) -> list[Points]:
    """The strokes as one hand writes them: narrow or wide, slanted, turned, not quite true."""
    slant, angle, width = rng.uniform(-SLANT, SLANT), rng.uniform(-TURN, TURN), rng.uniform(*WIDTH)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    matrix = np.array([[width, 0], [-slant * width, 1]]) @ turn
    # A smooth bend of the whole sign, the same for points that lie together.
    bend = rng.normal(0, JITTER, (2, 3, 3))
    return [_bent(stroke, bend) @ matrix * (CANVAS * 0.6) + CANVAS / 2 for stroke in strokes]


def _bent(stroke: Points, bend: npt.NDArray[np.float64]) -> Points:
    waves = np.stack([np.ones(len(stroke)), *np.sin(math.pi * stroke.T)])
    bent: Points = stroke + np.stack(
        [((axis @ waves) * waves).sum(axis=0) for axis in bend], axis=1
    )
    return bent


def _line(brush: ImageDraw.ImageDraw, stroke: Points, pen: float) -> None:
    brush.line([(x, y) for x, y in stroke], fill=255, width=max(1, round(pen)), joint="curve")
    for x, y in (stroke[0], stroke[-1]):
        brush.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
