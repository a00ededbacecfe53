"""Pictures of any kind against MNIST's form, and hostile files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from functools import partial

import grpc
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile, ImageFilter

from digits import form
from digits.client import DigitClient, DigitError
from digits.files import grey, opened
from digits.images import PictureError, examine, examine_grey, grey_of, normalise
from digits.ink import shrunk
from service.artifact.format import load_artifact
from service.artifact.repository import in_serving_order
from service.serving.engine import Engine
from service.serving.loader import ON_CPU
from service.serving.pictures import Pictures
from service.serving.request import InvalidInputError
from tests import presentations as p
from tests import scenes
from tests.conftest import COMMITTED, SAMPLES
from tests.judge import judge

# Digits of the short form; one more of them wrong than among raw pixels is what chance allows.
SHORT = 60
THROUGH_SERVERS = (
    "dark on light 28", "palette", "ink on nothing", "twelve bits in sixteen", "cmyk jpeg",
    "turned by exif", "webp", "bmp", "small in a large canvas", "uneven light",
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Engine(load_artifact(in_serving_order(COMMITTED)[0]).first_of(ON_CPU).model)


def shown(name, digits):
    rng = np.random.default_rng(0)
    return [p.PRESENTATIONS[name](digit, rng) for digit in digits]


@pytest.mark.parametrize("name", p.PRESENTATIONS)
def test_presentations_are_recognised_like_raw_pixels(name, engine, sample):
    digits, labels = sample["images"][:SHORT], sample["labels"][:SHORT]
    seen = [examine(file) for file in shown(name, digits)]
    right = (engine.run(np.stack([s.pixels for s in seen])).argmax(axis=1) == labels).sum()
    right_of_raw = (engine.run(digits).argmax(axis=1) == labels).sum()
    assert right >= right_of_raw - 1
    assert np.mean([s.plausibility > 0.5 for s in seen]) >= 0.95


READ = (
    "ruled paper", "squared paper", "shadow, soft", "sheet on a desk", "sticky note",
    "table on two sides", "black bars", "badge", "thin black frame", "form box around",
    "cell borders left over", "transparent, trimmed",
)  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("pen", ["thick", "thin"])
def test_scenes_are_read(name, pen, sample):
    read = partial(judge, precision="fp32")  # int8 rounds by CPU
    rng = np.random.default_rng(7)
    right = 0
    for digit, label in zip(sample["images"][:30], sample["labels"][:30].tolist(), strict=True):
        ink = scenes.thick(digit, rng) if pen == "thick" else scenes.thin(label, rng)
        grey = grey_of(scenes.photo(scenes.SCENES[name], ink, rng))
        right += read(examine_grey(grey, read))[0] == label
    assert right >= 26


def test_files_of_every_kind_through_real_servers(server, sample):
    digits, labels = sample["images"][:10], sample["labels"][:10]
    with DigitClient(server.address) as client:
        for name in THROUGH_SERVERS:
            answer = client.classify_files(shown(name, digits))
            assert answer.digits == labels.tolist(), name
            scores = np.array([prediction.digit_score for prediction in answer.predictions])
            confidences = np.array([prediction.confidence for prediction in answer.predictions])
            assert (scores <= confidences).all()
            assert (scores > 0.5).sum() >= 9  # one is a 5 in two pieces of nearly the same size


def test_digits_in_the_networks_form_are_left_alone(sample):
    same = [np.array_equal(normalise(digit), digit) for digit in sample["images"]]
    turned = [np.array_equal(normalise(255 - digit), digit) for digit in sample["images"]]
    assert np.mean(same) >= 0.99
    assert same == turned


def test_normalising_again_changes_little(sample):
    for file in shown("uneven light", sample["images"][:20]):
        once = normalise(file)
        assert np.abs(normalise(once).astype(int) - once).mean() < 4


def test_result_has_mnists_form(sample):
    rng = np.random.default_rng(2)
    for digit in sample["images"][:40]:
        seen = normalise(p.off_centre(digit, rng)).astype(float)
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
        places = np.arange(28)
        assert abs(seen.sum(axis=1) @ places / seen.sum() - 14) <= 1
        assert abs(seen.sum(axis=0) @ places / seen.sum() - 14) <= 1
        assert seen.max() >= 250


def test_client_sends_what_the_server_would_see(server):
    files = [SAMPLES / f"{digit}.png" for digit in range(10)]
    with DigitClient(server.address) as client:
        by_server = client.classify_files(files).predictions
        by_client = client.classify(np.stack([normalise(file) for file in files])).predictions
    for one, other in zip(by_server, by_client, strict=True):
        assert np.array_equal(one.probabilities, other.probabilities)
        assert one.digit_score is not None


def test_path_bytes_image_and_array_are_the_same_picture(tmp_path, sample):
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
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(PictureError, match="picture: expected"):
        normalise(picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 2), (73, 71), (145, 1)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_even_pictures_of_any_shape_have_no_ink(shape, level):
    seen = examine(np.full(shape, level, np.uint8))
    assert not seen.pixels.any()
    assert seen.plausibility == 0


def test_pictures_of_any_noise_give_an_answer():
    rng = np.random.default_rng(3)
    for _ in range(150):
        shape = rng.integers(1, 200, 2)
        seen = examine(rng.integers(0, rng.integers(2, 257), shape).astype(np.uint8))
        assert seen.pixels.shape == (28, 28)
        assert 0 <= seen.plausibility <= 1


def test_blank_file_is_answered_with_a_score_of_zero(server, sample):
    rng = np.random.default_rng(1)
    files = [p.unchanged(sample["images"][0], rng), *[p.blank(rng) for _ in range(20)]]
    with DigitClient(server.address) as client:
        digit, *blanks = client.classify_files(files).predictions
    assert digit.digit_score > 0.9
    assert all(blank.digit_score == 0 for blank in blanks)


@pytest.mark.parametrize(
    ("make", "passing"),
    [(p.letter, 0.1), (p.shape, 0.1), (p.texture, 0.05), (p.white_noise, 0.02), (p.blank, 0.0)],
)
def test_score_tells_other_pictures_from_digits(make, passing, engine, sample):
    def scores(files):
        seen = [examine(file) for file in files]
        probabilities, is_digit = engine.answer(np.stack([s.pixels for s in seen]))
        plausibility = np.array([s.plausibility for s in seen])
        return probabilities.max(axis=1) * is_digit * plausibility

    rng = np.random.default_rng(5)
    threshold = np.quantile(scores(shown("unchanged", sample["images"])), 0.05)
    assert (scores([make(rng) for _ in range(100)]) >= threshold).mean() <= passing


def test_digits_in_a_row_are_less_plausible_than_one(sample):
    rows = [p.several_digits(sample["images"][i : i + 3]) for i in range(0, 90, 3)]
    assert np.mean([examine(row).plausibility < 0.5 for row in rows]) >= 0.8


def huge(kind, **options):
    """30,000 x 20,000 pixels in a few kilobytes."""
    return p.saved(Image.new("1" if kind == "PNG" else "L", (30_000, 20_000)), kind, **options)


def saved_twice(side, **options):
    """A JPEG that says it has a further picture (MPO), as some cameras and phones write them."""
    picture = Image.new("L", (side, side), 99)
    return p.saved(picture, "MPO", save_all=True, append_images=[picture], **options)


def many_scans(data, scans):
    """A progressive JPEG whose first picture's last scan comes again and again."""
    end = data.index(b"\xff\xd9")
    last = data.rindex(b"\xff\xda", 0, end)
    return data[:last] + data[last:end] * scans + data[end:]


