from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from service import cli
from service.pictures import PicturesError, Watched, items_of, read_idx
from service.printing import drawn
from tests.conftest import SAMPLES, wait_until

SEVEN, THREE = str(SAMPLES / "7.png"), str(SAMPLES / "3.png")
CLASSIFY = [sys.executable, "-m", "service.cli", "classify"]


def idx(images):
    """As MNIST's own files are."""
    head = bytes([0, 0, 8, images.ndim])
    return head + np.array(images.shape, ">u4").tobytes() + images.tobytes()


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_classify_prints_a_table_with_what_the_network_saw(server, capsys):
    assert cli.main(["classify", "--address", server.address, SEVEN, THREE]) == 0
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


def test_many_rows_have_no_pictures_unless_asked_for(server, capsys):
    samples = str(SAMPLES)
    assert cli.main(["classify", "--address", server.address, samples]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    assert cli.main(["classify", "--pictures", "--address", server.address, samples]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100


def test_pictures_are_what_the_network_saw(sample):
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


def test_classify_prints_json(server, capsys):
    assert cli.main(["classify", "--json", "--address", server.address, SEVEN]) == 0
    printed = json.loads(capsys.readouterr().out)
    [prediction] = printed["predictions"]
    assert (prediction["file"], prediction["digit"]) == (SEVEN, 7)
    assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert prediction["digit_score"] > 0.9
    [model] = printed["models"]
    assert model["version"] == prediction["model_version"]


def test_folder_and_pattern_in_order_as_csv(server, capsys):
    folder, pattern = str(SAMPLES), str(SAMPLES / "[1-3].png")
    assert cli.main(["classify", "--csv", "--address", server.address, folder, pattern]) == 0
    printed = rows(capsys.readouterr().out)
    assert [int(row["digit"]) for row in printed] == [*range(10), 1, 2, 3]
    assert printed[-1]["file"] == THREE
    for row in printed:
        probabilities = [float(row[f"probability_{digit}"]) for digit in range(10)]
        assert np.argmax(probabilities) == int(row["digit"])


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_hold_many_images(server, sample, tmp_path, capsys, compressed):
    images, labels = sample["images"], sample["labels"]
    content = idx(images)
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert cli.main(["classify", "--csv", "--address", server.address, str(path)]) == 0
    printed = rows(capsys.readouterr().out)
    assert [row["file"] for row in printed] == [f"{path}[{i}]" for i in range(len(images))]
    assert np.mean([int(row["digit"]) for row in printed] == labels) >= 0.98


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros(7, np.uint8)), r"x: expected images \[N, 28, 28\], got \[7\]"),
        (idx(np.zeros((2, 20, 20), np.uint8)), r"got \[2, 20, 20\]"),
        (idx(np.zeros((0, 28, 28), np.uint8)), r"got \[0, 28, 28\]"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], "expected 1568 pixels, got 1567"),
        (b"\x00\x00\x08\x03\x00", "expected an idx file"),
        (gzip.compress(b"something else"), "expected an idx file"),
        (gzip.compress(bytes(9999))[:-9], "expected a gzip file, got a damaged one"),
    ],
)
def test_idx_file_that_can_not_be_is_refused(content, message):
    with pytest.raises(PicturesError, match=message):
        read_idx("x", content)


@pytest.mark.parametrize("what", ["picture", "idx"])
def test_standard_input_is_a_file(server, sample, what):
    content = {"picture": (SAMPLES / "4.png").read_bytes(), "idx": idx(sample["images"][:5])}[what]
    command = [*CLASSIFY, "--csv", "--address", server.address, "-"]
    done = subprocess.run(command, input=content, capture_output=True, check=True)
    expected = {"picture": [4], "idx": sample["labels"][:5].tolist()}[what]
    assert [int(row["digit"]) for row in rows(done.stdout.decode())] == expected


