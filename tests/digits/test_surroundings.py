"""What is around a digit is no part of it, and is no digit where there is none."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from digits.images import examine, examine_grey, grey_of, readings
from digits.ink import on_paper, shrunk
from digits.parts import parts
from tests import scenes
from tests.judge import judge
from tests.presentations import bundled_fonts, character, png
from tests.presentations import on_paper as written_on_paper
from tests.scenes_report import SURE

Sample = dict[str, Any]
read = partial(judge, precision="fp32")  # int8 rounds by CPU


@pytest.mark.parametrize("name", ["circled", "underlined", "form box touching"])
@pytest.mark.parametrize("pen", ["thick", "thin"])
def test_what_is_drawn_around_a_digit_is_taken_away(name: str, pen: str, sample: Sample) -> None:
    rng = np.random.default_rng(7)
    right = 0
    for digit, label in zip(sample["images"][:20], sample["labels"][:20].tolist(), strict=True):
        ink = scenes.thick(digit, rng) if pen == "thick" else scenes.thin(label, rng)
        grey = grey_of(scenes.photo(scenes.SCENES[name], ink, rng))
        right += read(examine_grey(grey, read))[0] == label
    assert right >= 18


@pytest.mark.parametrize("side", [40, 100, 300])
def test_base_of_a_1_is_no_underline(side: int) -> None:
    for font in bundled_fonts():
        assert read(examine_grey(grey_of(character("1", font, side)), read))[0] == 1, font.name


def test_digit_has_nothing_inside_of_it(sample: Sample) -> None:
    """Its strokes are wider in some places than in others, which is no ring around a digit."""
    for digit in sample["images"]:
        grey = np.asarray(written_on_paper(digit))
        assert not any(part.encloses for part in parts(on_paper(shrunk(grey, 72))))


def clothes(kind: str) -> Image.Image:
    """Cut out of MNIST's kind of picture: from its upper to its lower edge."""
    image = Image.new("L", (280, 280), 255)
    draw = ImageDraw.Draw(image)
    if kind == "trousers":
        draw.polygon([(95, 0), (185, 0), (200, 279), (155, 279), (140, 90), (125, 279), (80, 279)])
    else:
        draw.polygon([(90, 5), (190, 5), (270, 90), (235, 120), (200, 90), (200, 276), (80, 276),
                      (80, 90), (45, 120), (10, 90)])  # fmt: skip
    ImageDraw.floodfill(image, (140, 40), 70)
    return image


@pytest.mark.parametrize("kind", ["trousers", "shirt"])
@pytest.mark.parametrize("light", [False, True])
def test_solid_thing_is_looked_at_once(kind: str, light: bool) -> None:
    """Its folds and the gaps beside it have a digit's strokes, if they are looked for."""
    image = ImageOps.invert(clothes(kind)) if light else clothes(kind)
    grey = grey_of(png(image))
    first = next(readings(grey))
    assert first.alone
    assert read(examine_grey(grey, read))[1] < SURE


@pytest.mark.parametrize("side", ["left", "top"])
def test_what_ends_at_the_edge_is_no_plausible_digit(side: str) -> None:
    """A line, a table's edge or a bar of a screen there looks like a 1 or a 7."""
    picture = np.full((200, 200), 230, np.uint8)
    picture[20:180, :14] = 30
    assert examine(picture if side == "left" else picture.T).plausibility < 0.5


def test_digit_that_fills_the_picture_is_plausible() -> None:
    strip = np.full((200, 60), 230, np.uint8)
    strip[:, 9:51] = 30
    assert examine(strip).plausibility == 1


def test_scenes_without_a_digit_are_told() -> None:
    rng = np.random.default_rng(7)
    files = [scenes.without_digit(rng) for _ in range(60)]
    scores = [read(examine_grey(grey_of(file), read))[1] for file in files]
    assert sum(score >= SURE for score in scores) <= 3
