"""Pictures of a digit as people take them: ruled paper, shadows, a desk around the sheet, frames.

All are drawn from a seed. ``python -m tests.scenes_report`` makes the table of docs/images.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tests.presentations import as_grey, png, saved
from training import strokes

# A digit's height and the picture's, and how much they differ.
DIGIT, SIDE = (110, 170), (240, 360)
Values = np.ndarray
Scene = Callable[[Values, np.random.Generator], Image.Image]


def thick(digit: Values, rng: np.random.Generator) -> Values:
    """An MNIST digit written with a felt pen: a share of ink for each pixel, trimmed."""
    image = Image.fromarray(digit)
    image = image.crop(image.getbbox())
    factor = rng.uniform(*DIGIT) / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), float) / 255


def thin(digit: int, rng: np.random.Generator) -> Values:
    """A digit in a ballpoint's strokes; the first way to write it, which everybody reads."""
    points = [strokes._points(s) for s in strokes.DIGITS[str(digit)][0].split(", ")]
    lines = strokes._hand(points, rng)
    low = np.concatenate(lines).min(axis=0)
    factor = rng.uniform(*DIGIT) / np.ptp(np.concatenate(lines), axis=0).max()
    lines = [(line - low) * factor + 6 for line in lines]
    width, height = np.concatenate(lines).max(axis=0) + 6
    image = Image.new("L", (round(width), round(height)), 0)
    for line in lines:
        strokes._line(ImageDraw.Draw(image), line, rng.uniform(2.5, 5))
    image = image.filter(ImageFilter.GaussianBlur(0.7))
    return np.asarray(image.crop(image.getbbox()), float) / 255


def written(ink: Values, paper: Image.Image, rng: np.random.Generator, **place: Any) -> Image.Image:
    """The digit on the paper, by a pen of some darkness, near the middle or in the box given."""
    shares = _placed(ink, paper.size, rng, **place)
    return as_grey(np.asarray(paper, float) * (1 - rng.uniform(0.65, 0.9) * shares))


def _placed(ink: Any, size: Any, rng: Any, centre: Any = None, shift: float = 0.12) -> np.ndarray:
    height, width = ink.shape
    x, y = centre or (size[0] / 2, size[1] / 2)
    room = max(0.0, shift * min(size) - 0)
    left = round(x - width / 2 + rng.uniform(-room, room))
    top = round(y - height / 2 + rng.uniform(-room, room))
    field = Image.new("F", size, 0)
    field.paste(Image.fromarray(ink.astype(np.float32)), (left, top))
    return np.asarray(field)


def _sheet(rng: Any, low: Any = 205) -> Image.Image:
    size = [int(side) for side in rng.integers(*SIDE, 2)]
    return Image.new("L", size, int(rng.uniform(low, 252)))


def _lined(paper: Image.Image, rng: Any, *, squared: bool) -> Image.Image:
    """Lines across all of it, printed lighter than ink, as a camera sees them: slightly turned."""
    width, height = paper.size
    big = Image.new("L", (2 * width, 2 * height), paper.getpixel((0, 0)))
    draw, step = ImageDraw.Draw(big), rng.uniform(0.1, 0.2) * height
    step = step if squared else 1.8 * step
    grey, pen = int(big.getpixel((0, 0)) * rng.uniform(0.35, 0.8)), int(rng.integers(1, 4))
    first = rng.uniform(0, step)
    for place in np.arange(first, 2 * height, step):
        draw.line((0, place, 2 * width, place), fill=grey, width=pen)
    for place in np.arange(first, 2 * width, step) if squared else []:
        draw.line((place, 0, place, 2 * height), fill=grey, width=pen)
    big = big.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC)
    left, top = width // 2, height // 2
    return big.crop((left, top, left + width, top + height))


def ruled_paper(ink: Any, rng: Any) -> Image.Image:
    return written(ink, _lined(_sheet(rng), rng, squared=False), rng)


def squared_paper(ink: Any, rng: Any) -> Image.Image:
    return written(ink, _lined(_sheet(rng), rng, squared=True), rng)


def _lit(
    image: Image.Image, across: Values, rng: np.random.Generator, softness: Any
) -> Image.Image:
    """In shadow where ``across`` (in pixels) is above 0."""
    dark = rng.uniform(0.35, 0.65)
    light = 1 - dark / (1 + np.exp(np.clip(-across / softness, -50, 50)))
    return as_grey(np.asarray(image, float) * light)


