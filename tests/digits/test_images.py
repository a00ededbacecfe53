"""Pictures of any kind against MNIST's form."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from digits import form
from digits.client import DigitClient
from digits.images import PictureError, examine, examine_grey, grey_of, normalise
from digits.ink import shrunk
from service.artifact.format import load_artifact
from service.artifact.repository import in_serving_order
from service.serving.engine import Engine
from service.serving.loader import ON_CPU
from tests import presentations as p
from tests import scenes
from tests.conftest import COMMITTED, SAMPLES, RunningServer
from tests.judge import judge

# Digits of the short form; one more of them wrong than among raw pixels is what chance allows.
SHORT = 60
THROUGH_SERVERS = (
    "dark on light 28", "palette", "ink on nothing", "twelve bits in sixteen", "cmyk jpeg",
    "turned by exif", "webp", "bmp", "small in a large canvas", "uneven light",
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_artifact(in_serving_order(COMMITTED)[0]).first_of(ON_CPU).model)


def shown(name: str, digits: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    return [p.PRESENTATIONS[name](digit, rng) for digit in digits]


@pytest.mark.parametrize("name", p.PRESENTATIONS)
def test_presentations_are_recognised_like_raw_pixels(
    name: Any, engine: Engine, sample: dict[str, np.ndarray]
) -> None:
    digits, labels = sample["images"][:SHORT], sample["labels"][:SHORT]
    seen = [examine(file) for file in shown(name, digits)]
    right = (engine.run(np.stack([s.pixels for s in seen])).argmax(axis=1) == labels).sum()
    right_of_raw = (engine.run(digits).argmax(axis=1) == labels).sum()
    assert right >= right_of_raw - 1
    assert np.mean([s.plausibility > 0.5 for s in seen]) >= 0.95


READ = (
    "ruled paper", "squared paper", "shadow, soft", "shadow, sharp across", "shadow of a hand",
    "sheet on a desk", "sticky note", "table on two sides", "black bars", "badge",
    "thin black frame", "form box around", "cell borders left over", "whiteboard glare",
    "transparent, trimmed",
)  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("pen", ["thick", "thin"])
def test_scenes_are_read(name: str, pen: str, sample: dict[str, np.ndarray]) -> None:
    read = partial(judge, precision="fp32")  # int8 rounds by CPU
    rng = np.random.default_rng(7)
    right = 0
    for digit, label in zip(sample["images"][:30], sample["labels"][:30].tolist(), strict=True):
        ink = scenes.thick(digit, rng) if pen == "thick" else scenes.thin(label, rng)
        grey = grey_of(scenes.photo(scenes.SCENES[name], ink, rng))
        right += read(examine_grey(grey, read))[0] == label
    assert right >= 26


def test_files_of_every_kind_through_real_servers(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    digits, labels = sample["images"][:10], sample["labels"][:10]
    with DigitClient(server.address) as client:
        for name in THROUGH_SERVERS:
            answer = client.classify_files(shown(name, digits))
            assert answer.digits == labels.tolist(), name
            scores = np.array([prediction.digit_score for prediction in answer.predictions])
            confidences = np.array([prediction.confidence for prediction in answer.predictions])
            assert (scores <= confidences).all()
            assert (scores > 0.5).sum() >= 9  # one is a 5 in two pieces of nearly the same size


def test_digits_in_the_networks_form_are_left_alone(sample: dict[str, np.ndarray]) -> None:
    same = [np.array_equal(normalise(digit), digit) for digit in sample["images"]]
    turned = [np.array_equal(normalise(255 - digit), digit) for digit in sample["images"]]
    assert np.mean(same) >= 0.99
    assert same == turned


def test_normalising_again_changes_little(sample: dict[str, np.ndarray]) -> None:
    for file in shown("uneven light", sample["images"][:20]):
        once = normalise(file)
        assert np.abs(normalise(once).astype(int) - once).mean() < 4


def test_result_has_mnists_form(sample: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    for digit in sample["images"][:40]:
        seen = normalise(p.off_centre(digit, rng)).astype(float)
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
        places = np.arange(28)
        assert abs(seen.sum(axis=1) @ places / seen.sum() - 14) <= 1
        assert abs(seen.sum(axis=0) @ places / seen.sum() - 14) <= 1
        assert seen.max() >= 250


def test_client_sends_what_the_server_would_see(server: RunningServer) -> None:
    files = [SAMPLES / f"{digit}.png" for digit in range(10)]
    with DigitClient(server.address) as client:
        by_server = client.classify_files(files).predictions
        by_client = client.classify(np.stack([normalise(file) for file in files])).predictions
    for one, other in zip(by_server, by_client, strict=True):
        assert np.array_equal(one.probabilities, other.probabilities)
        assert one.digit_score is not None


def test_path_bytes_image_and_array_are_the_same_picture(
    tmp_path: Path, sample: dict[str, np.ndarray]
) -> None:
    file = p.dark_on_light_280(sample["images"][3], None)
    path = tmp_path / "three.png"
    path.write_bytes(file)
    image = Image.open(path)
    grey, colour = np.asarray(image.convert("L")), np.asarray(image)
    forms = [path, str(path), file, image, grey, colour, grey / 255.0, grey.astype(np.uint16) * 257]
    first, *others = [normalise(form).astype(int) for form in forms]
    assert all(np.abs(other - first).max() <= 1 for other in others)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((0, 5), np.uint8),
        np.full((5, 5), np.nan),
        np.zeros((5, 5), complex),
        np.zeros((2, 3, 4, 5), np.uint8),
        b"",
        17,
    ],
)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    with pytest.raises(PictureError, match="picture: expected"):
        normalise(picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 2), (73, 71), (145, 1)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_even_pictures_of_any_shape_have_no_ink(shape: Any, level: int) -> None:
    seen = examine(np.full(shape, level, np.uint8))
    assert not seen.pixels.any()
    assert seen.plausibility == 0


def test_pictures_of_any_noise_give_an_answer() -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        shape = rng.integers(1, 200, 2)
        seen = examine(rng.integers(0, rng.integers(2, 257), shape).astype(np.uint8))
        assert seen.pixels.shape == (28, 28)
        assert 0 <= seen.plausibility <= 1


def test_noise_of_which_only_the_blur_is_ink_gives_an_answer() -> None:
    """A mask may hold none of the pixels that made its smoothed residual positive."""
    noise = np.random.default_rng(1743).integers(0, 256, (28, 28)).astype(np.uint8)
    assert examine(noise).pixels.shape == (28, 28)


def test_trimmed_shape_of_one_tone_is_ink_however_much_it_covers() -> None:
    image = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(image).ellipse((0, 0, 59, 59), fill=(20, 20, 20, 255))
    ImageDraw.Draw(image).ellipse((18, 18, 41, 41), fill=(0, 0, 0, 0))
    assert form.holes(normalise(image)) == 1


def test_blank_file_is_answered_with_a_score_of_zero(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    rng = np.random.default_rng(1)
    files = [p.unchanged(sample["images"][0], rng), *[p.blank(rng) for _ in range(20)]]
    with DigitClient(server.address) as client:
        digit, *blanks = client.classify_files(files).predictions
    assert (digit.digit_score or 0) > 0.9
    assert all(blank.digit_score == 0 for blank in blanks)


@pytest.mark.parametrize(
    ("make", "passing"),
    [(p.letter, 0.1), (p.shape, 0.1), (p.texture, 0.05), (p.white_noise, 0.02), (p.blank, 0.0)],
)
def test_score_tells_other_pictures_from_digits(
    make: Any, passing: float, engine: Engine, sample: dict[str, np.ndarray]
) -> None:
    def scores(files: Any) -> Any:
        seen = [examine(file) for file in files]
        probabilities, is_digit = engine.answer(np.stack([s.pixels for s in seen]))
        plausibility = np.array([s.plausibility for s in seen])
        return probabilities.max(axis=1) * is_digit * plausibility

    rng = np.random.default_rng(5)
    threshold = np.quantile(scores(shown("unchanged", sample["images"])), 0.05)
    assert (scores([make(rng) for _ in range(100)]) >= threshold).mean() <= passing


def test_digits_in_a_row_are_less_plausible_than_one(sample: Any) -> None:
    rows = [p.several_digits(sample["images"][i : i + 3]) for i in range(0, 90, 3)]
    assert np.mean([examine(row).plausibility < 0.5 for row in rows]) >= 0.8


def test_arrays_need_no_pillow(sample: dict[str, np.ndarray]) -> None:
    """The bare install is grpcio, protobuf and numpy."""
    script = (
        "import sys; sys.modules['PIL'] = None\n"
        "import numpy as np, digits.client\nfrom digits.images import normalise\n"
        "grey = np.full((60, 60), 255, np.uint8); grey[10:50, 28:33] = 0\n"
        "assert normalise(grey).any()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_strip_that_is_nearly_all_ink_is_an_upright_one(engine: Engine) -> None:
    """Cropped to its ink, a 1 leaves no paper but at the corners, and no surface fits that."""
    strip = Image.new("L", (50, 200), 255)
    ImageDraw.Draw(strip).rounded_rectangle((3, 3, 46, 196), 12, fill=0)
    seen = normalise(np.asarray(strip.filter(ImageFilter.GaussianBlur(6))))
    assert (seen[6:22, 13:15] > 200).all()
    assert engine.run(seen[None]).argmax() == 1


def test_hatched_strokes_are_not_worn_away() -> None:
    """Between its lines a hatched stroke is no ink; its width is that of the whole."""
    y, x = np.mgrid[:70, :70]
    hatched = (np.abs(np.hypot(x - 35, y - 35) - 22) < 8) & (x % 3 == 0)
    seen = examine(np.where(hatched, 0, 255).astype(np.uint8)).pixels
    assert (seen > 60).sum() >= 150


@pytest.mark.parametrize(("width", "least", "most"), [(2, 2.0, 3.2), (5, 2.6, 3.5), (9, 2.6, 4.0)])
def test_strokes_are_brought_to_the_usual_width(width: int, least: float, most: float) -> None:
    """A ring of 100 pixels, drawn with pens of 2 to 9 pixels of the box of 20."""
    ring = Image.new("L", (160, 160), 255)
    ImageDraw.Draw(ring).ellipse((30, 30, 130, 130), outline=0, width=4 * width)
    seen = normalise(np.asarray(ring)).astype(np.float32) / 255
    assert least <= form._stroke_width(seen) <= most


def test_large_photo_is_looked_at_in_small() -> None:
    """What is examined has a bounded number of pixels, whatever the file's."""
    photo = np.full((3000, 4000), 255, np.uint8)
    photo[900:2100, 1900:2100] = 0
    assert shrunk(photo, 72).shape == (54, 72)
    assert normalise(photo).any()
