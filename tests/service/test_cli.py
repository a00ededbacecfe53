from __future__ import annotations

import json
import subprocess
import sys

import pytest

from service import cli
from tests.conftest import SAMPLES

SEVEN, THREE = str(SAMPLES / "7.png"), str(SAMPLES / "3.png")


def test_classify_prints_a_table(server, capsys):
    assert cli.main(["classify", "--address", server.address, SEVEN, THREE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "digit", "confidence", "runner-up"]
    assert lines[1].split()[:2] == [SEVEN, "7"]
    assert lines[2].split()[:2] == [THREE, "3"]
    assert lines[-1].startswith("model digits/")


def test_classify_prints_json(server, capsys):
    assert cli.main(["classify", "--json", "--address", server.address, SEVEN]) == 0
    printed = json.loads(capsys.readouterr().out)
    [prediction] = printed["predictions"]
    assert (prediction["file"], prediction["digit"]) == (SEVEN, 7)
    assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert int(printed["model"]["version"]) >= 1


def test_file_that_is_no_image_is_named(server, capsys):
    assert cli.main(["classify", "--address", server.address, SEVEN, __file__]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"digits classify: INVALID_ARGUMENT: {__file__}: expected a PNG")


def test_file_that_is_not_there_is_named(capsys):
    assert cli.main(["classify", "nowhere.png"]) == 1
    assert capsys.readouterr().err == "digits classify: nowhere.png: No such file or directory\n"


def test_misuse_exits_with_2(capsys):
    assert cli.main([]) == 2
    assert cli.main(["dance"]) == 2
    assert "usage: digits COMMAND" in capsys.readouterr().err


def test_help_exits_with_0():
    for arguments in (["--help"], ["serve", "--help"], ["classify", "--help"]):
        command = [sys.executable, "-m", "service.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "usage: digits" in done.stdout
