"""Brings any picture of a digit to the form that the network was trained on: see ``form.py``.

    picture -> grey -> thresholding -> connected components -> 20x20, usual strokes -> 28x28

A picture has several readings, which differ in how they tell ink from paper. The first is by a
global threshold, for clean pictures; the others by local contrast, for shadows, lines, and what
lies around the paper. Needs numpy and OpenCV, and Pillow for anything but grey arrays. The server
uses this module as it is, and has the network choose between readings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from digits import ink as inks
from digits.form import SIDE, Box, Pixels, formed, holes, is_formed
from digits.formats import PictureError as PictureError  # noqa: PLC0414 - it is public here
from digits.formats import levels
from digits.ink import Grey, Ink, border_of
from digits.parts import CORE, Part, parts

# Pictures are thresholded at so many pixels a side, by local contrast at more; where ink has fewer
# than the third number, it is cut out and looked at closer, so that each pixel of the box is made
# from two or more.
WORK_SIDE, LOCAL_SIDE = 72, 160
MIN_INK_SIDE = 36
MAX_LOOKS = 3
# What fills this share of the picture is a sheet; its border of so many pixels is cut off.
SHEET_SHARE, SHEET_INSET = 0.5, 2
# Local contrast is measured for strokes thinner than these shares of the picture's longer side:
# the thinnest are thinner than a finger's shadow.
FINE, MEDIUM, BROAD = 0.04, 0.07, 0.15
# The order of readings by local contrast, and their thresholds as shares of the strongest ink: the
# low one keeps strokes that fade in glare, the high one leaves out printed lines.
LOW, MIDDLE, HIGH = 0.2, 0.4, 0.65
LOCAL = ((FINE, LOW), (MEDIUM, MIDDLE), (BROAD, LOW), (BROAD, HIGH))
# Lines have this share of the picture's side.
LINE = 0.6
# The first reading is taken at this score, if it is of all the ink. Others are looked for until two
# of the same digit have the second one; one with which no other agrees keeps this share of its own.
SURE, AGREED, DOUBT = 0.5, 0.8, 0.3
# Without a network, the first reading at least this plausible is taken.
PLAUSIBLE = 0.5
MOST_HOLES = 2
# What ends at the picture's border is cut off, unless its box fills this share of the picture.
FILLED = 0.6
# Shares of the plausibility that are kept by what encloses another digit or has more holes than an
# 8; by what ends at the border; and by what covers less than the last share of it, as digits do now
# and then.
ENCLOSING, CUT_OFF, TOUCHED, TOUCH = 0.3, 0.35, 0.8, 0.05

# Where a shape stops being a digit's, and where it surely is none: area of the second largest
# component over the largest one's; width over height; stroke width in pixels of the box; contrast
# over noise. The first is beyond 999 of 1,000 training digits in every presentation of the docs.
SECOND_PART = (0.3, 0.6)
ASPECT = (1.7, 2.2)
STROKE = (6.5, 9.0)
CLARITY = (10.0, 5.0)


@dataclass(frozen=True)
class Normalised:
    """A picture in the network's form.

    Attributes:
        pixels: uint8[28, 28], 0 = background, 255 = ink; all 0 when there is no ink.
        plausibility: How far the shape of the ink can be one digit's, 0 to 1; 0 for no ink. What
            the network thinks is not part of it.
        whole: Whether there is next to nothing else in the picture that could be ink.
        alone: Whether there is nothing else in the picture that could be ink.
    """

    pixels: Pixels
    plausibility: float
    whole: bool = False
    alone: bool = False


# Tells the digit and a score of 0 to 1.
Judge = Callable[[Normalised], tuple[int, float]]


def by_shape(reading: Normalised) -> tuple[int, float]:
    """The judge of who has no network: the digit is unknown."""
    return 0, 1.0 if reading.plausibility >= PLAUSIBLE else reading.plausibility


BLANK = Normalised(np.zeros((SIDE, SIDE), np.uint8), 0.0)
Finder = Callable[[Grey], Ink]


def normalise(picture: Any) -> Pixels:
    """Brings a picture to the form that ``DigitClient.classify`` takes: uint8[28, 28].

    Args:
        picture: See ``examine``.

    Raises:
        PictureError: If it is no picture that can be read.
        OSError: If the file can not be read.
    """
    return examine(picture).pixels


def examine(picture: Any) -> Normalised:
    """Brings a picture to the network's form, and tells whether its shape can be a digit's.

    Args:
        picture: A path; the bytes of a PNG, JPEG, WebP or BMP file; a PIL image; or an array of
            grey values [h, w] or colours [h, w, 3 or 4], uint8, uint16, bool, or float of 0 to 1 or
            0 to 255.
            Dark on light or light on dark, of any size.

    Raises:
        PictureError: If it is no picture that can be read.
        OSError: If the file can not be read.
    """
    return examine_grey(grey_of(picture))


def grey_of(picture: Any) -> npt.NDArray[Any]:
    """The grey levels [h, w] of a picture; see ``examine``."""
    if isinstance(picture, np.ndarray) and picture.ndim == 2:
        return levels(picture)
    # Here, because grey arrays need no Pillow.
    from digits import files  # noqa: PLC0415

    if isinstance(picture, (str, Path)):
        picture = Path(picture).read_bytes()
    if isinstance(picture, (bytes, bytearray, memoryview)):
        with files.opened(bytes(picture)) as image:
            return files.grey(image)
    return files.grey(files.as_image(picture))


def examine_grey(grey: npt.NDArray[Any], judge: Judge = by_shape) -> Normalised:
    """``examine`` for grey levels [h, w], 0 to 255 of any type, at least one pixel.

    Args:
        grey: The picture.
        judge: Predicts digit and score of a reading; the server passes the network.
    """
    seen: list[tuple[float, int, Normalised]] = []
    for reading in readings(grey):
        if reading.alone:
            return reading
        digit, score = judge(reading)
        if not seen and reading.whole and score >= SURE:
            return reading
        seen.append((score, digit, reading))
        agreeing = sorted((one for one in seen if one[1] == digit), key=itemgetter(0), reverse=True)
        if len(agreeing) > 1 and agreeing[1][0] >= AGREED:
            return agreeing[0][2]
    if not seen:
        return BLANK
    total = {
        digit: sum(score for score, other, _ in seen if other == digit) for _, digit, _ in seen
    }
    digit = max(total, key=lambda one: total[one])
    score, _, best = max((one for one in seen if one[1] == digit), key=itemgetter(0))
    if best is not seen[0][2]:
        others = min(1.0, total[digit] - score)
        best = replace(best, plausibility=best.plausibility * (DOUBT + (1 - DOUBT) * others))
    return best


def readings(grey: npt.NDArray[Any]) -> Iterator[Normalised]:
    """Ways to see a picture, the usual ones first; each is made when it is asked for."""
    if grey.dtype != np.uint8:
        grey = np.rint(np.clip(grey, 0, 255)).astype(np.uint8)
    yield from _read(grey, inks.on_paper, WORK_SIDE)
    for share, threshold in LOCAL:
        find = partial(inks.by_local_contrast, stroke=share, threshold=threshold)
        yield from _read(grey, find, LOCAL_SIDE)
    small = inks.shrunk(grey, LOCAL_SIDE)
    sheet = inks.sheet(small)
    if sheet is not None:
        find = partial(inks.by_local_contrast, stroke=BROAD, threshold=LOW)
        yield from _read(sheet, find, LOCAL_SIDE)
    ink = inks.by_local_contrast(small, BROAD, MIDDLE, without_lines=LINE)
    yield from (_in_form(ink, part) for part in parts(ink))


def _read(grey: Grey, find: Finder, side: int) -> Iterator[Normalised]:
    """Readings by one way to find ink, which is cut out and looked at closer where it is small."""
    for look in range(MAX_LOOKS):
        small = inks.shrunk(grey, side)
        ink = find(small)
        found = parts(ink)
        if not found:
            return
        top, bottom, left, right = found[0].box
        longer, factor = max(bottom - top, right - left), math.ceil(max(grey.shape) / side)
        if look == 0 and found[0].framed and _is_sheet(found[0].values, ink.contrast):
            margin = -SHEET_INSET
        elif factor == 1 or longer >= MIN_INK_SIDE:
            break
        else:
            margin = longer // 2 + 2
        rows = slice(max(0, top - margin) * factor, (bottom + margin) * factor)
        columns = slice(max(0, left - margin) * factor, (right + margin) * factor)
        if not grey[rows, columns].size:
            break
        grey = grey[rows, columns]
    for part in found:
        yield _in_form(ink, part)


def _is_sheet(values: npt.NDArray[Any], contrast: float) -> bool:
    """True of ink that fills most of the picture: paper in a frame, with the digit on it."""
    return float((values > contrast / 2).mean()) > SHEET_SHARE


def _in_form(ink: Ink, part: Part) -> Normalised:
    top, bottom, left, right = part.box
    side = max(bottom - top, right - left)
    pixels, stroke = formed(part.values, part.box)
    aspect = (right - left) / (bottom - top)
    plausibility = _plausibility(part.second, aspect, stroke, ink.contrast / (ink.noise + 1))
    clean = not ink.local and ink.residual.shape == (SIDE, SIDE) and ink.noise == 0
    is_ready = clean and is_formed(np.maximum(ink.residual, 0), side)
    if is_ready:
        pixels = np.rint(np.clip(ink.residual, 0, 255)).astype(np.uint8)
    elif part.encloses or holes(pixels) > MOST_HOLES:
        plausibility *= ENCLOSING
    elif _is_cut_off(part.box, part.values.shape):
        ends = border_of(part.values) > CORE * part.values.max()
        plausibility *= CUT_OFF if ends.mean() > TOUCH else TOUCHED
    # Several digits, and nothing else: another reading would find one of them.
    several = part.alone and part.second > SECOND_PART[0]
    single = part.alone and part.second == 0
    alone = is_ready or several or part.thing or (single and plausibility == 1)
    return Normalised(pixels, plausibility, part.whole, alone)


def _is_cut_off(box: Box, shape: tuple[int, ...]) -> bool:
    """True of what ends at the picture's border, without filling the picture."""
    top, bottom, left, right = box
    at_edge = min(top, left) == 0 or bottom == shape[0] or right == shape[1]
    return at_edge and (bottom - top) * (right - left) < FILLED * shape[0] * shape[1]


def _plausibility(second: float, aspect: float, stroke: float, clarity: float) -> float:
    """The product of how far each measure is from where no digit is, 1 where digits are."""
    product = 1.0
    for value, (good, bad) in (
        (second, SECOND_PART),
        (aspect, ASPECT),
        (stroke, STROKE),
        (clarity, CLARITY),
    ):
        product *= min(1.0, max(0.0, (bad - value) / (bad - good)))
    return product
