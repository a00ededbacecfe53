"""Separates ink from paper: by a global threshold, or by local contrast.

Both subtract the paper (the background) and threshold the residual, on a picture that was shrunk
to a few dozen pixels a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

# uint8[h, w] and float32[h, w]; OpenCV's annotations promise neither.
Grey = npt.NDArray[Any]
Values = npt.NDArray[Any]

# The shortest interval that holds this share of the border's pixels is paper: a digit that was
# cropped tightly touches the border with more than half of them now and then. Source of the idea:
# Rousseeuw 1984, Least Median of Squares Regression.
PAPER_SHARE = 0.45
# How wide that interval is for normal noise, in standard deviations.
PAPER_SHARE_WIDTH = 1.196
# Illumination that varies by less than this share of the picture's range is taken for even.
EVEN_SHARE = 0.08
# This share of all pixels is paper, however thick the strokes; below that rank of their residuals
# lies so much of a normal distribution's standard deviation.
NOISE_RANK = 0.3
NOISE_RANK_WIDTH = 0.385
HALF_WIDTH = 0.674
# Less contrast than this, of 255, is no ink.
MIN_CONTRAST = 6.0
# Ink stands out by this share of the strongest ink, by so many standard deviations of the noise,
# and by so many grey levels of 255 (JPEG's traces on even paper stay below).
INK_SHARE = 0.15
INK_DEVIATIONS = 4.0
INK_LEVELS = 2.0
# Local contrast of so many times the threshold is full ink.
SATURATION = 3
# The strongest ink is that of the highest 1 in so many pixels.
STRONGEST, LOCAL_STRONGEST = 400, 200
# Uneven illumination is a quadratic surface, fitted to the means of so many fields a side by
# reweighted least squares (Geman and McClure's weights): first a level, then a plane, then bent.
# It is only believed if the residuals at the border vary by so much less.
FIELDS = 12
FIT_TERMS = (1, 3, 6, 6, 6)
FIT_SHARE = 0.5
# A sheet covers a share of the picture in this range, and this share of its convex hull.
SHEET_SHARE, CONVEX = (0.08, 0.85), 0.85
# Contrast is relative to the paper's grey, or to this where the paper is darker.
DARKEST_PAPER = np.uint8(32)
# Slopes of lines that are looked for: up to this, in so many steps.
MOST_TURN, TURNS = 0.08, 9
HALF = np.uint8(128)

_ROWS, _COLUMNS = (np.mgrid[:FIELDS, :FIELDS].reshape(2, -1) + 0.5) / FIELDS * 2 - 1
_SURFACE = np.stack(
    [np.ones_like(_ROWS), _COLUMNS, _ROWS, _COLUMNS**2, _COLUMNS * _ROWS, _ROWS**2], axis=1
)
_AT_EDGE = np.maximum(np.abs(_ROWS), np.abs(_COLUMNS)) > 1 - 1.5 / FIELDS


@dataclass(frozen=True)
class Ink:
    """The residual of a picture without its paper, and where that is ink.

    Attributes:
        residual: float32 or uint8[h, w], difference from the paper in grey levels, ink positive.
        mask: uint8[h, w], 1 where the smoothed residual is above the threshold.
        contrast: Grey levels between the strongest ink and the paper, of 255.
        noise: Standard deviation of the paper in grey levels, after smoothing.
        local: Whether it is by local contrast.
    """

    residual: npt.NDArray[Any]
    mask: Grey
    contrast: float
    noise: float
    local: bool


def shrunk(grey: Grey, side: int) -> Grey:
    """Area means, at most ``side`` pixels a side; the picture itself if it is no larger."""
    factor = math.ceil(max(grey.shape) / side)
    if factor == 1:
        return grey
    height, width = grey.shape
    # To whole fields, of which the means are many times as fast as of parts of pixels.
    below, beside = -height % factor, -width % factor
    if below or beside:
        grey = cv2.copyMakeBorder(grey, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    size = grey.shape[1] // factor, grey.shape[0] // factor
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def on_paper(grey: Grey) -> Ink:
    """Ink by a global threshold, on paper that most of the border is: even or smoothly lit.

    Ink is dark or light, whichever way the residuals are skewed. Light falls on ink and paper
    alike: under uneven light the residual of dark ink is taken relative to the paper's grey.
    """
    edge = np.sort(border_of(grey)).astype(np.float32)
    low, high = _paper_interval(edge)
    reach = high - low + 1
    near = edge[np.searchsorted(edge, low - reach) : np.searchsorted(edge, high + reach, "right")]
    level = near.mean(dtype=np.float32)
    residual: Values = grey - level
    light: Any = np.float32(1)
    darkest, lightest, _, _ = cv2.minMaxLoc(grey)
    if high - low > EVEN_SHARE * (lightest - darkest):
        paper = _uneven_paper(grey, float(level))
        left = _paper_interval(np.sort(border_of(grey - paper)))
        # Where ink is most of the border, as of an upright 1 that is cropped to its ink, none fits.
        if left[1] - left[0] <= FIT_SHARE * (high - low):
            residual, light = grey - paper, 255 / np.maximum(paper, DARKEST_PAPER)
    smooth = cv2.blur(residual, (3, 3), borderType=cv2.BORDER_REPLICATE)
    if np.vdot(smooth * smooth, smooth) < 0:
        residual, smooth = residual * -light, smooth * -light
    strong = np.sort(smooth[smooth >= INK_SHARE * float(smooth.max())])
    contrast = float(strong[-min(len(strong), max(3, smooth.size // STRONGEST))])
    quiet = np.sort(np.abs(smooth[::2, ::2]), axis=None)
    anywhere = float(quiet[int(len(quiet) * NOISE_RANK)]) / NOISE_RANK_WIDTH
    noise = min(anywhere, (high - low) / PAPER_SHARE_WIDTH)
    mask = smooth > max(INK_SHARE * contrast, INK_DEVIATIONS * noise, INK_LEVELS)
    return Ink(residual, mask.view(np.uint8), contrast, noise, local=False)


def _uneven_paper(grey: Grey, level: float) -> Values:
    """The illumination: a quadratic surface, fitted so that ink counts as outliers."""
    height, width = grey.shape
    fields = cv2.resize(grey.astype(np.float64), (FIELDS, FIELDS), interpolation=cv2.INTER_AREA)
    fields, trust = fields.ravel(), np.where(_AT_EDGE, 1.0, 0.1)
    residual = fields - level
    for terms in FIT_TERMS:
        scale = max(INK_LEVELS, 2 * float(np.median(np.abs(residual[_AT_EDGE]))))
        weights = trust / (1 + (residual / scale) ** 2) ** 2
        basis = _SURFACE[:, :terms]
        weighted = (basis * weights[:, None]).T
        fit = np.linalg.solve(weighted @ basis + 1e-6 * np.eye(terms), weighted @ fields)
        residual = fields - basis @ fit
        trust = np.ones_like(residual)
    y = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    x = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
    level, across, down, bent_across, twist, bent_down = fit
    columns = level + (across + bent_across * x) * x
    surface: Values = (columns + (down + bent_down * y + twist * x) * y).astype(np.float32)
    return surface


def sheet(grey: Grey) -> Grey | None:
    """The picture with all but its light sheet painted in the sheet's grey, if it has one.

    That is the largest light component (Otsu's threshold), if it is convex.
    """
    light = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    light = cv2.morphologyEx(light, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    outlines, _ = cv2.findContours(light, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not outlines:
        return None
    outline = max(outlines, key=cv2.contourArea)
    area = cv2.contourArea(hull := cv2.convexHull(outline))
    convex = cv2.contourArea(outline) > CONVEX * area
    if not convex or not SHEET_SHARE[0] < area / grey.size < SHEET_SHARE[1]:
        return None
    mask = cv2.erode(cv2.fillConvexPoly(np.zeros_like(grey), hull, 1), np.ones((7, 7), np.uint8))
    if not mask.any():
        return None
    return np.where(mask > 0, grey, np.uint8(np.median(grey[mask > 0])))


def by_local_contrast(
    grey: Grey, stroke: float, threshold: float, without_lines: float = 0
) -> Ink:  # fmt: skip
    """Ink that is darker than the paper around it, which shadows do not disturb.

    The paper is the morphological closing: it fills strokes and keeps the edges of shadows. Light
    falls on ink and paper alike, so contrast is a share of the paper's grey.

    Args:
        grey: The picture.
        stroke: Strokes are thinner than this share of the picture's longer side.
        threshold: Ink has this share of the strongest contrast.
        without_lines: Lines of this share of a side are taken out; 0 for none.
    """
    size = max(3, round(stroke * max(grey.shape)) | 1)
    square = np.ones((size, size), np.uint8)
    paper = cv2.morphologyEx(grey, cv2.MORPH_CLOSE, square, borderType=cv2.BORDER_REPLICATE)
    residual = cv2.divide(cv2.subtract(paper, grey), np.maximum(paper, DARKEST_PAPER), scale=255)
    if without_lines:
        residual = _without_lines(residual, without_lines)
    smooth = cv2.GaussianBlur(residual, (3, 3), 0)
    ranks = cv2.calcHist([smooth], [0], None, [256], [0, 256]).ravel().cumsum() / smooth.size
    noise = float(ranks.searchsorted(0.5)) / HALF_WIDTH + 1
    contrast = float(ranks.searchsorted(1 - 1 / LOCAL_STRONGEST))
    level = max(threshold * contrast, INK_DEVIATIONS * noise, INK_LEVELS)
    mask = cv2.threshold(smooth, level, 1, cv2.THRESH_BINARY)[1]
    # Strokes that fade are as strong as the rest.
    residual = np.minimum(residual, np.uint8(min(255, SATURATION * level)))
    return Ink(residual, mask, contrast, noise, local=True)


def border_of(grey: Grey) -> Grey:
    """The pixels along the picture's border; those of corners twice."""
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _paper_interval(ordered: Values) -> tuple[float, float]:
    """The shortest interval that holds PAPER_SHARE of the values."""
    held = int(len(ordered) * PAPER_SHARE)
    least = int((ordered[held:] - ordered[: len(ordered) - held]).argmin())
    return float(ordered[least]), float(ordered[least + held])


def _without_lines(residual: Grey, length: float) -> Grey:
    """Takes out straight lines, level or upright to a few degrees, of a share of each side.

    The picture is sheared until its projection onto the rows has most energy. Morphological opening
    by a row finds the lines; closing fills strokes where lines crossed them.

    Args:
        residual: See ``Ink``.
        length: Of a line, as a share of the side.
    """
    for _ in range(2):
        residual = cv2.transpose(residual)
        height, width = residual.shape
        coarse = cv2.resize(np.minimum(residual, HALF), (width // 2 + 1, height // 2 + 1))
        turn = max(np.linspace(-MOST_TURN, MOST_TURN, TURNS), key=partial(_energy, coarse))
        sheared = _sheared(residual, turn)
        thick = cv2.dilate(sheared, np.ones((3, 1), np.uint8))
        row = np.ones((1, max(3, int(length * width))), np.uint8)
        lines = cv2.morphologyEx(thick, cv2.MORPH_OPEN, row, borderType=cv2.BORDER_REPLICATE)
        rest = cv2.subtract(sheared, lines)
        rest = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((5, 1), np.uint8))
        residual = _sheared(rest, -turn)
    return residual


def _energy(residual: Grey, shear: float) -> float:
    profile = cv2.reduce(_sheared(residual, shear), 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)
    return float(np.vdot(profile, profile))


def _sheared(residual: Grey, shear: float) -> Grey:
    height, width = residual.shape
    matrix = np.array([[1, 0, 0], [shear, 1, -shear * width / 2]], np.float32)
    return cv2.warpAffine(residual, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