def _across(image: Image.Image, distance: float, angle: float) -> Any:
    """Pixels beyond a straight line that passes the middle at a distance."""
    y, x = np.mgrid[: image.height, : image.width]
    x, y = x - image.width / 2, y - image.height / 2
    return x * math.cos(angle) + y * math.sin(angle) - distance


def shadow_soft(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng)
    across = _across(image, rng.uniform(-60, 60), rng.uniform(0, 2 * math.pi))
    return _lit(image, across, rng, rng.uniform(8, 30))


def shadow_beside(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng, shift=0.03)
    beyond = math.hypot(*ink.shape) / 2 + 8
    angle = rng.integers(4) * math.pi / 2 + rng.uniform(-0.3, 0.3)
    side = image.width if abs(math.cos(angle)) > 0.5 else image.height
    return _lit(image, _across(image, min(beyond, side / 2 - 8), angle), rng, rng.uniform(0.5, 2))


def shadow_across(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng)
    across = _across(image, rng.uniform(-40, 40), rng.uniform(0, 2 * math.pi))
    return _lit(image, across, rng, rng.uniform(0.5, 2))


def shadow_of_hand(ink: Any, rng: Any) -> Image.Image:
    """A palm and fingers, or a phone, that reach in from an edge."""
    image = written(ink, _sheet(rng), rng)
    shade = Image.new("L", image.size, 0)
    draw, width, height = ImageDraw.Draw(shade), *image.size
    reach = rng.uniform(0.3, 0.6) * height
    draw.ellipse((width * 0.3, height - reach * 0.7, width * 1.2, height * 1.4), fill=255)
    for finger in range(4):
        x = width * (0.35 + 0.17 * finger)
        top = height - reach - rng.uniform(0, 0.2) * height
        draw.rounded_rectangle((x, top, x + width * 0.1, height), width * 0.05, fill=255)
    shade = shade.rotate(90 * int(rng.integers(4))).resize(image.size)
    soft = np.asarray(shade.filter(ImageFilter.GaussianBlur(rng.uniform(1, 6))), float) / 255
    return as_grey(np.asarray(image, float) * (1 - rng.uniform(0.3, 0.55) * soft))


