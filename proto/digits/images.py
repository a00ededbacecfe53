"""Brings any picture of a digit to the form that the network was trained on.

That is MNIST's: ink is 255 on a background of 0; the digit is fitted into a box of 20x20 pixels
with its proportions kept and its edges smooth; the box lies in a field of 28x28 pixels so that the
centre of mass is at the centre. Source: LeCun, Cortes and Burges, The MNIST database of handwritten
digits (yann.lecun.com/exdb/mnist). In its 60,000 training digits the longer side of what is not 0
has 20 pixels (59,987 of them), and the centre of mass is at (14, 14) to within half a pixel.

    picture -> grey -> ink, without paper -> its parts -> closer, if it is small -> 20x20 -> strokes

Needs numpy, and Pillow for anything but grey arrays. The server uses this module as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from digits.ink import Ink, Mask, Values, choose_parts, find_ink, find_parts, keep_parts, resample

SIDE = 28
BOX = 20
# Index of the centre of mass.
CENTRE = 14.0

# Pictures are examined with at most so many pixels a side; ink that has fewer than the second
# number of them is looked at closer, so that each pixel of the box is made from two or more.
WORK_SIDE = 72
MIN_INK_SIDE = 36
MAX_LOOKS = 3
# What fills this share of its box, and has this share of the picture without touching its edge, is
# no ink but a sheet of paper, or what a frame encloses; the digit is on it, further inside than
# so many pixels.
SHEET_FILL = 0.75
SHEET_SHARE = 0.66
SOLID_SHARE = 0.5
SHEET_INSET = 2
# Less contrast than this, of 255, is no ink.
MIN_CONTRAST = 6.0
# The box goes around what has this share of the strongest ink.
BOX_SHARE = 0.1
# This share of the pixels that are ink for sure (above the second share) is lighter than what
# becomes 255; it is 253 in the median digit of MNIST.
CORE_RANK = 0.9
CORE_SHARE = 0.2
# Strokes thinner or thicker than this, in pixels of the box, are brought to it. The second was
# chosen on training digits, the first see docs/images.md; 90 of 100 of MNIST's are between 2.2 and
# 3.8. What erosion leaves less than this share of was hatched or dithered, not thick.
THIN, THICK = 2.6, 3.2
HATCHED_SHARE = 0.25
# A picture of 28x28 that has this form already is left alone.
FORMED_SIDES = (18, 20)
FORMED_OFFSET = 1.0

# Where a shape stops being a digit's, and where it surely is none: of the second largest part, its
# area over the largest one's; width over height; stroke width in pixels of the box; contrast over
# noise. The first is beyond 999 of 1,000 training digits in every presentation of docs/images.md.
SECOND_PART = (0.3, 0.6)
ASPECT = (1.7, 2.2)
STROKE = (6.5, 9.0)
CLARITY = (10.0, 5.0)

Pixels = npt.NDArray[np.uint8]


class PictureError(ValueError):
    """Something that is no picture, or none that is taken.

    Attributes:
        expected: What would have been.
        got: What came.
    """

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)  # what it is made from again by pickle
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"picture: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Normalised:
    """A picture in the network's form.

    Attributes:
        pixels: uint8[28, 28], 0 = background, 255 = ink; all 0 when there is no ink.
        plausibility: How far the shape of the ink can be one digit's, 0 to 1; 0 for no ink. What
            the network thinks is not part of it.
    """

    pixels: Pixels
    plausibility: float


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
            grey values [h, w] or colours [h, w, 3 or 4], uint8, uint16, bool, or float of 0 to 1.
            Dark on light or light on dark, of any size.

    Raises:
        PictureError: If it is no picture that can be read.
        OSError: If the file can not be read.
    """
    if isinstance(picture, np.ndarray) and picture.ndim == 2:
        return examine_grey(levels(picture))
    # Here, because grey arrays need no Pillow.
    from digits import files  # noqa: PLC0415

    if isinstance(picture, (str, Path)):
        picture = Path(picture).read_bytes()
    if isinstance(picture, (bytes, bytearray, memoryview)):
        with files.opened(bytes(picture)) as image:
            levels_of_file = files.grey(image)
        return examine_grey(levels_of_file)
    return examine_grey(files.grey(files.as_image(picture)))


