"""Images that are no digit, for the output that says so: letters, shapes, several digits, paper.

All are made here from a seed, with the fonts that matplotlib brings; nothing is downloaded. They
come in the network's form, as ``digits.images`` would bring a picture of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from digits.form import box_of, formed
from digits.images import examine_grey
from training.strokes import HELD_OUT_SHAPES, LETTERS, SHAPES, draw

Images = npt.NDArray[np.uint8]
Maker = Callable[[np.random.Generator], Images]

# Of matplotlib's fonts. Some are never trained on.
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmmi10", "cmb10", "cmti10",
)  # fmt: skip
HELD_OUT_FONTS = (
    "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "STIXGeneralBolIta",
)  # fmt: skip
# The others are digits in some hands.
FONT_LETTERS = "ACDEFGHJKLMNPRTUVWXYabdefhkmnprtuvwxy&@?#%$"
CANVAS, FONT_SIZE = 96, (36, 60)
SIDE, BOX = 28, 20
# What each kind contributes.
SHARES = {
    "font": 0.28, "letters": 0.22, "shapes": 0.16, "scribbles": 0.12, "several": 0.1, "paper": 0.12,
}  # fmt: skip


def make(count: int, digits: Images, rng: np.random.Generator) -> Images:
    """Images that are no digit.

    Args:
        count: How many.
        digits: uint8[N, 28, 28], of which pictures of several digits are made.
        rng: Decides everything.

    Returns:
        uint8[count, 28, 28], ink 255 on 0.
    """
    numbers = {kind: round(count * share) for kind, share in SHARES.items()}
    numbers["paper"] += count - sum(numbers.values())
    kinds = [draw(LETTERS, numbers["letters"], rng)[0], draw(SHAPES, numbers["shapes"], rng)[0]]
    makers: dict[str, Maker] = {
        "font": partial(letter, fonts=_fonts(FONTS)),
        "scribbles": _scribble,
        "several": partial(_several, digits),
        "paper": _paper,
    }
    kinds += [_made(maker, numbers[kind], rng) for kind, maker in makers.items()]
    return np.concatenate(kinds)


def held_out(count: int, digits: Images, rng: np.random.Generator) -> dict[str, Images]:
    """What is never trained on, uint8[count, 28, 28] of each kind; arguments as of ``make``."""
    return {
        "letters of other fonts": _made(partial(letter, fonts=_fonts(HELD_OUT_FONTS)), count, rng),
        "other shapes": draw(HELD_OUT_SHAPES, count, rng)[0],
        "several digits": _made(partial(_several, digits), count, rng),
        "paper": _made(_paper, count, rng),
    }


def _fonts(names: Sequence[str]) -> list[Path]:
    folder = Path(mpl.get_data_path(), "fonts/ttf")
    return [folder / f"{name}.ttf" for name in names]


def _made(maker: Maker, count: int, rng: np.random.Generator) -> Images:
    return (
        np.stack([maker(rng) for _ in range(count)])
        if count
        else np.empty((0, SIDE, SIDE), np.uint8)
    )


def letter(rng: np.random.Generator, fonts: list[Path]) -> Images:
    """A letter or sign of a font, narrow or wide and slanted."""
    font = ImageFont.truetype(fonts[rng.integers(len(fonts))], int(rng.integers(*FONT_SIZE)))
    picture = Image.new("L", (CANVAS, CANVAS), 0)
    text = FONT_LETTERS[rng.integers(len(FONT_LETTERS))]
    ImageDraw.Draw(picture).text((CANVAS / 2, CANVAS / 2), text, 255, font, anchor="mm")
    width, slant = rng.uniform(0.8, 1.6), rng.uniform(-0.4, 0.4)
    matrix = (width, slant, CANVAS / 2 * (1 - width - slant), 0, 1, 0)
    slanted = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    ink = np.asarray(slanted, np.float32)
    return formed(ink, box_of(ink))[0]


def _scribble(rng: np.random.Generator) -> Images:
    """Any closed figure of straight lines, or a long curve to and fro."""
    closed = rng.random() < 0.5
    points = [f"{x}{y}" for x, y in rng.integers(0, 10, (rng.integers(3, 7), 2))]
    if closed:
        text = " ".join([*points, points[0]])
    else:
        text = "~" + " ".join(points + [f"{x}{y}" for x, y in rng.integers(0, 10, (4, 2))])
    image: Images = draw({"scribble": (text,)}, 1, rng)[0][0]
    return image


def _several(digits: Images, rng: np.random.Generator) -> Images:
    """Two or three digits side by side, some of them touching, or one with a small one beside."""
    parts = [_trimmed(digits[rng.integers(len(digits))]) for _ in range(rng.integers(2, 4))]
    if len(parts) == 2 and rng.random() < 0.3:  # an exponent
        parts[1] = parts[1].reduce(2)
    width = sum(part.width for part in parts)
    row = Image.new("L", (width + 4, max(part.height for part in parts)), 0)
    left = 0
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width + int(rng.integers(-2, 3))
    row = row.crop((0, 0, max(left, 1), row.height))
    scale = BOX / max(row.size)
    size = max(1, round(row.width * scale)), max(1, round(row.height * scale))
    field = Image.new("L", (SIDE, SIDE), 0)
    field.paste(
        row.resize(size, Image.Resampling.BOX), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
    )
    return np.asarray(field)


def _trimmed(digit: Images) -> Image.Image:
    picture = Image.fromarray(digit)
    return picture.crop(picture.getbbox())


def _paper(rng: np.random.Generator) -> Images:
    """Paper without a digit: noise, smooth clouds, a shadow, rules, or next to nothing."""
    rows, columns = np.mgrid[-1:1:56j, -1:1:56j]
    kind = rng.integers(5)
    if kind == 0:
        return np.asarray(rng.normal(rng.uniform(0, 160), rng.uniform(2, 80), (SIDE, SIDE))
                          .clip(0, 255).astype(np.uint8))  # fmt: skip
    if kind == 1:
        small = Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8))
        clouds = np.asarray(small.resize((56, 56), Image.Resampling.BICUBIC), float)
        grey = 255 * (clouds > 128) if rng.random() < 0.5 else clouds
    elif kind == 2:
        angle, softness = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.5)
        across = (
            rows * np.sin(angle) + columns * np.cos(angle) - rng.uniform(-0.7, 0.7)
        ) / softness
        grey = 235 - rng.uniform(30, 170) / (1 + np.exp(-4 * across))
    elif kind == 3:
        step = rng.integers(7, 28)
        grey = np.full((56, 56), 240.0)
        grey[rng.integers(step) :: step] -= rng.uniform(30, 200)
        if rng.random() < 0.5:
            grey[:, rng.integers(step) :: step] -= rng.uniform(30, 200)
    else:
        grey = np.full((56, 56), 240.0)
        for _ in range(rng.integers(1, 5)):
            distance = np.hypot(rows - rng.uniform(-1, 1), columns - rng.uniform(-1, 1))
            grey -= rng.uniform(50, 200) * (distance < rng.uniform(0.02, 0.5))
    noisy = grey + rng.normal(0, rng.uniform(0, 8), grey.shape)
    return examine_grey(noisy.clip(0, 255).astype(np.uint8)).pixels
