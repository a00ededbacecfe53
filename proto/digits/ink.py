"""Finds the ink in a grey picture: the paper under it, its polarity, the noise, and its parts.

Needs numpy only. Everything works on a picture that was shrunk to a few dozen pixels a side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

# The shortest interval that holds this share of the pixels along the edge is paper: a digit that
# was cropped tightly touches the edge with more than half of them now and then. Source of the
# idea: Rousseeuw 1984, Least Median of Squares Regression.
PAPER_SHARE = 0.45
# How wide that interval is for normal noise, in standard deviations.
PAPER_SHARE_WIDTH = 1.196
# Paper that varies by less than this share of the picture's range is taken for even.
EVEN_SHARE = 0.08
# Uneven paper is a quadratic surface, fitted to the means of so many fields a side: first a level,
# then a plane, then bent, each fit with weights from the last one's residuals, so that ink counts
# for nothing (Geman and McClure's weights).
FIELDS = 12
FIT_TERMS = (1, 3, 6, 6, 6)
# A surface is only believed if what is left along the edge varies by so much less than the edge.
FIT_SHARE = 0.5
# This share of all pixels is paper, however thick the strokes; below that rank of their residuals
# lies so much of a normal distribution's standard deviation.
NOISE_RANK = 0.3
NOISE_RANK_WIDTH = 0.385
# Ink stands out by this share of the strongest ink, by so many standard deviations of the noise,
# and by so many grey levels of 255 (JPEG's traces on even paper stay below).
INK_SHARE = 0.15
INK_DEVIATIONS = 4.0
INK_LEVELS = 2.0
# The strongest ink is that of the highest 1 in so many pixels.
STRONGEST = 400
# Dark ink on paper that is darker than this is not scaled up further.
DARKEST_PAPER = 32.0
# A part with less than this share of the main part's area is a speck, and so is one with less
# than the second share that is farther from it than the third share of its longer side.
SPECK_SHARE = 0.04
FAR_SPECK_SHARE = 0.10
FAR = 0.25
# What touches the picture's edge is a frame, a ruled line or another's ink if a part that does not
# has this share of its area.
INNER_SHARE = 0.20

_ROWS, _COLUMNS = (np.mgrid[:FIELDS, :FIELDS].reshape(2, -1) + 0.5) / FIELDS * 2 - 1
_LEVEL = np.ones_like(_ROWS)
_SURFACE = np.stack([_LEVEL, _COLUMNS, _ROWS, _COLUMNS**2, _COLUMNS * _ROWS, _ROWS**2], axis=1)
_AT_EDGE = np.maximum(np.abs(_ROWS), np.abs(_COLUMNS)) > 1 - 1.5 / FIELDS


@dataclass(frozen=True)
class Ink:
    """What stands out from the paper.

    Attributes:
        values: float32[h, w], 0 (paper) to about 1 (ink), nothing where ``found`` is not set.
        found: bool[h, w], where there is ink, and a pixel around it.
        apart: float32[h, w], difference from the paper in grey levels, ink positive.
        contrast: Grey levels between the strongest ink and the paper, of 255.
        noise: Standard deviation of the paper in grey levels, after smoothing.
    """

    values: Values
    found: Mask
    apart: Values
    contrast: float
    noise: float


@dataclass(frozen=True)
class Parts:
    """Connected parts of a mask, as runs of pixels along the rows.

    Attributes:
        row: int64[R], of each run.
        start: int64[R], its first column.
        stop: int64[R], the column after its last.
        label: int64[R], its part, 0 to P - 1.
        area: int64[P], pixels of each part.
        boxes: int64[P, 4], its top, bottom, left and right; bottom and right are one further.
    """

    row: Numbers
    start: Numbers
    stop: Numbers
    label: Numbers
    area: Numbers
    boxes: Numbers


def find_ink(grey: Values) -> Ink:
    """Tells ink from paper.

    Paper is what most of the edge is, ink what stands out from it, to whichever side the
    residuals are skewed. Light falls on ink and paper alike: on uneven paper the difference of dark
    ink is counted as a share of the paper's.

    Args:
        grey: float32[h, w], 0 to 255.
    """
    paper = _paper(grey)
    apart = grey - paper
    smooth = _smooth(apart)
    if np.vdot(smooth * smooth, smooth) < 0:  # ink is darker than paper
        light = 255 / np.maximum(paper, DARKEST_PAPER) if paper.ndim else np.float32(1)
        apart = apart * -light
        smooth = smooth * -light
    strongest = min(smooth.size, max(3, smooth.size // STRONGEST))
    contrast = float(np.sort(smooth, axis=None)[-strongest])
    noise = _noise(apart, smooth)
    found = smooth > max(INK_SHARE * contrast, INK_DEVIATIONS * noise, INK_LEVELS)
    values = np.where(found, apart, np.float32(0))
    values *= np.float32(1 / max(contrast, 1.0))
    np.maximum(values, 0, out=values)
    return Ink(values, found, apart, contrast, noise)


def _noise(apart: Values, smooth: Values) -> float:
    """The smaller of two estimates: by the quieter pixels anywhere, and by the edge's paper."""
    quiet = np.sort(np.abs(smooth[::2, ::2]), axis=None)
    low, high = _paper_interval(_edge(apart))
    anywhere = float(quiet[int(len(quiet) * NOISE_RANK)]) / NOISE_RANK_WIDTH
    return min(anywhere, (high - low) / PAPER_SHARE_WIDTH)


