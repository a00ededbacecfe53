"""Brings ink to the form that the network was trained on, MNIST's.

Ink is 255 on a background of 0; the digit is fitted into a box of 20x20 pixels with its
proportions kept and its edges smooth; the box lies in a field of 28x28 pixels so that the centre of
mass is at the centre. Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits
(yann.lecun.com/exdb/mnist). In its 60,000 training digits the longer side of what is not 0 has 20
pixels (59,987 of them), and the centre of mass is at (14, 14) to within half a pixel.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from digits.ink import Values

SIDE = 28
BOX = 20
# Index of the centre of mass.
CENTRE = 14.0
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
# Holes are lighter than this.
HOLE = 96

Pixels = npt.NDArray[np.uint8]
# Top, bottom, left and right; bottom and right are one further.
Box = tuple[int, int, int, int]


def box_of(values: Values) -> Box:
    """Where the ink is; there must be some."""
    ink = values > BOX_SHARE * float(values.max())
    left, top, width, height = cv2.boundingRect(ink.view(np.uint8))
    return top, top + height, left, left + width


def formed(values: Values, box: Box) -> tuple[Pixels, float]:
    """The ink in MNIST's form, and the width that its strokes had, in pixels of the box."""
    values = values[box[0] : box[1], box[2] : box[3]].astype(np.float32)
    drawn = _fit(values)
    stroke = _stroke_width(drawn)
    side = max(values.shape)
    excess = min(0.0, stroke - THIN) + max(0.0, stroke - THICK)
    if excess and side >= BOX:  # of fewer pixels the edges are too soft to tell
        usual = _widened(values, -excess / 2 * side / BOX)
        if usual.sum() >= HATCHED_SHARE * values.sum():
            top, bottom, left, right = box_of(usual)
            drawn = _fit(usual[top:bottom, left:right])
    return _centred(drawn), stroke


def is_formed(values: Values, side: int) -> bool:
    """True of ink in 28x28 pixels that has the box's size and is centred."""
    near = all(abs(place - CENTRE) <= FORMED_OFFSET for place in _centre_of_mass(values))
    return near and FORMED_SIDES[0] <= side <= FORMED_SIDES[1]


def holes(pixels: Pixels) -> int:
    """The number of holes in the strokes."""
    dark = (pixels > HOLE).view(np.uint8)
    _, tree = cv2.findContours(dark, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return 0 if tree is None else int((tree[0, :, 3] >= 0).sum())


def _fit(values: Values) -> Values:
    """The ink, its longer side 20 pixels, in the middle of a field of 28x28; 0 to 1."""
    height, width = values.shape
    scale = BOX / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    how = cv2.INTER_AREA if scale <= 1 else cv2.INTER_CUBIC
    drawn = np.maximum(cv2.resize(values, shape[::-1], interpolation=how), 0)
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

    By a disc; that of the next whole radius is blended in. Source: Serra 1982, Image Analysis and
    Mathematical Morphology.
    """
    morph = cv2.dilate if radius > 0 else cv2.erode
    steps = math.ceil(abs(radius))
    wide = cv2.copyMakeBorder(values, steps, steps, steps, steps, cv2.BORDER_CONSTANT)
    below, above = (
        morph(wide, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1)))
        for r in (steps - 1, steps)
    )
    return cv2.addWeighted(below, steps - abs(radius), above, abs(radius) - steps + 1, 0)


def _centre_of_mass(field: Values) -> tuple[float, float]:
    """Across and down."""
    moments = cv2.moments(field)
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]


def _centred(field: Values) -> Pixels:
    """Moves the centre of mass to the centre by whole pixels, as far as no ink leaves the field."""
    pixels = cv2.convertScaleAbs(field, alpha=255)
    left, top, width, height = cv2.boundingRect(pixels)
    x, y = (round(CENTRE - centre) for centre in _centre_of_mass(field))
    x, y = max(-left, min(SIDE - left - width, x)), max(-top, min(SIDE - top - height, y))
    centred = np.zeros((SIDE, SIDE), np.uint8)
    centred[top + y : top + y + height, left + x : left + x + width] = pixels[
        top : top + height, left : left + width
    ]
    return centred
