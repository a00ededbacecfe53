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
    """Where the ink is; empty if there is none."""
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
    """The ink at the box's size, its core 255."""
    height, width = values.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale <= 1 else cv2.INTER_CUBIC
    drawn = np.maximum(cv2.resize(values, size, interpolation=how), 0)
    core = np.sort(drawn, axis=None)
    core = core[core.searchsorted(CORE_SHARE * core[-1]) :]
    return cv2.convertScaleAbs(drawn, alpha=255 / core[int(len(core) * CORE_RANK)])


def _stroke_width(drawn: Values) -> float:
    """Mean width of the strokes in pixels: twice their area over the length of their outline.

    The outline's length is the total variation: the sum of the gradient's length.
    """
    field = cv2.copyMakeBorder(drawn, 2, 2, 2, 2, cv2.BORDER_CONSTANT).astype(np.float32)
    across = field[1:-1, 2:] - field[1:-1, :-2]
    down = field[2:, 1:-1] - field[:-2, 1:-1]
    return float(4 * field.sum() / cv2.magnitude(across, down).sum())


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


def _centred(drawn: Values) -> Pixels:
    """A field of 28x28 with the ink in it, its centre of mass in the middle to whole pixels."""
    height, width = drawn.shape
    x, y = (round(CENTRE - centre) for centre in _centre_of_mass(drawn))
    left, top = max(0, min(SIDE - width, x)), max(0, min(SIDE - height, y))
    right, bottom = SIDE - width - left, SIDE - height - top
    centred = cv2.copyMakeBorder(drawn, top, bottom, left, right, cv2.BORDER_CONSTANT)
    return centred.astype(np.uint8, copy=False)