def examine_grey(grey: npt.NDArray[Any]) -> Normalised:
    """``examine`` for grey levels [h, w], 0 to 255 of any type, at least one pixel."""
    for look in range(MAX_LOOKS):
        factor = math.ceil(max(grey.shape) / WORK_SIDE)
        ink = find_ink(_shrink(grey, factor))
        values, second = _main_parts(ink)
        if ink.contrast < MIN_CONTRAST or not values.any():
            return Normalised(np.zeros((SIDE, SIDE), np.uint8), 0.0)
        top, bottom, left, right = box = _box(values)
        side = max(bottom - top, right - left)
        if look == 0 and _is_sheet(values, box):
            margin = -SHEET_INSET
        elif factor == 1 or side >= MIN_INK_SIDE:
            break
        else:
            margin = side // 2 + 2
        rows = slice(max(0, top - margin) * factor, (bottom + margin) * factor)
        columns = slice(max(0, left - margin) * factor, (right + margin) * factor)
        grey = grey[rows, columns]
    drawn = _fit(values, box)
    stroke = _stroke_width(drawn)
    aspect = (right - left) / (bottom - top)
    plausibility = _plausibility(second, aspect, stroke, ink.contrast / (ink.noise + 1))
    if grey.shape == (SIDE, SIDE) and ink.noise == 0 and _is_formed(ink, side):
        return Normalised(np.rint(np.clip(ink.apart, 0, 255)).astype(np.uint8), plausibility)
    excess = min(0.0, stroke - THIN) + max(0.0, stroke - THICK)
    if excess and side >= BOX:  # of fewer pixels the edges are too soft to tell
        usual = _widened(values, -excess / 2 * side / BOX)
        if usual.sum() >= HATCHED_SHARE * values.sum():
            drawn = _fit(usual, _box(usual))
    return Normalised(_centred(drawn), plausibility)