def test_bad_files_are_named_and_the_others_classified(server, tmp_path, capsys):
    bad = [tmp_path / name for name in ("a.png", "b.png", "gone.png")]
    for path in bad:
        path.write_bytes(b"nonsense")
    bad[2].unlink()
    bad[2].symlink_to(tmp_path / "nowhere")
    for digit in range(10):
        shutil.copy(SAMPLES / f"{digit}.png", tmp_path / f"b{digit}.png")
    assert cli.main(["classify", "--csv", "--address", server.address, str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert [int(row["digit"]) for row in rows(printed.out)] == list(range(10))
    first, second, third = sorted(printed.err.splitlines())
    assert first.startswith(f"digits classify: {bad[0]}: expected a PNG, JPEG, WebP or BMP file")
    assert second.startswith(f"digits classify: {bad[1]}: expected a PNG")
    assert third == f"digits classify: {bad[2]}: No such file or directory"


def test_what_is_not_there_is_named(capsys, tmp_path):
    assert cli.main(["classify", "nowhere.png"]) == 1
    assert capsys.readouterr().err == "digits classify: nowhere.png: No such file or directory\n"
    for name, message in ((str(tmp_path), "got none"), ("nowhere*.png", "no file has such a name")):
        with pytest.raises(PicturesError, match=message):
            items_of([name])


def test_no_server_is_said_in_one_line(capsys):
    assert cli.main(["classify", "--address", "127.0.0.1:1", "--timeout-s", "5", SEVEN]) == 1
    error = capsys.readouterr().err
    assert error.startswith("digits classify: UNAVAILABLE")
    assert "127.0.0.1:1: nothing listens there" in error
    assert error.count("\n") == 1


def test_watched_files_are_taken_once_they_stopped_growing(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")
    watched = Watched(tmp_path)
    new = tmp_path / "new.png"
    new.write_bytes(b"1")
    assert watched.ready() == []
    new.write_bytes(b"12")
    assert watched.ready() == []
    assert watched.ready() == [new]
    assert watched.ready() == [new]  # until it is done
    watched.done(new)
    assert watched.ready() == []
    new.write_bytes(b"123")
    watched.ready()
    assert watched.ready() == [new]


def test_watch_classifies_new_pictures_until_ctrl_c(server, tmp_path):
    folder, log = tmp_path / "in", tmp_path / "log"
    folder.mkdir()
    shutil.copy(SAMPLES / "1.png", folder)
    command = [*CLASSIFY, "--json", "--interval-s", "0.1", "--address", server.address]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--watch", str(folder)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            wait_until(lambda: "watching" in log.read_text())
            (folder / "bad.png").write_bytes(b"nonsense")
            wait_until(lambda: "bad.png: expected a PNG" in log.read_text())
            shutil.copy(SAMPLES / "5.png", folder)
            row = json.loads(process.stdout.readline())
            assert (row["file"], row["digit"]) == (str(folder / "5.png"), 5)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[0] == ""
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in log.read_text()


def test_many_pictures_show_progress_on_a_terminal_only(server, sample, tmp_path):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(idx(sample["images"]))
    command = [*CLASSIFY, "--csv", "--address", server.address, str(path)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment
    )
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "/500" in shown
    assert "pictures" in shown
    assert len(rows(done.stdout.decode())) == 500
    silent = subprocess.run(command, capture_output=True, check=True)
    assert silent.stderr == b""
    assert silent.stdout == done.stdout


def test_info_tells_model_and_origin(server, capsys):
    assert cli.main(["info", "--address", server.address]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert cli.main(["info", "--json", "--address", server.address]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, manifest = printed["model"], printed["manifest"]
    assert said["model"] == f"{model['name']}/{model['version']}"
    assert said["sha256"] == model["sha256"] == manifest["files"]["model.onnx"]
    assert said["accuracy"].startswith(f"{manifest['accuracy']['accuracy']:.2%} of 10,000")
    assert said["commit"] == manifest["source_commit"]


def test_info_without_a_server_fails(capsys):
    assert cli.main(["info", "--address", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    assert capsys.readouterr().err.startswith("digits info: UNAVAILABLE")


def health(*arguments):
    return cli.main(["health", "--timeout-s", "10", *arguments])


def test_health_exits_as_the_probe_does(server, capsys):
    readiness = "digits.v1.DigitClassifierService"
    assert health("--address", server.address) == 0
    assert health("--address", server.address, "--service", readiness) == 0
    assert capsys.readouterr().out == "SERVING\nSERVING\n"
    assert health("--address", server.address, "--service", "other") == 3
    assert "NOT_FOUND" in capsys.readouterr().err
    assert cli.main(["health", "--address", "127.0.0.1:1", "--timeout-s", "0.5"]) == 2
    assert "no connection to 127.0.0.1:1 within 0.5 s" in capsys.readouterr().err


def test_health_of_a_server_that_drains_is_unhealthy(start_server, capsys):
    server = start_server("--drain-delay-s=20")
    server.process.send_signal(signal.SIGTERM)
    readiness = ["--service", "digits.v1.DigitClassifierService"]
    wait_until(lambda: health("--address", server.address, *readiness) != 0)
    assert capsys.readouterr().out.splitlines()[-1] == "NOT_SERVING"
    assert health("--address", server.address, *readiness) == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["health", "--unknown"], 1),
        (["health", "--timeout-s", "0"], 1),
        (["health", "--tls-ca", "nowhere.pem"], 1),
        (["health", "--tls-cert", "nowhere.pem"], 1),
        (["info", "--tls-key", "nowhere.pem"], 2),
        (["info", "--timeout-s", "0"], 2),
        (["top", "--tls-key", "nowhere.pem"], 2),
        (["classify"], 2),
        (["classify", SEVEN, "--watch", "."], 2),
        (["classify", "-", "-"], 2),
        (["classify", "--json", "--csv", SEVEN], 2),
        (["classify", "--tls-cert", "nowhere.pem", SEVEN], 2),
        (["classify", "--watch", ".", "--interval-s", "0"], 2),
    ],
)
def test_misused_command_says_how_it_is_used(arguments, code, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.err.startswith(f"usage: digits {arguments[0]}")
    assert printed.out == ""


def test_misuse_exits_with_2(capsys):
    assert cli.main([]) == 2
    assert cli.main(["dance"]) == 2
    assert "usage: digits COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "serve", "classify", "info", "health", "top"])
def test_help_exits_with_0(command):
    line = [sys.executable, "-m", "service.cli", *command.split(), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "usage: digits" in done.stdout
    if command in ("classify", "info", "health", "top"):
        for flag in ("--address", "--timeout-s", "--tls-ca", "--tls-cert", "--token-file"):
            assert flag in done.stdout


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    ["classify {samples}", "classify --csv {samples}", "classify --json {samples}", "info",
     "info --json", "health", "top --once --interval-s 0.1 --metrics {http}/metrics"],
)  # fmt: skip
def test_output_that_nobody_reads_ends_a_command_quietly(server, command, buffered):
    words = command.format(samples=SAMPLES, http=server.http).split()
    unread, output = os.pipe()
    os.close(unread)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *words, "--address", server.address],
        stdout=output, stderr=subprocess.PIPE, text=True, env=environment, check=False,
    )  # fmt: skip
    os.close(output)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_lines_that_were_read_come_as_they_are(server):
    command = [*CLASSIFY, "--address", server.address, "--csv", *[SEVEN] * 3000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert first[0].startswith(b"file,digit,")
    assert b"7.png,7," in first[1]
    assert process.returncode == 128 + signal.SIGPIPE
