"""The sample of classified images: who is drawn, what is kept, and that no call ever waits."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from digits.client import DigitClient
from service.telemetry import samples as module
from service.telemetry.samples import FAILED, FULL, WRITTEN, Listeners, SampleError, Samples
from tests.conftest import RunningServer, wait_until
from training.own import read_own

Unhurried = 3600.0


@pytest.fixture
def counted() -> Any:
    return Counter()


@pytest.fixture
def make(
    tmp_path: Path, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Samplers that write when they are closed and not before."""
    monkeypatch.setattr(module, "FLUSH_S", Unhurried)
    made = []

    def start(per_s: Any = 5, folder: Any = tmp_path / "kept") -> Any:
        def count(result: str, images: int) -> None:
            counted[result] += images

        made.append(Samples(folder, per_s, count))
        return made[-1]

    yield start
    for each in made:
        each.close()


def batch(*confidences: Any, first: int = 0, pixels: Any = None) -> Any:
    """A batch of one request; image k holds the value k."""
    number = len(confidences)
    probabilities = np.zeros((number, 10), np.float32)
    for row, confidence in enumerate(confidences):
        probabilities[row] = (1 - confidence) / 9
        probabilities[row, row % 10] = confidence
    images = b"".join(bytes([k % 256]) * 784 for k in range(first + number))
    request = SimpleNamespace(images=memoryview(pixels or images))
    return SimpleNamespace(
        predictions=SimpleNamespace(probabilities=probabilities), parts=[(request, first, number)]
    )


def files(folder: Path) -> list[Any]:
    return sorted(folder.glob("*/*.png"))


def test_so_many_are_kept_of_a_second_whatever_was_classified(
    make: Callable[..., Any], counted: Any, tmp_path: Path
) -> None:
    sampler = make(per_s=5)
    for _ in range(30):
        sampler.batch(batch(*[0.9] * 20))
    sampler.close()
    assert len(files(tmp_path / "kept")) == 5
    assert counted == {WRITTEN: 5}


def test_unsure_answers_are_drawn_more_often_and_sure_ones_too(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    sampler = make(per_s=200)
    for _ in range(100):
        sampler.batch(batch(*[0.999] * 9, 0.3))
    sampler.close()
    kept = Counter(path.name[:5] for path in files(tmp_path / "kept"))
    assert sum(kept.values()) == 200
    # 100 of the 1,000 are unsure, and weigh 15 times as much.
    assert kept["0.300"] > 60
    assert kept["0.999"] > 20


def test_file_holds_the_image_under_its_digit_and_nothing_of_its_caller(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    sampler = make(per_s=50)
    sampler.batch(batch(*[0.9] * 10, first=3))
    sampler.close()
    kept = files(tmp_path / "kept")
    assert len(kept) == 10
    for path in kept:
        digit = int(path.parent.name)
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((28, 28), "L")
            assert set(image.tobytes()) == {3 + digit}
            assert image.info == {}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


def test_folder_that_is_a_file_is_an_error_at_the_start(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleError, match=r"--sample-dir: .*file: "):
        make(folder=tmp_path / "file")


def test_failure_is_logged_once_and_counted(
    make: Callable[..., Any],
    counted: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = make()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full_disk)
    for _ in range(3):
        sampler.batch(batch(0.5, 0.5))
        sampler._flush()
    assert counted == {FAILED: 6}
    assert caplog.text.count("samples are not written: ") == 1
    monkeypatch.undo()
    monkeypatch.setattr(module, "FLUSH_S", Unhurried)
    sampler.batch(batch(0.5))
    sampler._flush()
    assert counted == {FAILED: 6, WRITTEN: 1}


def test_full_folder_is_left_as_it_is_until_files_are_taken_out(
    make: Callable[..., Any], counted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 3)
    sampler = make()
    for _ in range(2):
        sampler.batch(batch(0.5, 0.5, 0.5, 0.5))
        sampler._flush()
    assert counted == {FULL: 1 + 4}
    for path in files(tmp_path / "kept"):
        path.unlink()
    sampler.batch(batch(0.5))
    sampler._flush()
    assert counted == {FULL: 5, WRITTEN: 1}


def test_listener_that_raises_keeps_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def batch(self, _: Any) -> None:
            raise RuntimeError("broken")

        refused = batch

    told: list[Any] = []
    good = SimpleNamespace(batch=told.append, refused=told.append)
    listeners: Any = Listeners(Broken(), good)
    listeners.batch("a batch")
    listeners.refused("some")
    assert told == ["a batch", "some"]
    assert "broken" in caplog.text


def counter(server: RunningServer, result: Any) -> float:
    import urllib.request

    text = urllib.request.urlopen(f"{server.http}/metrics", timeout=30).read().decode()
    [line] = [each for each in text.splitlines()
              if each.startswith(f'digits_samples_total{{result="{result}"}}')]  # fmt: skip
    return float(line.split()[-1])


def test_server_keeps_what_training_reads_and_calls_go_on_without_the_folder(
    start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    server = start_server(f"--sample-dir={folder}", "--sample-per-s=100")
    with DigitClient(server.address) as client:
        client.classify(sample["images"][:100])
        wait_until(lambda: counter(server, "written") >= 50)
        shown = read_own(folder)
        originals = {image.tobytes() for image in sample["images"]}
        kept = [np.asarray(Image.open(path)).tobytes() for path in files(folder)]
        assert set(kept) <= originals
        assert len(shown.split) + shown.duplicates + len(shown.skipped) == len(kept)
        folder.rename(tmp_path / "away")
        client.classify(sample["images"][:100])
        wait_until(lambda: counter(server, "failed") > 0)
        assert len(client.classify(sample["images"][:5]).predictions) == 5
    assert "samples are not written" in server.log_text()
    assert server.stop() == 0


def test_server_without_the_setting_keeps_nothing_and_a_wrong_one_exits_with_2(
    tmp_path: Path,
) -> None:
    import subprocess
    import sys

    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "service.cli", "serve", "--grpc-port=0", "--http-port=0"]
    done = subprocess.run(
        [*command, f"--sample-dir={tmp_path / 'file'}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--sample-dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]
