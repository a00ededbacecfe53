"""One MNIST digit as the files that callers may really send, and pictures that are no digits.

``python -m tests.presentations_report`` makes the tables of docs/images.md from them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from training.not_digits import HELD_OUT_FONTS

EXIF_ORIENTATION = 0x0112
LETTERS = "abcdefhkmnprtuvwxyACDEFGHJKLMNPRTUVWXY"  # without those that are digits in some hand


def png(image: Image.Image, **options: Any) -> bytes:
    return saved(image, "PNG", compress_level=1, **options)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def enlarged(digit: np.ndarray, side: int = 280) -> Image.Image:
    """Light ink on black, smooth."""
    return Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)


def on_paper(digit: np.ndarray, side: int = 280) -> Any:
    """Black ink on white."""
    return ImageChops.invert(enlarged(digit, side))


def coloured(
    digit: np.ndarray, ink: Any = (30, 50, 160), paper: Any = (250, 240, 200)
) -> Image.Image:
    return Image.composite(
        Image.new("RGB", (280, 280), ink), Image.new("RGB", (280, 280), paper), enlarged(digit)
    )


def as_grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def ink_share(digit: np.ndarray) -> np.ndarray:
    return np.asarray(enlarged(digit), np.float64) / 255


def unchanged(digit: Any, rng: Any) -> bytes:
    return png(Image.fromarray(digit))


def dark_on_light_28(digit: Any, rng: Any) -> bytes:
    return png(Image.fromarray(255 - digit))


def light_on_dark_280(digit: Any, rng: Any) -> bytes:
    return png(enlarged(digit))


def dark_on_light_280(digit: Any, rng: Any) -> bytes:
    return png(on_paper(digit).convert("RGB"))


def colours(digit: Any, rng: Any) -> bytes:
    return png(coloured(digit))


def palette(digit: Any, rng: Any) -> bytes:
    return png(coloured(digit).quantize(16, dither=Image.Dither.NONE))


def ink_on_nothing(digit: Any, rng: Any) -> bytes:
    cut_out = Image.new("RGBA", (280, 280), "black")
    cut_out.putalpha(enlarged(digit))
    return png(cut_out)


def twelve_bits_in_sixteen(digit: Any, rng: Any) -> bytes:
    return png(Image.fromarray((4095 * (1 - ink_share(digit))).astype(np.uint16)))


def cmyk_jpeg(digit: Any, rng: Any) -> bytes:
    return saved(coloured(digit).convert("CMYK"), "JPEG")


def turned_by_exif(digit: Any, rng: Any) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # stored lying, to be turned clockwise
    lying = on_paper(digit).transpose(Image.Transpose.ROTATE_90)
    return saved(lying, "JPEG", exif=exif)


def webp(digit: Any, rng: Any) -> bytes:
    return saved(coloured(digit), "WEBP", method=0)


def bmp(digit: Any, rng: Any) -> bytes:
    return saved(on_paper(digit).convert("RGB"), "BMP")


def off_centre(digit: Any, rng: Any) -> bytes:
    canvas = Image.new("L", (640, 480), 255)
    canvas.paste(on_paper(digit), (int(rng.integers(0, 360)), int(rng.integers(0, 200))))
    return png(canvas)


def small_in_a_large_canvas(digit: Any, rng: Any) -> bytes:
    canvas = Image.new("L", (1000, 1000), 255)
    left, top = (int(n) for n in rng.integers(0, 944, 2))
    canvas.paste(on_paper(digit, 56), (left, top))
    return png(canvas)


def cropped_to_the_ink(digit: Any, rng: Any) -> bytes:
    image = enlarged(digit)
    box = image.point(lambda level: level > 40 and 255).getbbox()
    return png(ImageChops.invert(image.crop(box)))


def thin_strokes(digit: Any, rng: Any) -> bytes:
    return png(on_paper(digit, 112).filter(ImageFilter.MaxFilter(5)))


def thick_strokes(digit: Any, rng: Any) -> bytes:
    return png(on_paper(digit, 112).filter(ImageFilter.MinFilter(7)))


def uneven_light(digit: Any, rng: Any) -> bytes:
    y, x = np.mgrid[:280, :280] / 280 - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    paper = 200 + 80 * (np.cos(angle) * x + np.sin(angle) * y) - 80 * (x * x + y * y)
    photo = paper * (1 - 0.75 * ink_share(digit)) + rng.normal(0, 4, (280, 280))
    return saved(as_grey(photo), "JPEG", quality=85)


def rough_paper(digit: Any, rng: Any) -> bytes:
    grain = np.asarray(as_grey(128 + rng.normal(0, 100, (70, 70))).resize((280, 280))) / 255 - 0.5
    return png(as_grey((210 + 40 * grain) * (1 - 0.7 * ink_share(digit))))


def noise(digit: Any, rng: Any) -> bytes:
    return png(as_grey(30 + 180 * ink_share(digit) + rng.normal(0, 25, (280, 280))))


def noise_28(digit: Any, rng: Any) -> bytes:
    return png(as_grey(20 + 0.8 * digit + rng.normal(0, 15, (28, 28))))


def low_contrast(digit: Any, rng: Any) -> bytes:
    return png(as_grey(120 - 50 * ink_share(digit)))


def coarse_jpeg(digit: Any, rng: Any) -> bytes:
    return saved(on_paper(digit), "JPEG", quality=20)


def coarse_small_jpeg(digit: Any, rng: Any) -> bytes:
    return saved(on_paper(digit, 56), "JPEG", quality=30)


def framed(digit: Any, rng: Any) -> bytes:
    image = Image.new("L", (340, 340), 255)
    image.paste(on_paper(digit), (30, 30))
    ImageDraw.Draw(image).rectangle((0, 0, 339, 339), outline=60, width=6)
    return png(image)


def specks(digit: Any, rng: Any) -> bytes:
    image = on_paper(digit)
    draw = ImageDraw.Draw(image)
    for x, y in rng.integers(0, 278, (12, 2)).tolist():
        draw.ellipse((x, y, x + 3, y + 3), fill=40)
    return png(image)


Presentation = Callable[[np.ndarray, np.random.Generator], bytes]
PRESENTATIONS: dict[str, Presentation] = {
    function.__name__.replace("_", " "): function
    for function in (
        unchanged, dark_on_light_28, light_on_dark_280, dark_on_light_280, colours, palette,
        ink_on_nothing, twelve_bits_in_sixteen, cmyk_jpeg, turned_by_exif, webp, bmp, off_centre,
        small_in_a_large_canvas, cropped_to_the_ink, thin_strokes, thick_strokes, uneven_light,
        rough_paper, noise, noise_28, low_contrast, coarse_jpeg, coarse_small_jpeg, framed, specks,
    )
}  # fmt: skip


@functools.cache
def bundled_fonts() -> list[Path]:
    """The text fonts that matplotlib brings along: DejaVu."""
    fonts = Path(mpl.get_data_path(), "fonts/ttf").glob("DejaVu*.ttf")
    return sorted(font for font in fonts if "Display" not in font.name)  # that has few letters


def character(text: str, font: Path, side: int = 200) -> bytes:
    image = Image.new("L", (side, side), 255)
    face = ImageFont.truetype(font, side // 2)
    ImageDraw.Draw(image).text((side / 2, side / 2), text, fill=0, font=face, anchor="mm")
    return png(image)


def letter(rng: Any, fonts: Any = None) -> bytes:
    """A letter, of fonts that training does not use unless others are given."""
    fonts = fonts or [f for f in bundled_fonts() if f.stem in HELD_OUT_FONTS]
    return character(LETTERS[rng.integers(len(LETTERS))], fonts[rng.integers(len(fonts))])


def _around(count: int, radii: Sequence[float], turn: float) -> list[tuple[float, float]]:
    """Points around the middle, their distances from it in turn."""
    angles = turn + 2 * np.pi * np.arange(count * len(radii)) / (count * len(radii))
    distances = np.resize(radii, len(angles))
    return list(zip(np.cos(angles) * distances, np.sin(angles) * distances, strict=True))


HEART = [
    (16 * np.sin(t) ** 3 / 17,
     -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17)
    for t in np.linspace(0, 2 * np.pi, 60)
]  # fmt: skip
OUTLINES = (
    _around(4, [1], np.pi / 4), _around(3, [1], -np.pi / 2), _around(5, [1, 0.4], -np.pi / 2),
    _around(4, [1, 0.35], 0), HEART,
)  # fmt: skip


def shape(rng: np.random.Generator) -> bytes:
    """A square, triangle, star, spark or heart, drawn by lines or filled."""
    image = Image.new("L", (200, 200), 245)
    size, width = rng.uniform(40, 80), int(rng.integers(6, 20))
    outline = OUTLINES[rng.integers(len(OUTLINES))]
    points = [(100 + size * x, 100 + size * y * rng.uniform(0.95, 1.05)) for x, y in outline]
    brush = ImageDraw.Draw(image)
    if rng.random() < 0.25:
        brush.polygon(points, fill=25)
    else:
        brush.line([*points, points[0], points[1]], fill=25, width=width, joint="curve")
    return png(image)


def white_noise(rng: np.random.Generator) -> bytes:
    side = int(rng.choice([28, 100, 200]))
    return png(as_grey(rng.normal(128, rng.uniform(2, 60), (side, side))))


def texture(rng: np.random.Generator) -> bytes:
    """Clouds, waves or checks."""
    cloud = as_grey(rng.normal(128, 60, (160, 160)))
    blurred = np.asarray(cloud.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 8)))), float)
    field = (blurred - blurred.mean()) / blurred.std()
    y, x = np.mgrid[:160, :160]
    kind = rng.integers(3)
    if kind == 1:
        field += 3 * np.sin(x * rng.uniform(0.05, 0.5) + y * rng.uniform(-0.5, 0.5))
    elif kind == 2:
        checks = np.sin(x * rng.uniform(0.1, 0.5)) * np.sin(y * rng.uniform(0.1, 0.5))
        field = 2 * np.sign(checks) + 0.2 * field
    return png(as_grey(128 + field * rng.uniform(5, 40)))


def blank(rng: np.random.Generator) -> bytes:
    """Paper of any grey, all ink included, clean or with a little noise."""
    level, deviation = rng.uniform(0, 255), rng.choice([0, 1, 3])
    return png(as_grey(rng.normal(level, deviation, (120, 90))))


def several_digits(digits: Sequence[np.ndarray]) -> bytes:
    """Digits in a row."""
    row = np.zeros((112, 80 * len(digits) + 32), np.uint8)
    for place, digit in enumerate(digits):
        cell = row[:, 80 * place : 80 * place + 112]
        np.maximum(cell, np.asarray(enlarged(digit, 112)), out=cell)
    return png(Image.fromarray(255 - row))


def opened_for_display(file: bytes) -> Image.Image:
    """A file on a light grey desk, which shows through what is transparent."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    desk = Image.new("RGBA", image.size, (225, 225, 225))
    return Image.alpha_composite(desk, image).convert("RGB")
