from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from digits.cli.main import main
from digits.cli.output import drawn
from digits.cli.sources import PicturesError, items_of
from tests.conftest import SAMPLES, RunningServer

SEVEN, THREE = str(SAMPLES / "7.png"), str(SAMPLES / "3.png")
CLASSIFY = [sys.executable, "-m", "digits", "classify"]


def predicted(text: Any) -> list[tuple[Any, Any]]:
    """File and digit of each prediction of a JSON document."""
    return [(each["file"], each["digit"]) for each in json.loads(text)["predictions"]]


def test_table_with_what_the_network_saw(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--address", server.address, SEVEN, THREE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "digit", "confidence", "score", "runner-up"]
    assert lines[1].split()[1] == "7"
    second = next(number for number, line in enumerate(lines) if "3.png" in line)
    assert lines[second].split()[1] == "3"
    picture = lines[2:second]
    assert 9 <= len(picture) <= 12
    assert set("".join(picture)) == set(" ▀▄█")
    assert lines[-1].startswith("model digits/")
    assert max(map(len, lines)) <= 80


def test_many_rows_have_no_pictures_unless_asked_for(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = str(SAMPLES)
    assert main(["classify", "--address", server.address, samples]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    assert main(["classify", "--pictures", "--address", server.address, samples]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100


def test_pictures_are_what_the_network_saw(sample: dict[str, np.ndarray]) -> None:
    image = sample["images"][0]
    ink = image >= 96
    lines = list(drawn(image))
    first = np.flatnonzero(ink.any(axis=1))[0] // 2 * 2
    for number, line in enumerate(lines):
        upper, lower = ink[first + 2 * number], ink[first + 2 * number + 1]
        cells = line.ljust(28)
        assert [cell in "▀█" for cell in cells] == upper.tolist()
        assert [cell in "▄█" for cell in cells] == lower.tolist()
    assert list(drawn(np.zeros((28, 28), np.uint8))) == ["(no ink)"]


def test_json_holds_predictions_and_models(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--json", "--address", server.address, SEVEN]) == 0
    printed = json.loads(capsys.readouterr().out)
    [prediction] = printed["predictions"]
    assert (prediction["file"], prediction["digit"]) == (SEVEN, 7)
    assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert np.argmax(prediction["probabilities"]) == 7
    assert prediction["digit_score"] > 0.9
    [model] = printed["models"]
    assert model["version"] == prediction["model_version"]


def test_folder_and_pattern_in_order(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pattern = str(SAMPLES), str(SAMPLES / "[1-3].png")
    assert main(["classify", "--json", "--address", server.address, folder, pattern]) == 0
    printed = predicted(capsys.readouterr().out)
    assert [digit for _, digit in printed] == [*range(10), 1, 2, 3]
    assert printed[-1][0] == THREE


def test_standard_input_is_a_file(server: RunningServer) -> None:
    command = [*CLASSIFY, "--json", "--address", server.address, "-"]
    content = (SAMPLES / "4.png").read_bytes()
    done = subprocess.run(command, input=content, capture_output=True, check=True)
    assert predicted(done.stdout) == [("-", 4)]


def test_bad_files_are_named_and_the_others_classified(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [tmp_path / name for name in ("a.png", "b.png", "gone.png")]
    for path in bad:
        path.write_bytes(b"nonsense")
    bad[2].unlink()
    bad[2].symlink_to(tmp_path / "nowhere")
    for digit in range(10):
        shutil.copy(SAMPLES / f"{digit}.png", tmp_path / f"b{digit}.png")
    assert main(["classify", "--json", "--address", server.address, str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert [digit for _, digit in predicted(printed.out)] == list(range(10))
    first, second, third = sorted(printed.err.splitlines())
    assert first.startswith(f"digits classify: {bad[0]}: expected a PNG, JPEG, WebP or BMP file")
    assert second.startswith(f"digits classify: {bad[1]}: expected a PNG")
    assert third == f"digits classify: {bad[2]}: No such file or directory"


def test_what_is_not_there_is_named(
    server: RunningServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["classify", "nowhere.png"]) == 1
    assert capsys.readouterr().err == "digits classify: nowhere.png: No such file or directory\n"
    assert main(["classify", "--json", "--address", server.address, "nowhere.png", SEVEN]) == 1
    printed = capsys.readouterr()
    assert printed.err == "digits classify: nowhere.png: No such file or directory\n"
    assert predicted(printed.out) == [(SEVEN, 7)]
    for name, message in ((str(tmp_path), "got none"), ("nowhere*.png", "no file has such a name")):
        with pytest.raises(PicturesError, match=message):
            items_of([name])


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--address", "127.0.0.1:1", "--timeout-s", "5", SEVEN]) == 1
    error = capsys.readouterr().err
    assert error.startswith("digits classify: UNAVAILABLE")
    assert "127.0.0.1:1: nothing listened there" in error
    assert error.count("\n") == 1


def test_many_pictures_show_progress_on_a_terminal_only(server: RunningServer) -> None:
    command = [*CLASSIFY, "--json", "--address", server.address, *[SEVEN] * 200]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment
    )
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "/200" in shown
    assert "pictures" in shown
    assert len(predicted(done.stdout)) == 200
    silent = subprocess.run(command, capture_output=True, check=True)
    assert silent.stderr == b""
    assert silent.stdout == done.stdout


def test_terminal_that_is_not_utf_8_gets_what_it_can_show(
    server: RunningServer, tmp_path: Path
) -> None:
    """The blocks of a picture and the name are beyond its characters; nothing has failed."""
    path = shutil.copy(SAMPLES / "7.png", tmp_path / "sieben-ü-七.png")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*CLASSIFY, "--address", server.address, path],
        capture_output=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"sieben-?-?.png" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(b"model digits/")


def test_lines_that_were_read_come_as_they_are(server: RunningServer) -> None:
    command = [*CLASSIFY, "--address", server.address, *[SEVEN] * 3000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert first[0].split()[:2] == [b"file", b"digit"]
    assert first[1].split()[1] == b"7"
    assert process.returncode == 128 + signal.SIGPIPE


def test_token_is_the_first_of_the_file(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's own tests cover what a token gives access to."""
    path = tmp_path / "tokens"
    flags = ["classify", "--address", server.address, "--token-file", str(path), SEVEN]
    assert main(flags) == 1
    assert capsys.readouterr().err == f"digits classify: {path}: No such file or directory\n"
    for text, message in (
        ("# nothing\n\n", f"{path}: expected a line with TOKEN or NAME:TOKEN, got none"),
        ("# gone: \u2028secret\r\n", f"{path}: expected a line with TOKEN or NAME:TOKEN, got none"),
        ("a secret\n", "token: expected printable ASCII without spaces, got something else"),
    ):
        path.write_bytes(text.encode())
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "secret" not in error