def many_chunks(data, chunks):
    """A PNG with empty chunks of text behind its header, which is 33 bytes with the signature."""
    empty = bytes(4) + b"tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    return data[:33] + empty * chunks + data[33:]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            many_chunks(p.png(Image.new("L", (90, 90))), 20_000),
            "expected a PNG of at most 16,384 chunks, got more",
        ),
        (huge("PNG"), "expected an image of at most 16,777,216 pixels, got 30000x20000"),
        (
            many_scans(p.saved(Image.new("L", (64, 64), 99), "JPEG", progressive=True), 200),
            r"expected a JPEG of at most 64 scans, got 2\d\d scans",
        ),
        (
            many_scans(saved_twice(64, progressive=True), 200),
            r"expected a JPEG of at most 64 scans, got 2\d\d scans",
        ),
        (b"GIF89a" + bytes(100), "expected a PNG, JPEG, WebP or BMP file, got 106 bytes of GIF"),
        (bytes(4) + b"ftypheic" + bytes(9), "expected a PNG, .* file, got 21 bytes of HEIC"),
        (b"<svg xmlns=''/>", "expected a PNG, .* file, got 15 bytes of SVG"),
        (p.png(Image.new("L", (90, 90)))[:-40], "expected a readable image file, got a damaged"),
    ],
)
def test_hostile_file_is_refused_by_its_place(server, file, expected):
    good = (SAMPLES / "7.png").read_bytes()
    with DigitClient(server.address) as client:
        with pytest.raises(DigitError) as caught:
            client.classify_files([good, file])
        assert client.classify_files([good]).digits == [7]
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(r"encoded\.files\[1\]: " + expected, caught.value.message)
    assert list(caught.value.violations) == ["encoded.files[1]"]