def _shrink(grey: npt.NDArray[Any], factor: int) -> Values:
    """Means of factor x factor pixels; what is left over at the right and bottom is dropped."""
    if factor == 1:
        return grey.astype(np.float32)
    height, width = (max(1, side // factor) * factor for side in grey.shape)
    grey = grey[:height, :width]
    rows = grey[::factor].astype(np.float32)
    for offset in range(1, min(factor, len(grey))):
        rows += grey[offset::factor]
    columns = rows[:, ::factor].copy()
    for offset in range(1, min(factor, grey.shape[1])):
        columns += rows[:, offset::factor]
    columns *= np.float32(1 / (min(factor, grey.shape[0]) * min(factor, grey.shape[1])))
    return columns


def levels(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Grey values [h, w] of any type as levels of 0 to 255, of uint8 or float32.

    Values of more than 8 bits fill the bits that the largest of them needs: scanners write 10 or 12
    bits into 16.

    Raises:
        PictureError: If there are none, they are of another type, or not finite.
    """
    if not array.size:
        raise PictureError("at least one pixel", f"an array of shape {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iu":
        bits = max(8, int(array.max()).bit_length())
        scaled: Values = np.maximum(array, 0).astype(np.float32) * np.float32(255 / (2**bits - 1))
        return scaled
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise PictureError("uint8, uint16, bool, or finite floats of 0 to 1", str(array.dtype))
    shades: Values = np.clip(array, 0, 1).astype(np.float32) * np.float32(255)
    return shades


def _main_parts(ink: Ink) -> tuple[Values, float]:
    """The ink of the digit alone, and the area of its second largest part over the largest's."""
    if not ink.found.any():
        return ink.values, 0.0
    parts = find_parts(ink.found)
    if len(parts.area) == 1:
        return ink.values, 0.0
    chosen = choose_parts(parts, ink.values.shape)
    areas = np.sort(parts.area[chosen])
    second = float(areas[-2] / areas[-1]) if len(areas) > 1 else 0.0
    return keep_parts(ink.values, parts, chosen), second


def _box(values: Values) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the ink; bottom and right are one further."""
    ink: Mask = values > BOX_SHARE * float(values.max())
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _is_sheet(values: Values, box: tuple[int, int, int, int]) -> bool:
    top, bottom, left, right = box
    height, width = values.shape
    area = (bottom - top) * (right - left)
    if not (top and left and bottom < height and right < width) or area < SHEET_SHARE * values.size:
        return False
    return int((values > SOLID_SHARE).sum()) >= SHEET_FILL * area


def _fit(values: Values, box: tuple[int, int, int, int]) -> Values:
    """What is in the box, its longer side 20 pixels, in the middle of a field of 28x28; 0 to 1."""
    height, width = box[1] - box[0], box[3] - box[2]
    scale = BOX / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    drawn = np.maximum(resample(values, box, shape), 0)
    ordered = np.sort(drawn, axis=None)
    ordered = ordered[np.searchsorted(ordered, CORE_SHARE * ordered[-1]) :]
    drawn *= 1 / ordered[int(len(ordered) * CORE_RANK)]
    field = np.zeros((SIDE, SIDE), np.float32)
    top, left = (SIDE - shape[0]) // 2, (SIDE - shape[1]) // 2
    field[top : top + shape[0], left : left + shape[1]] = np.minimum(drawn, 1)
    return field


def _stroke_width(field: Values) -> float:
    """Mean width of the strokes in pixels: twice their area over the length of their outline.

    The outline's length is the total variation: the sum of the gradient's length.
    """
    across = field[1:-1, 2:] - field[1:-1, :-2]
    down = field[2:, 1:-1] - field[:-2, 1:-1]
    return float(4 * field.sum() / np.sqrt(across * across + down * down).sum())


def _widened(values: Values, radius: float) -> Values:
    """Grey-level dilation by a radius in pixels, or erosion where it is negative; one field larger.

    Crosses and squares in turn make an octagon; the last step is blended, being less than a pixel.
    Source: Serra 1982, Image Analysis and Mathematical Morphology.
    """
    spread, radius = (np.maximum, radius) if radius > 0 else (np.minimum, -radius)
    steps = math.ceil(radius)
    height, width = values.shape
    wide = np.zeros((height + 2 * steps, width + 2 * steps), np.float32)
    wide[steps : steps + height, steps : steps + width] = values
    for step in range(steps):
        down = wide.copy()
        spread(down[1:], wide[:-1], out=down[1:])
        spread(down[:-1], wide[1:], out=down[:-1])
        both = down.copy()
        source = down if step % 2 else wide
        spread(both[:, 1:], source[:, :-1], out=both[:, 1:])
        spread(both[:, :-1], source[:, 1:], out=both[:, :-1])
        wide += (both - wide) * np.float32(min(1.0, radius - step))
    return wide


def _centre_of_mass(field: Values) -> tuple[float, float]:
    rows, columns = field.sum(axis=1), field.sum(axis=0)
    places = np.arange(SIDE, dtype=np.float32)
    total = float(rows.sum())
    return float(rows @ places) / total, float(columns @ places) / total


def _centred(field: Values) -> Pixels:
    """Moves the centre of mass to the centre by whole pixels, as far as no ink leaves the field."""
    places = []
    for axis, centre in enumerate(_centre_of_mass(field)):
        inked = np.flatnonzero(field.any(axis=1 - axis))
        first, after = int(inked[0]), int(inked[-1]) + 1
        shift = max(-first, min(SIDE - after, round(CENTRE - centre)))
        places.append((slice(first, after), slice(first + shift, after + shift)))
    (rows, new_rows), (columns, new_columns) = places
    centred = np.zeros((SIDE, SIDE), np.uint8)
    centred[new_rows, new_columns] = np.rint(field[rows, columns] * 255)
    return centred


def _is_formed(ink: Ink, side: int) -> bool:
    """Whether ink in 28x28 pixels is in the box's size at the centre already."""
    centre = _centre_of_mass(np.maximum(ink.apart, 0))
    near = all(abs(place - CENTRE) <= FORMED_OFFSET for place in centre)
    return near and FORMED_SIDES[0] <= side <= FORMED_SIDES[1]


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
