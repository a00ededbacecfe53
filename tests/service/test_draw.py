"""The page to draw on, in a real Chromium: what a person does, sees, and is told."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.ops_http.app import MAX_BODY_BYTES
from tests.conftest import SAMPLES, RunningServer, running_server, wait_until
from tests.service.http import STARTED, ask, metric

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
    ),
]
TIMEOUT_MS = 30_000
PLAIN_NAME = "digits.test"  # of this machine, though a browser can not know
NOTHING = "\u2013"  # the page's dash
# A 3, in parts of the drawing area.
THREE = [
    (0.32, 0.24), (0.42, 0.17), (0.55, 0.17), (0.64, 0.25), (0.63, 0.36), (0.53, 0.45),
    (0.43, 0.48), (0.56, 0.51), (0.66, 0.60), (0.66, 0.72), (0.56, 0.81), (0.43, 0.82),
    (0.32, 0.75),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Without its sandbox: a container's root has none to use, and only our own page is opened.
        arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {PLAIN_NAME} 127.0.0.1"]
        chromium = playwright.chromium.launch(
            timeout=120_000, executable_path=CHROMIUM, args=arguments
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("playground") / "log"
    with running_server(log, "--playground") as running:
        yield running


@pytest.fixture
def open_page(browser: Any, playground: RunningServer) -> Iterator[Callable[..., Any]]:
    """Opens /draw; when the test ends, nothing may have been wrong or loaded from elsewhere."""
    contexts, complaints = [], []

    def complain(text: str, *, refused: Any) -> None:
        if not (refused and text.startswith("Failed to load resource")):
            complaints.append(text)

    def open_it(server: Any = playground, *, refused: bool = False, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda m: m.type == "error" and complain(m.text, refused=refused))
        page.on("pageerror", lambda error: complain(str(error), refused=False))
        page.on(
            "request",
            lambda request: request.url.startswith(server.http) or complaints.append(request.url),
        )
        page.goto(f"{server.http}/draw")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def draw(page: Any, points: Any) -> None:
    """Draws with the mouse, as slowly as a hand: in many small steps."""
    box = page.locator("#drawing").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y, steps=4)
    page.mouse.up()


def expect_digit(page: Any, digit: Any) -> None:
    expect(page.locator("#digit")).to_have_text(str(digit), timeout=TIMEOUT_MS)


def test_it_works_under_a_name_that_browsers_do_not_trust(
    open_page: Callable[..., Any], playground: RunningServer
) -> None:
    """Over plain HTTP from elsewhere: they tell the server the page's origin, and no more."""
    url = f"http://{PLAIN_NAME}:{urlsplit(playground.http).port}"
    sent = []
    page = open_page(replace(playground, http=url))
    page.on("request", lambda request: sent.append(request.all_headers()))
    draw(page, THREE)
    expect_digit(page, 3)
    assert sent[-1]["origin"] == url
    assert "sec-fetch-site" not in sent[-1]


def test_drawing_a_3_shows_a_3_and_how_it_came_about(
    open_page: Callable[..., Any], playground: RunningServer
) -> None:
    page = open_page()
    expect(page.locator("#digit")).to_have_text(NOTHING)
    draw(page, THREE)
    expect_digit(page, 3)
    best = page.locator("#bars li.best")
    expect(best).to_contain_text("3")
    # At once: the page may get another answer between two looks.
    confidence, percents = page.evaluate(
        "[confidence.textContent, [...document.querySelectorAll('#bars .percent')]"
        ".map(percent => percent.textContent)]"
    )
    assert len(percents) == 10
    assert sum(float(text.split()[0]) for text in percents) == pytest.approx(100, abs=0.6)
    assert confidence == percents[3]
    model = page.locator("#model").text_content()
    assert playground.announced["sha256"][:12] in model
    assert re.fullmatch(r"[\d.]+ (µs|ms), in a batch of \d+", page.inner_text("#inference"))
    assert re.fullmatch(r"[\d.]+ ms", page.inner_text("#round-trip"))


def test_what_the_network_saw_is_shown_as_the_server_told_it(open_page: Callable[..., Any]) -> None:
    page = open_page()
    with page.expect_response("**/v1/classify") as caught:
        draw(page, THREE[:1])
    pixels = base64.b64decode(caught.value.json()["predictions"][0]["pixels"])
    shown = (
        "[...seen.getContext('2d').getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 == 0)"
    )
    assert max(pixels) > 128
    wait_until(lambda: page.evaluate(shown) == list(pixels), 30)


