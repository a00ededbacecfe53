from __future__ import annotations

import json

import pytest

from digits.cli.main import main
from tests.conftest import RunningServer


def test_info_tells_model_and_origin(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--address", server.address]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert main(["info", "--json", "--address", server.address]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, manifest = printed["model"], printed["manifest"]
    assert said["model"] == f"{model['name']}/{model['version']}"
    assert said["sha256"] == model["sha256"] == manifest["variants"][model["precision"]]["sha256"]
    accuracy = manifest["variants"][model["precision"]]["accuracy"]["accuracy"]
    assert said["accuracy"].startswith(f"{accuracy:.2%} of 10,000")
    assert said["labels"] == "0 1 2 3 4 5 6 7 8 9"
    assert said["commit"] == manifest["source_commit"]


def test_info_without_a_server_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--address", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    assert capsys.readouterr().err.startswith("digits info: UNAVAILABLE")