def _edge(values: Values) -> Values:
    """The pixels along the edge, ascending."""
    return np.sort(np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]]))


def _paper_interval(ordered: Values) -> tuple[float, float]:
    """The shortest interval that holds PAPER_SHARE of the values."""
    held = int(len(ordered) * PAPER_SHARE)
    least = int((ordered[held:] - ordered[: len(ordered) - held]).argmin())
    return float(ordered[least]), float(ordered[least + held])


def _paper(grey: Values) -> Values:
    """The paper's grey: a number (float32[]) where it is even, else float32[h, w]."""
    edge = _edge(grey)
    low, high = _paper_interval(edge)
    reach = high - low + 1
    near = edge[np.searchsorted(edge, low - reach) : np.searchsorted(edge, high + reach, "right")]
    level = near.mean(dtype=np.float32)
    if high - low <= EVEN_SHARE * float(grey.max() - grey.min()):
        return np.asarray(level)
    paper = _uneven_paper(grey, float(level))
    low_left, high_left = _paper_interval(_edge(grey - paper))
    # Where ink is most of the edge, as of an upright 1 that is cropped to its ink, none fits.
    fits = high_left - low_left <= FIT_SHARE * (high - low)
    return paper if fits else np.asarray(level)


def _uneven_paper(grey: Values, level: float) -> Values:
    height, width = grey.shape
    fields = resample(grey, (0, height, 0, width), (FIELDS, FIELDS)).ravel().astype(np.float64)
    residual = fields - level
    trust = np.where(_AT_EDGE, 1.0, 0.1)
    for terms in FIT_TERMS:
        scale = max(INK_LEVELS, 2 * float(np.median(np.abs(residual[_AT_EDGE]))))
        weights = trust / (1 + (residual / scale) ** 2) ** 2
        basis = _SURFACE[:, :terms]
        weighted = (basis * weights[:, None]).T
        fit = np.linalg.solve(weighted @ basis + 1e-6 * np.eye(terms), weighted @ fields)
        residual = fields - basis @ fit
        trust = _LEVEL
    y = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    x = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
    level, across, down, bent_across, twist, bent_down = fit
    columns = level + (across + bent_across * x) * x
    surface: Values = (columns + (down + bent_down * y + twist * x) * y).astype(np.float32)
    return surface


def _smooth(values: Values) -> Values:
    """Means of 3x3 pixels; the edge is repeated."""
    rows = np.concatenate([values[:1], values, values[-1:]])
    rows = rows[:-2] + rows[1:-1] + rows[2:]
    columns = np.concatenate([rows[:, :1], rows, rows[:, -1:]], axis=1)
    means: Values = (columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:]) * np.float32(1 / 9)
    return means


def find_parts(found: Mask) -> Parts:
    """Connected parts of a mask that is not empty; pixels that touch at a corner are connected."""
    height, width = found.shape
    step = width + 1  # a column of paper ends every run
    padded = np.zeros(height * step + 1, np.bool_)
    padded[1:].reshape(height, step)[:, :width] = found
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    start, stop = edges[::2], edges[1::2]
    # The runs of the next row that a run touches are neighbours in that order.
    first = np.searchsorted(stop, start + step, "left")
    after = np.searchsorted(start, stop + step, "right")
    roots = _join(first.tolist(), after.tolist())
    row = start // step
    start, stop = start - row * step, stop - row * step
    if not any(roots):  # one part, as most digits are
        box = [[row[0], row[-1] + 1, start.min(), stop.max()]]
        return Parts(
            row, start, stop, np.zeros_like(row), np.array([(stop - start).sum()]), np.array(box)
        )
    _, label = np.unique(roots, return_inverse=True)
    order = np.argsort(label, kind="stable")
    begins = np.searchsorted(label[order], np.arange(label.max() + 1))
    lowest = [np.minimum.reduceat(edge[order], begins) for edge in (row, start)]
    highest = [np.maximum.reduceat(edge[order], begins) for edge in (row + 1, stop)]
    boxes = np.stack([lowest[0], highest[0], lowest[1], highest[1]], axis=1)
    area = np.add.reduceat((stop - start)[order], begins)
    return Parts(row, start, stop, label, area, boxes)