def test_clear_and_undo_take_back(open_page: Callable[..., Any]) -> None:
    page = open_page()
    draw(page, THREE)
    expect_digit(page, 3)
    draw(page, [(0.1, 0.1), (0.1, 0.9), (0.9, 0.9)])
    page.get_by_role("button", name="Undo").click()
    expect_digit(page, 3)
    page.get_by_role("button", name="Clear").click()
    expect_digit(page, NOTHING)
    expect(page.locator("#bars li.best")).to_have_count(0)


def test_a_finger_draws_on_a_phone_and_nothing_is_cut_off(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    box = page.locator("#drawing").bounding_box()
    points = [
        {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in THREE
    ]
    session = page.context.new_cdp_session(page)
    touch = "Input.dispatchTouchEvent"
    session.send(touch, {"type": "touchStart", "touchPoints": points[:1]})
    for point in points[1:]:
        session.send(touch, {"type": "touchMove", "touchPoints": [point]})
    session.send(touch, {"type": "touchEnd", "touchPoints": []})
    expect_digit(page, 3)
    assert page.evaluate("scrollY") == 0  # drawing does not scroll
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator("button, #choose").all():
        assert button.bounding_box()["height"] >= 44  # what a finger can hit


@pytest.mark.parametrize("size", [(360, 640), (1280, 800)])
def test_the_answer_is_seen_without_scrolling(
    open_page: Callable[..., Any], tmp_path: Path, size: tuple[int, int]
) -> None:
    from PIL import Image

    width, height = size
    phone: dict[str, Any] = {"is_mobile": True, "has_touch": True} if width < 500 else {}
    page = open_page(viewport={"width": width, "height": height}, refused=True, **phone)

    def expect_on_screen(*selectors: str) -> None:
        for selector in selectors:
            box = page.locator(selector).bounding_box()
            assert box["y"] >= 0, selector
            assert box["y"] + box["height"] <= height, selector
            assert box["x"] + box["width"] <= width, selector
        assert page.evaluate("scrollY") == 0

    draw(page, THREE)
    expect_digit(page, 3)
    expect_on_screen("#drawing", "#clear", "#choose", "#digit", "#confidence", "#seen")
    Image.new("L", (60, 60), 255).save(tmp_path / "blank.png")
    page.set_input_files("#file", tmp_path / "blank.png")
    expect(page.locator("#confidence")).to_contain_text("unsure", timeout=TIMEOUT_MS)
    expect(page.locator("main")).to_have_class("unsure")
    expect_on_screen("#drawing", "#clear", "#choose", "#digit", "#confidence", "#seen")
    Image.new("L", (9, 9)).save(tmp_path / "moving.gif")
    page.set_input_files("#file", tmp_path / "moving.gif")
    expect(page.get_by_role("alert")).to_contain_text("GIF", timeout=TIMEOUT_MS)
    expect(page.locator("main")).not_to_have_class("unsure")
    expect_on_screen("#drawing", "#clear", "#choose", "#problem", "#digit", "#confidence")


def test_a_photo_that_is_larger_than_the_server_takes_is_shrunk(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    digit = Image.open(SAMPLES / "7.png").convert("L").resize((600, 600))
    ink = Image.new("L", (2400, 1800))
    ink.paste(digit, (900, 600))
    noise = np.random.default_rng(1).normal(0, 8, (1800, 2400, 3))
    tones = 200 - np.asarray(ink)[..., None] * 0.7 + noise
    Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8)).save(tmp_path / "photo.bmp")
    assert (tmp_path / "photo.bmp").stat().st_size > MAX_BODY_BYTES
    page = open_page()
    page.set_input_files("#file", tmp_path / "photo.bmp")
    expect_digit(page, 7)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_digit_can_be_drawn_and_cleared_by_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.locator("#drawing")).to_be_focused()
    expect(page.locator("#pen")).to_be_visible()
    page.keyboard.press("Space")
    for _ in range(16):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    expect_digit(page, 1)
    for _ in range(3):
        page.keyboard.press("ArrowLeft")  # the pen is up
    expect_digit(page, 1)
    page.keyboard.press("Delete")
    expect_digit(page, NOTHING)
    for name in ("Clear", "Undo"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()


TRANSFER = """([name, type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""


def transfer(page: Any, path: Any, kind: str = "image/png") -> Any:
    """A file on its way from another program."""
    data = base64.b64encode(path.read_bytes()).decode()
    return page.evaluate_handle(TRANSFER, [path.name, kind, data])


def test_a_picture_can_be_dropped_pasted_and_chosen(open_page: Callable[..., Any]) -> None:
    page = open_page()
    for kind in ("dragover", "drop"):
        handle = transfer(page, SAMPLES / "7.png")
        page.dispatch_event("body", kind, {"dataTransfer": handle})
    expect_digit(page, 7)
    paste = "t => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: t }))"
    transfer(page, SAMPLES / "2.png").evaluate(paste)
    expect_digit(page, 2)
    page.set_input_files("#file", SAMPLES / "7.png")
    expect_digit(page, 7)
    draw(page, THREE)  # begins anew
    expect_digit(page, 3)


def test_a_photo_of_dark_ink_on_paper_is_sent_as_it_is(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    from PIL import Image, ImageOps

    page = open_page()
    digit = ImageOps.invert(Image.open(SAMPLES / "7.png").convert("L")).resize((300, 300))
    photo = Image.new("RGB", (800, 500), "white")
    photo.paste(digit, (420, 130))
    photo.save(tmp_path / "photo.jpg")
    with page.expect_request("**/v1/classify") as caught:
        page.set_input_files("#file", tmp_path / "photo.jpg")
    assert caught.value.header_value("content-type") == "image/jpeg"
    expect_digit(page, 7)
    assert float(page.inner_text("#score").split()[0]) > 50
    page.get_by_role("button", name="Clear").click()
    draw(page, [(0.2, 0.9), (0.8, 0.9)])  # a line on the ground is no digit
    expect(page.locator("#score")).to_have_text(re.compile(r"^[0-4]?\d\.\d %$"), timeout=TIMEOUT_MS)


@pytest.mark.parametrize(
    ("name", "content", "got"),
    [
        ("notes$&.txt", b"no picture", "10 bytes of something else"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "12 bytes of HEIC; convert it to JPEG"),
        ("draft.svg", b"<svg/>", "6 bytes of SVG; convert it to PNG"),
        ("moving.gif", None, "bytes of GIF; convert it to PNG"),  # which a browser can show
    ],
)
def test_what_the_server_refuses_clears_the_answer(
    open_page: Callable[..., Any], tmp_path: Path, name: str, content: bytes | None, got: str
) -> None:
    from PIL import Image

    page = open_page(refused=True)
    draw(page, THREE)
    expect_digit(page, 3)
    path = tmp_path / name
    if content is None:
        Image.new("L", (9, 9)).save(path)
    else:
        path.write_bytes(content)
    page.set_input_files("#file", path)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(f"{name}: expected a PNG, JPEG, WebP or BMP file, got ")
    expect(alert).to_contain_text(got)
    expect(page.locator("#digit")).to_have_text(NOTHING)
    expect(page.locator("#confidence")).to_have_text("no answer")
    expect(page.locator("#bars li.best")).to_have_count(0)
    draw(page, THREE)
    expect_digit(page, 3)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_while_the_server_drains_the_page_says_so_and_after_that_too(
    open_page: Callable[..., Any], start_server: Callable[..., RunningServer]
) -> None:
    server = start_server("--playground", "--grace-s=60")
    page = open_page(server, refused=True)
    draw(page, THREE)
    expect_digit(page, 3)
    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        files = digits_pb2.EncodedImages(files=[(SAMPLES / "7.png").read_bytes()] * 4000)
        request = digits_pb2.ClassifyRequest(encoded=files)
        busy = [stub.Classify.future(request, timeout=60) for _ in range(20)]  # holds the drain
        wait_until(lambda: metric(server, STARTED) == len(busy))
        server.process.terminate()
        wait_until(lambda: ask(server, "/healthz")[0] == 503)
        alert = page.get_by_role("alert")
        draw(page, THREE[:2])
        expect(alert).to_contain_text("the server is shutting down", timeout=TIMEOUT_MS)
        for call in busy:
            call.cancel()
        assert server.process.wait(60) == 0
        expect(alert).to_contain_text("The server does not answer", timeout=TIMEOUT_MS)


def test_dark_and_light_follow_the_system(open_page: Callable[..., Any]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = open_page(color_scheme="light").evaluate(colour)
    dark = open_page(color_scheme="dark").evaluate(colour)
    assert (light, dark) == ("rgb(246, 247, 249)", "rgb(16, 18, 22)")
