"""Chooses the connected components that are most likely one digit: no frames, lines, specks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from digits.form import Box, box_of
from digits.ink import MIN_CONTRAST, Grey, Ink, Values, border_of

# Specks: area over that of the main component, near to it and farther away than this share of its
# longer side.
SPECK_SHARE = 0.04
FAR_SPECK_SHARE = 0.10
FAR = 0.25
# What touches the picture's border is a frame, a ruled line or another's ink, if a component inside
# has this share of its area; for local contrast, this share of the picture's side.
INNER_SHARE = 0.20
INNER_SIDE = 0.12
# What covers more of the picture's border than this does more than touch it.
TOUCHING = 0.1
# Contrast of this share of the strongest is ink, less may be its blur.
CORE = 0.5
# Sheets and frames: greatest aspect ratio; area of a sheet over its bounding box; share of each
# side that a frame covers, within a band of this share of the box.
WIDE = 2.5
SHEET_FILL = 0.5
FRAME_COVER = 0.8
FRAME_BAND = 0.12
# Lines: length over the picture's side; width over height of an underline.
LINE_SHARE = 0.95
FLAT = 3
# An underline that touches the digit: its band, as a share of the height of both; width of both
# over that height. A narrower one is the base of a 1.
LINE_BAND = 0.15
BASE = 0.75
# Rings, by distance from the outline: share of ink at which the ring ends; its greatest width over
# its radius. What it encloses: side over the ring's; mean depth over the radius.
RING_INK = 0.5
RING_WIDTH = 0.25
ENCLOSED_SIDE = 0.35
ENCLOSED_DEPTH = 0.3
# Solid things: height or width over the picture's; depth over side; area over that of the
# minimum-area rectangle, beyond which it is a sheet; share of the picture's border that is covered,
# beyond which no paper is beside it.
ACROSS = 0.95
SOLID = 0.1
RECTANGLE = 0.88
BESIDE = 0.3

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Connected components that may be one digit.

    Attributes:
        values: float32 or uint8[h, w], the residual of these components, 0 elsewhere.
        box: Their bounding box.
        second: Area of the second largest component over the largest one's.
        encloses: Whether another digit may be inside.
        framed: Whether it is a frame around the digit, or a sheet.
        whole: Whether there is next to no other ink, and it does no more than touch the border.
        alone: Whether it is whole, away from the picture's border, and one component, and no frame;
            or several, of which none spans the picture or is inside of another.
        thing: Whether it is a solid object that spans the picture.
    """

    values: npt.NDArray[Any]
    box: Box
    second: float = 0.0
    encloses: bool = False
    framed: bool = False
    whole: bool = False
    alone: bool = False
    thing: bool = False


def parts(ink: Ink) -> list[Part]:
    """Candidates for the digit: all ink, what a ring encloses, what an underline leaves."""
    if ink.contrast < MIN_CONTRAST:
        return []
    inside, above = _enclosed(ink), _above_line(ink.mask)
    rests = [rest for rest in (inside, above) if rest is not None]
    candidates = [_main_part(ink, ink.mask, encloses=inside is not None, rivals=bool(rests))]
    candidates += [_main_part(ink, rest, rivals=True) for rest in rests]
    return [part for part in candidates if part]


