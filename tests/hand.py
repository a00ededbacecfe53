"""Draws the digits in tests/samples/hand: strokes in another hand than MNIST's writers'.

    python -m tests.hand

A 1 with a long flag and a foot, a 7 with a bar, a 4 like lightning, a 9 with a flourish, and so on:
each a few curves, written with pens of different width and slant. The same seed draws the same
files. They are this project's own, under its licence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "samples/hand"
EACH = 25
SIDE, SCALE = 56, 4
PAPER, INK = 245, 25

Stroke = Sequence[tuple[float, float]]


def arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> Stroke:
    """Points of an ellipse, clockwise from ``begin`` to ``end`` degrees; 0 is to the right."""
    angles = np.radians(np.linspace(begin, end, 24))
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


# On a square from 0 to 1, y downwards; two ways to write each.
SHAPES: dict[int, tuple[Sequence[Stroke], Sequence[Stroke]]] = {
    0: ([arc(0.5, 0.5, 0.28, 0.42, -90, 270)], [arc(0.5, 0.5, 0.22, 0.42, -60, 330)]),
    1: (
        [[(0.12, 0.64), (0.58, 0.06), (0.55, 0.94)]],
        [[(0.3, 0.4), (0.55, 0.08), (0.55, 0.92)], [(0.3, 0.92), (0.8, 0.92)]],
    ),
    2: (
        [[*arc(0.5, 0.3, 0.26, 0.22, -170, 30), (0.22, 0.9), (0.8, 0.9)]],
        [
            [
                *arc(0.48, 0.3, 0.24, 0.22, -160, 40),
                *arc(0.32, 0.82, 0.12, 0.1, 0, -270),
                (0.8, 0.92),
            ]
        ],
    ),
    3: (
        [[*arc(0.46, 0.29, 0.25, 0.2, -160, 80), *arc(0.46, 0.7, 0.28, 0.21, -80, 160)]],
        [[(0.24, 0.1), (0.74, 0.1), (0.46, 0.42), *arc(0.46, 0.68, 0.26, 0.24, -80, 150)]],
    ),
    4: (
        [[(0.6, 0.08), (0.22, 0.62), (0.82, 0.62)], [(0.62, 0.4), (0.62, 0.94)]],
        [[(0.5, 0.06), (0.2, 0.56), (0.78, 0.5), (0.46, 0.94)]],
    ),
    5: (
        [[(0.74, 0.1), (0.34, 0.1), (0.3, 0.46), *arc(0.47, 0.66, 0.26, 0.24, -130, 150)]],
        [
            [(0.34, 0.12), (0.3, 0.46), *arc(0.47, 0.66, 0.26, 0.24, -130, 140)],
            [(0.34, 0.12), (0.8, 0.08)],
        ],
    ),
    6: (
        [[(0.66, 0.08), (0.4, 0.34), *arc(0.5, 0.68, 0.23, 0.22, 190, 550)]],
        [[*arc(0.62, 0.5, 0.34, 0.42, -100, -180), *arc(0.5, 0.7, 0.22, 0.2, 180, 520)]],
    ),
    7: (
        [[(0.2, 0.12), (0.8, 0.12), (0.42, 0.92)], [(0.36, 0.52), (0.74, 0.48)]],
        [[(0.22, 0.22), (0.24, 0.1), (0.8, 0.12), (0.46, 0.92)]],
    ),
    8: (
        [[*arc(0.5, 0.3, 0.2, 0.2, 90, 450), *arc(0.5, 0.7, 0.24, 0.21, -90, 270)]],
        [
            [
                *arc(0.52, 0.28, 0.18, 0.18, 60, -250),
                *arc(0.48, 0.7, 0.22, 0.22, -60, 250),
                (0.62, 0.42),
            ]
        ],
    ),
    9: (
        [[*arc(0.48, 0.32, 0.22, 0.22, 0, -360), (0.7, 0.32), *arc(0.44, 0.7, 0.24, 0.22, 0, 140)]],
        [[*arc(0.48, 0.3, 0.22, 0.2, 0, -360), (0.7, 0.3), (0.6, 0.94)]],
    ),
}


def draw(digit: int, rng: np.random.Generator) -> Image.Image:
    """One digit as a person might write it, dark on light."""
    strokes = SHAPES[digit][int(rng.integers(2))]
    slant, turn = rng.normal(0.12, 0.12), rng.normal(0, 0.06)
    wide, high = rng.uniform(0.75, 1.1), rng.uniform(0.85, 1.05)
    pen = rng.uniform(0.045, 0.11) * SIDE * SCALE
    image = Image.new("L", (SIDE * SCALE, SIDE * SCALE), PAPER)
    pencil = ImageDraw.Draw(image)
    for stroke in strokes:
        points = np.array(stroke) - 0.5
        points += rng.normal(0, 0.012, points.shape)
        points[:, 0] = wide * points[:, 0] - slant * points[:, 1]
        points[:, 1] *= high
        points @= np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        pixels = [tuple(p) for p in ((0.5 + 0.8 * points) * SIDE * SCALE).tolist()]
        pencil.line(pixels, INK, round(pen), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            pencil.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), INK)
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small.quantize(16)


def main() -> None:
    """Writes every file."""
    rng = np.random.default_rng(7)
    for digit in SHAPES:
        folder = FOLDER / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            draw(digit, rng).save(folder / f"{number:02}.png", optimize=True)


if __name__ == "__main__":
    main()