def test_pillows_settings_are_the_processs():
    """Whoever uses the client may have other pictures to read."""
    script = (
        "from PIL import Image, PngImagePlugin\n"
        "def settings():\n"
        "    return [{k: v for k, v in vars(m).items() if k.startswith('MAX_')}\n"
        "            for m in (Image, PngImagePlugin)]\n"
        "before = settings()\n"
        "import digits.client, digits.files\n"
        "from digits.images import normalise\n"
        f"normalise({str(SAMPLES / '7.png')!r})\n"
        "assert settings() == before and all(before)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 2**28, None])
def test_own_bound_of_pixels_holds_under_any_setting_of_pillow(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(PictureError, match="expected an image of at most 16,777,216 pixels, got"):
        normalise(huge("PNG"))


SEVEN = (SAMPLES / "7.png").read_bytes()
# Where memory may run out, or a bug be, while a picture is read.
STEPS = {
    "open": "digits.files.Image.open",
    "load": "PIL.ImageFile.ImageFile.load",
    "transpose": "PIL.Image.Image.transpose",
    "convert": "PIL.Image.Image.convert",
    "array": "digits.files.np.asarray",
}


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("step", STEPS)
def test_lack_of_memory_is_not_the_fault_of_the_file(monkeypatch, sample, step):
    turned = p.turned_by_exif(sample["images"][0], None)
    with monkeypatch.context() as patched:
        patched.setattr(STEPS[step], failing(MemoryError))
        with pytest.raises(MemoryError):
            normalise(turned)


def test_lack_of_memory_that_a_decoder_met_is_not_the_fault_of_the_file(monkeypatch):
    """Pillow gives decoders a number to say so, and makes this of it."""
    error = ImageFile._get_oserror(-9, encoder=False)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", failing(error))
    with pytest.raises(MemoryError, match="out of memory"):
        normalise(SEVEN)


@pytest.mark.parametrize("step", ["digits.files._upright", "PIL.Image.Image.convert"])
def test_bug_is_not_the_fault_of_the_file(monkeypatch, step):
    with monkeypatch.context() as patched:
        patched.setattr(step, failing(TypeError("a bug of ours")))
        with pytest.raises(TypeError, match="a bug of ours"):
            normalise(SEVEN)


def test_lack_of_memory_for_an_array_of_colours_is_not_its_fault(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("digits.files.Image.fromarray", failing(MemoryError))
        with pytest.raises(MemoryError):
            normalise(np.zeros((9, 9, 3), np.uint8))


def test_pixels_of_a_request_are_bounded_together():
    file = p.saved(Image.new("1", (4096, 4096)), "PNG")  # 2 kilobytes
    work = Pictures([file] * 5)
    for index in range(4):
        work.do(index)
    with pytest.raises(InvalidInputError, match=r"files\[4\]: expected at most 67,108,864 pixel"):
        work.do(4)


def test_jpeg_of_several_pictures_is_decoded_small_like_any_other():
    with opened(saved_twice(2400)) as image:
        assert image.format == "JPEG"
        assert grey(image).shape == (600, 600)


def test_image_that_claims_more_pixels_than_allowed_takes_no_memory():
    """In a process of its own, which may have little more memory than it starts with."""
    script = (
        "import resource, sys\n"
        "from digits.images import PictureError, normalise\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try:\n    normalise(sys.stdin.buffer.read())\n"
        "except PictureError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=huge("PNG"), capture_output=True, check=True, timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert b"at most 16,777,216 pixels, got more" in done.stdout


def test_photo_of_24_megapixels_is_read():
    photo = Image.new("L", (6000, 4000), 230)
    ImageDraw.Draw(photo).line((3000, 1000, 3000, 3000), fill=20, width=300)
    assert normalise(p.saved(photo, "JPEG"))[8:20, 13:15].min() > 200


def test_damaged_exif_is_no_reason_to_refuse(sample):
    good = p.turned_by_exif(sample["images"][0], None)
    place = good.index(b"Exif\0\0") + 6
    damaged = good[:place] + b"\xff" * 16 + good[place + 16 :]
    assert normalise(damaged).any()


def test_arrays_need_no_pillow(sample):
    """The bare install is grpcio, protobuf and numpy."""
    script = (
        "import sys; sys.modules['PIL'] = None\n"
        "import numpy as np, digits.client\nfrom digits.images import normalise\n"
        "grey = np.full((60, 60), 255, np.uint8); grey[10:50, 28:33] = 0\n"
        "assert normalise(grey).any()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_strip_that_is_nearly_all_ink_is_an_upright_one(engine):
    """Cropped to its ink, a 1 leaves no paper but at the corners, and no surface fits that."""
    strip = Image.new("L", (50, 200), 255)
    ImageDraw.Draw(strip).rounded_rectangle((3, 3, 46, 196), 12, fill=0)
    seen = normalise(np.asarray(strip.filter(ImageFilter.GaussianBlur(6))))
    assert (seen[6:22, 13:15] > 200).all()
    assert engine.run(seen[None]).argmax() == 1


def test_hatched_strokes_are_not_worn_away():
    """Between its lines a hatched stroke is no ink; its width is that of the whole."""
    y, x = np.mgrid[:70, :70]
    hatched = (np.abs(np.hypot(x - 35, y - 35) - 22) < 8) & (x % 3 == 0)
    seen = examine(np.where(hatched, 0, 255).astype(np.uint8)).pixels
    assert (seen > 60).sum() >= 150


@pytest.mark.parametrize(("width", "least", "most"), [(2, 2.0, 3.2), (5, 2.6, 3.5), (9, 2.6, 4.0)])
def test_strokes_are_brought_to_the_usual_width(width, least, most):
    """A ring of 100 pixels, drawn with pens of 2 to 9 pixels of the box of 20."""
    ring = Image.new("L", (160, 160), 255)
    ImageDraw.Draw(ring).ellipse((30, 30, 130, 130), outline=0, width=4 * width)
    seen = normalise(np.asarray(ring)).astype(np.float32) / 255
    assert least <= form._stroke_width(seen) <= most


def test_large_photo_is_looked_at_in_small():
    """What is examined has a bounded number of pixels, whatever the file's."""
    photo = np.full((3000, 4000), 255, np.uint8)
    photo[900:2100, 1900:2100] = 0
    assert shrunk(photo, 72).shape == (54, 72)
    assert normalise(photo).any()