def _main_part(
    ink: Ink, mask: Grey, *, encloses: bool = False, rivals: bool = False
) -> Part | None:  # fmt: skip
    """The component that is most likely the digit, and those that belong to it.

    Args:
        ink: All ink.
        mask: Where to look.
        encloses: Whether another candidate is inside.
        rivals: Whether there is another candidate.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, ltype=cv2.CV_16U)
    if count == 1:
        return None
    low, high, area = stats[1:, :2].T, (stats[1:, :2] + stats[1:, 2:4]).T, stats[1:, 4]
    near = 1 if ink.local else 0
    far = np.array([[mask.shape[1] - near], [mask.shape[0] - near]])
    at_edge: Mask = np.any((low <= near) | (high >= far), axis=0)
    # A digit that touches the border does so in a few pixels; shadows and desks end there.
    rivals |= bool(at_edge.any()) and float(border_of(mask).mean()) > TOUCHING
    if count == 2:
        thing = not (ink.local or encloses) and _is_thing(mask, stats[1])
        framed = not thing and _is_frame_or_sheet(mask, stats[1])
        alone = not (rivals or at_edge[0] or framed or ink.local)
        return _part(
            ink, mask, encloses=encloses, framed=framed, whole=not rivals, alone=alone, thing=thing
        )
    weights = _weights(ink, labels, high - low, area, at_edge)
    # An underline, as wide as the digit or wider, is no part of it.
    width, height = high - low
    line: Mask = width > FLAT * height
    main = int(np.where(line, INNER_SHARE * weights, weights).argmax())
    line &= (low[0] <= low[0, main]) & (high >= high[:, [main]]).all(axis=0)
    line[main] = False
    chosen, second = _belonging(low, high, np.where(line, 0, weights), main, local=ink.local)
    others = float(weights[~(chosen | line)].sum() / weights[main])
    whole = not rivals and others < FAR_SPECK_SHARE
    framed = _is_frame_or_sheet(mask, stats[main + 1])
    spans: Mask = np.any(high - low >= LINE_SHARE * far, axis=0)
    nested = _within(low, high, low[:, [main]], high[:, [main]])
    alone = whole and second > 0 and not (ink.local or (spans | nested | at_edge)[chosen].any())
    kept = np.concatenate([[0], chosen]).astype(np.uint8)[labels]
    return _part(
        ink, kept, second=second, encloses=encloses, framed=framed, whole=whole, alone=alone
    )


def _within(low: Values, high: Values, outer_low: Values, outer_high: Values) -> Mask:
    """Which bounding boxes are inside of other ones."""
    inside: Mask = np.all((low > outer_low) & (high < outer_high), axis=0)
    return inside


def _weights(ink: Ink, labels: Grey, sides: Values, area: Values, at_edge: Mask) -> Values:
    """How likely each is the digit: its area or ink, 0 at the border if there is enough inside."""
    inner = np.where(at_edge, 0, area)
    if not ink.local:
        return inner if inner.max() >= INNER_SHARE * area.max() else area
    has_inner = inner[sides.max(axis=0) >= INNER_SIDE * max(ink.mask.shape)].any()
    # A faint shadow is larger than a digit, now and then.
    weights = np.bincount(labels.ravel(), ink.residual.ravel())[1:]
    return np.where(at_edge, 0, weights) if has_inner else weights


def _enclosed(ink: Ink) -> Grey | None:
    """Ink inside of a ring or a box, even if it touches that; None if there is none.

    By the distance transform: all is the ring's from the outline to where there is little ink.
    """
    dark = ink.mask if ink.local else (ink.residual > CORE * ink.contrast).view(np.uint8)
    outlines, tree = cv2.findContours(dark, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if tree is None or not (tree[0, :, 3] >= 0).any():
        return None
    outline = max(outlines, key=cv2.contourArea)
    filled = cv2.drawContours(np.zeros_like(dark), [outline], -1, 1, cv2.FILLED)
    filled = cv2.copyMakeBorder(filled, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    depth = np.ceil(cv2.distanceTransform(filled, cv2.DIST_L2, 3)[1:-1, 1:-1]).astype(np.int32)
    inked: Values = np.bincount(depth.ravel(), dark.ravel())[1:]
    pale: Mask = inked < RING_INK * np.bincount(depth.ravel())[1:]
    width = int(pale.argmax())
    if not pale[width] or width > RING_WIDTH * len(pale):
        return None
    deep = (depth > width).view(np.uint8)
    inside: Grey = cv2.bitwise_and(dark, deep)
    longest = max(cv2.boundingRect(inside)[2:]) / max(cv2.boundingRect(outline)[2:])
    inner = inked[width:]
    mean_depth = np.arange(width, len(inked)) @ inner / max(1, inner.sum())
    if longest < ENCLOSED_SIDE or mean_depth < ENCLOSED_DEPTH * len(inked):
        return None
    return cv2.bitwise_and(cv2.dilate(inside, np.ones((3, 3), np.uint8)), deep)


def _above_line(mask: Grey) -> Grey | None:
    """Ink without the line all along its bottom that is wider than the rest; None without one."""
    left, top, width, height = cv2.boundingRect(mask)
    band, margin = round(LINE_BAND * height) + 1, 1 + width // 32
    inked = mask[top : top + height, left : left + width]
    if width < max(1, BASE * height) or _cover(inked[-band:], 0) <= LINE_SHARE:
        return None
    above = np.any(inked[:-band], axis=0)
    if above[:margin].any() or above[-margin:].any() or not above.any():
        return None
    rest: Grey = mask.copy()
    rest[top + height - band :] = 0
    return rest


def _is_thing(mask: Grey, stats: Values) -> bool:
    """True of a solid thing across the picture, with paper beside it, and no rectangular sheet."""
    width, height = stats[2:4].tolist()
    if height < ACROSS * len(mask) and width < ACROSS * len(mask[0]):
        return False
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rectangle = cv2.minAreaRect(outlines[0])[1]
    rectangular = cv2.contourArea(outlines[0]) > RECTANGLE * rectangle[0] * rectangle[1]
    depth = float(cv2.distanceTransform(mask, cv2.DIST_L2, 3).max())
    solid = depth > SOLID * max(width, height)
    return solid and not rectangular and float(border_of(mask).mean()) < BESIDE


def _is_frame_or_sheet(mask: Grey, stats: Values) -> bool:
    """True if there is ink along all sides of its box, or in most of it."""
    left, top, width, height = stats[:4].tolist()
    if not 1 / WIDE < width / height < WIDE:
        return False
    box = mask[top : top + height, left : left + width]
    if cv2.countNonZero(box) > SHEET_FILL * width * height:
        return True
    rows, columns = round(FRAME_BAND * height) + 1, round(FRAME_BAND * width) + 1
    sides = ((box[:rows], 0), (box[-rows:], 0), (box[:, :columns], 1), (box[:, -columns:], 1))
    return all(_cover(side, along) >= FRAME_COVER for side, along in sides)


def _cover(mask: Grey, along: int) -> float:
    """Share of the columns (0) or rows (1) with ink."""
    inked = cv2.reduce(mask, along, cv2.REDUCE_MAX)
    return cv2.countNonZero(inked) / inked.size


def _belonging(
    low: Values, high: Values, weights: Values, main: int, *, local: bool
) -> tuple[Mask, float]:  # fmt: skip
    """The main component and those that belong to it, large or near by; the second one's share."""
    main_low, main_high = low[:, [main]], high[:, [main]]
    gap = np.maximum(low - main_high, main_low - high).max(axis=0)
    share = weights / weights[main]
    chosen = (gap <= FAR * (main_high - main_low).max()) & (share >= SPECK_SHARE)
    if not local:
        chosen |= share >= FAR_SPECK_SHARE
    chosen &= ~_within(main_low, main_high, low, high)  # a frame around it
    chosen[main] = True
    shares = np.sort(share[chosen])
    return chosen, float(min(shares[-2], 1 / shares[-2])) if len(shares) > 1 else 0.0


def _part(ink: Ink, mask: Grey, **measures: Any) -> Part | None:
    """The ink in a mask, with other attributes of ``Part``; None if it only holds noise's blur."""
    if ink.local:  # the threshold is high, and edges below it are strokes', too
        values = cv2.copyTo(ink.residual, cv2.dilate(mask, np.ones((3, 3), np.uint8)))
    else:
        values = np.maximum(ink.residual * mask, 0)
    box = box_of(values)
    return Part(values, box, **measures) if box[1] > box[0] else None