def _desk(size: Any, rng: Any) -> Image.Image:
    """Dark or wooden, with some grain."""
    grain = as_grey(128 + rng.normal(0, 60, (size[1] // 2, max(2, size[0] // 40))))
    fine = np.asarray(grain.resize(size, Image.Resampling.BICUBIC), float) - 128
    return as_grey(rng.uniform(30, 140) + rng.uniform(0, 0.3) * fine)


def _laid(card: Image.Image, desk: Image.Image, middle: Any, angle: Any) -> Image.Image:
    mask = Image.new("L", card.size, 255).rotate(angle, expand=True)
    card = card.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    place = round(middle[0] - card.width / 2), round(middle[1] - card.height / 2)
    desk.paste(card, place, mask)
    return desk


def sheet_on_desk(ink: Any, rng: Any) -> Image.Image:
    card = written(ink, _sheet(rng), rng, shift=0.05)
    size = tuple(round(side * rng.uniform(1.2, 1.7)) for side in card.size)
    middle = [side / 2 + rng.uniform(-0.04, 0.04) * side for side in size]
    return _laid(card, _desk(size, rng), middle, rng.uniform(-12, 12))


def sticky_note(ink: Any, rng: Any) -> Image.Image:
    """A pastel square on a wall or a board."""
    side = round(max(ink.shape) * rng.uniform(1.25, 1.7))
    card = written(ink, Image.new("L", (side, side), int(rng.uniform(190, 235))), rng, shift=0.02)
    size = tuple(round(side * rng.uniform(1.3, 2.2)) for _ in range(2))
    wall = as_grey(rng.choice([60, 110, 150]) + rng.normal(0, 3, size[::-1]))
    return _laid(card, wall, [s / 2 for s in size], rng.uniform(-10, 10))


def table_on_two_sides(ink: Any, rng: Any) -> Image.Image:
    card = written(ink, _sheet(rng), rng, shift=0.05)
    desk, corner = _desk(card.size, rng), rng.integers(4)
    shift = [side * rng.uniform(0.1, 0.2) for side in card.size]
    x = card.width / 2 + (1 if corner % 2 else -1) * shift[0]
    y = card.height / 2 + (1 if corner // 2 else -1) * shift[1]
    return _laid(card, desk, (x, y), rng.uniform(-4, 4))


def black_bars(ink: Any, rng: Any) -> Any:
    """A phone's screenshot of a picture."""
    card = written(ink, _sheet(rng), rng)
    bar = round(card.height * rng.uniform(0.1, 0.6))
    x, y = (0, bar) if rng.random() < 0.5 else (bar, 0)
    bars = Image.new("L", (card.width + 2 * x, card.height + 2 * y), 0)
    bars.paste(card, (x, y))
    return bars


def badge(ink: Any, rng: Any) -> Image.Image:
    """A card with a coloured head, on dark cloth."""
    card = _sheet(rng)
    head = round(card.height * rng.uniform(0.12, 0.2))
    centre = card.width / 2, (card.height + head) / 2
    card = written(ink, card, rng, centre=centre, shift=0.02)
    ImageDraw.Draw(card).rectangle((0, 0, card.width, head), fill=int(rng.uniform(40, 130)))
    size = tuple(round(side * rng.uniform(1.2, 1.6)) for side in card.size)
    cloth = as_grey(rng.uniform(20, 80) + rng.normal(0, 5, size[::-1]))
    mask = Image.new("L", card.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, card.width - 1, card.height - 1), 18, fill=255)
    cloth.paste(card, ((size[0] - card.width) // 2, (size[1] - card.height) // 2), mask)
    return cloth


def thin_black_frame(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng, shift=0.05)
    pen, inset = int(rng.integers(1, 5)), int(rng.choice([0, 0, 2, 8]))
    box = inset, inset, image.width - 1 - inset, image.height - 1 - inset
    ImageDraw.Draw(image).rectangle(box, outline=int(rng.integers(0, 60)), width=pen)
    return image


def form_box(ink: Any, rng: Any, touching: bool = False) -> Image.Image:
    image = _sheet(rng)
    centre = image.width / 2, image.height / 2
    gap = rng.uniform(12, 34, 4)
    if touching:
        gap[rng.permutation(4)[: rng.integers(1, 3)]] = rng.uniform(-8, 2)
    half = max(ink.shape[1], 0.6 * ink.shape[0]) / 2, ink.shape[0] / 2
    image = written(ink, image, rng, centre=centre, shift=0)
    box = (
        centre[0] - half[0] - gap[0], centre[1] - half[1] - gap[1],
        centre[0] + half[0] + gap[2], centre[1] + half[1] + gap[3],
    )  # fmt: skip
    grey, pen = int(rng.integers(0, 120)), int(rng.integers(1, 5))
    ImageDraw.Draw(image).rectangle(tuple(map(round, box)), outline=grey, width=pen)
    return image


def cell_borders_left_over(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng, shift=0.04)
    draw, (width, height) = ImageDraw.Draw(image), image.size
    grey, pen = int(rng.integers(0, 120)), int(rng.integers(2, 7))
    for side in rng.permutation(4)[: rng.integers(1, 4)]:
        at, tilt = rng.uniform(1, 16), rng.uniform(-4, 4)
        line = [
            (0, at, width, at + tilt), (0, height - at, width, height - at + tilt),
            (at, 0, at + tilt, height), (width - at, 0, width - at + tilt, height),
        ][side]  # fmt: skip
        draw.line(line, fill=grey, width=pen)
    return image


def whiteboard_glare(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng, 150), rng)
    y, x = np.mgrid[: image.height, : image.width]
    spot = [rng.uniform(0.1, 0.9) * side for side in image.size]
    distance = np.hypot(x - spot[0], y - spot[1]) / rng.uniform(40, 110)
    values = np.asarray(image, float)
    return as_grey(values + (255 - values) * rng.uniform(0.5, 0.9) * np.exp(-(distance**2)))


def paint_window(ink: Any, rng: Any) -> Any:
    """A title bar, a tool bar with signs, and the canvas."""
    canvas = written(ink, _sheet(rng, 250), rng)
    bar = int(rng.integers(30, 70))
    window = Image.new("L", (canvas.width + 8, canvas.height + bar + 8), 235)
    draw = ImageDraw.Draw(window)
    draw.rectangle((0, 0, window.width, bar // 3), fill=int(rng.choice([60, 120, 245])))
    for x in range(6, window.width - 20, 22):
        top, grey = bar // 3 + 4, int(rng.integers(0, 200))
        draw.rectangle((x, top, x + 12, top + 12), outline=grey, fill=int(rng.integers(100, 255)))
    window.paste(canvas, (4, bar + 4))
    draw.rectangle((0, 0, window.width - 1, window.height - 1), outline=120)
    return window


def binding_holes(ink: Any, rng: Any) -> Image.Image:
    image = written(ink, _sheet(rng), rng, shift=0.03)
    draw, radius = ImageDraw.Draw(image), rng.uniform(5, 10)
    x = rng.uniform(12, 22)
    for y in np.arange(rng.uniform(10, 50), image.height, rng.uniform(40, 110)):
        grey = int(rng.integers(0, 110))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=grey)
    return image


def circled(ink: Any, rng: Any) -> Image.Image:
    image = _sheet(rng)
    centre = image.width / 2, image.height / 2
    image = written(ink, image, rng, centre=centre, shift=0)
    radius = math.hypot(*ink.shape) / 2 + rng.uniform(2, 15)
    box = [c + sign * radius * rng.uniform(0.95, 1.1) for sign in (-1, 1) for c in centre]
    pen = max(2, round(ink.sum() / max(ink.shape) / 3))
    ImageDraw.Draw(image).ellipse(box, outline=int(rng.integers(20, 80)), width=pen)
    return image


def underlined(ink: Any, rng: Any) -> Image.Image:
    image = _sheet(rng)
    image = written(ink, image, rng, shift=0)
    y = (image.height + ink.shape[0]) / 2 + rng.uniform(6, 22)
    half = ink.shape[1] / 2 + rng.uniform(5, 40)
    pen = max(2, round(ink.sum() / max(ink.shape) / 3))
    line = (image.width / 2 - half, y, image.width / 2 + half, y + rng.uniform(-6, 6))
    ImageDraw.Draw(image).line(line, fill=int(rng.integers(20, 80)), width=pen)
    return image


def transparent_trimmed(ink: Any, rng: Any) -> Any:
    image = Image.new("RGBA", ink.shape[::-1], tuple(int(c) for c in rng.integers(0, 90, 3)))
    image.putalpha(as_grey(255 * ink))
    return image.crop(image.getbbox())


def clean_paper(ink: Any, rng: Any) -> Image.Image:
    return written(ink, _sheet(rng), rng)


SCENES: dict[str, Scene] = {
    "clean paper": clean_paper,
    "ruled paper": ruled_paper,
    "squared paper": squared_paper,
    "shadow, soft": shadow_soft,
    "shadow, sharp beside": shadow_beside,
    "shadow, sharp across": shadow_across,
    "shadow of a hand": shadow_of_hand,
    "sheet on a desk": sheet_on_desk,
    "sticky note": sticky_note,
    "table on two sides": table_on_two_sides,
    "black bars": black_bars,
    "badge": badge,
    "thin black frame": thin_black_frame,
    "form box around": form_box,
    "form box touching": partial(form_box, touching=True),
    "cell borders left over": cell_borders_left_over,
    "whiteboard glare": whiteboard_glare,
    "Paint window": paint_window,
    "binding holes": binding_holes,
    "circled": circled,
    "underlined": underlined,
    "transparent, trimmed": transparent_trimmed,
}


def photo(scene: Scene, ink: Values, rng: np.random.Generator) -> bytes:
    """The scene as a file: a phone's JPEG with the noise of its sensor, or a PNG."""
    image = scene(ink, rng)
    if image.mode == "RGBA" or rng.random() < 0.3:
        return png(image)
    values = np.asarray(image, float) + rng.normal(0, rng.uniform(0, 4), image.size[::-1])
    return saved(as_grey(values), "JPEG", quality=int(rng.integers(70, 95)))


def without_digit(rng: np.random.Generator) -> bytes:
    """A scene on which nothing was written."""
    scenes = [s for name, s in SCENES.items() if name not in ("circled", "transparent, trimmed")]
    return photo(scenes[rng.integers(len(scenes))], np.zeros((120, 90)), rng)