def _join(first: list[int], after: list[int]) -> list[int]:
    """The lowest run that each run is connected with, given the runs that touch it from below."""
    root = list(range(len(first)))
    for run, (begin, end) in enumerate(zip(first, after, strict=True)):
        for other in range(begin, end):
            one, two = root[run], root[other]
            if two == other:  # a root, as it is when nothing above touched it
                root[other] = one
                continue
            while root[one] != one:
                root[one] = one = root[root[one]]
            while root[two] != two:
                root[two] = two = root[root[two]]
            root[max(one, two)] = min(one, two)
    for run, lower in enumerate(root):  # a root is never above what it is the root of
        root[run] = root[lower]
    return root


def choose_parts(parts: Parts, shape: tuple[int, int]) -> Mask:
    """bool[P]: the parts that belong to the digit, the largest one and what is not far from it."""
    top, bottom, left, right = parts.boxes.T
    at_edge = (top == 0) | (left == 0) | (bottom == shape[0]) | (right == shape[1])
    area = parts.area
    inner = np.where(at_edge, 0, area)
    if inner.max() >= INNER_SHARE * area.max():
        area = inner
    main = int(area.argmax())
    above, below, before, behind = parts.boxes[main]
    gap_y = np.maximum(top - below, above - bottom)
    gap_x = np.maximum(left - behind, before - right)
    near = np.maximum(gap_y, gap_x) <= FAR * max(below - above, behind - before)
    share = area / area[main]
    chosen: Mask = (share >= FAR_SPECK_SHARE) | (near & (share >= SPECK_SHARE))
    return chosen


def keep_parts(values: Values, parts: Parts, chosen: Mask) -> Values:
    """The values with nothing left of the parts that were not chosen."""
    height, width = values.shape
    runs = chosen[parts.label]
    change = np.zeros((height, width + 1), np.int8)
    change[parts.row[runs], parts.start[runs]] = 1
    change[parts.row[runs], parts.stop[runs]] = -1
    inside = np.cumsum(change.ravel(), dtype=np.int8).reshape(height, width + 1)
    kept: Values = values * inside[:, :-1]
    return kept


def resample(values: Values, box: tuple[int, int, int, int], shape: tuple[int, int]) -> Values:
    """The part of a picture inside a box, in ``shape`` pixels.

    Args:
        values: float32[h, w].
        box: Top, bottom, left and right, in pixels.
        shape: Height and width of the result.
    """
    top, bottom, left, right = box
    if bottom - top >= shape[0] and right - left >= shape[1]:  # nothing around it counts
        values, (top, left) = values[top:bottom, left:right], (0, 0)
        bottom, right = values.shape
    down = _weights(values.shape[0], top, bottom, shape[0])
    across = _weights(values.shape[1], left, right, shape[1])
    return (down @ values @ across.T).astype(np.float32, copy=False)


@functools.lru_cache(maxsize=1024)
def _weights(size: int, start: int, stop: int, count: int) -> Values:
    """float32[count, size]: what each of ``size`` pixels gives to each of ``count`` of a range.

    Fewer pixels are the means of what they cover, so that thin strokes fade and do not break; more
    are interpolated by Keys' cubic. Source: Keys 1981, Cubic Convolution Interpolation for Digital
    Image Processing.
    """
    step = (stop - start) / count
    first = np.float32(start) + np.arange(count, dtype=np.float32)[:, None] * np.float32(step)
    places = np.arange(size, dtype=np.float32)[None, :]
    if step >= 1:
        covered = np.minimum(first + np.float32(step), places + 1) - np.maximum(first, places)
        shares: Values = np.maximum(covered, 0) * np.float32(1 / step)
        return shares
    centres = np.clip(first + np.float32(step / 2), 0.5, size - 0.5)
    apart = np.abs(centres - places - np.float32(0.5))
    near = (1.5 * apart - 2.5) * apart * apart + 1
    far = ((2.5 - 0.5 * apart) * apart - 4) * apart + 2
    cubic = np.where(apart < 1, near, np.where(apart < 2, far, np.float32(0)))
    weights: Values = (cubic / cubic.sum(axis=1, keepdims=True)).astype(np.float32)
    return weights
