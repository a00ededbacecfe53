"""A model of other things than digits serves under its own name, with its own labels."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from digits.cli.main import main
from digits.client import DigitClient
from tests.conftest import SAMPLES, RunningServer
from tests.releases import change_manifest, copy_release
from training.data import DATASETS

LABELS = DATASETS["fashion-mnist"].labels


@pytest.fixture
def server(start_server: Callable[..., RunningServer], tmp_path: Path) -> RunningServer:
    """The fixture's digits, called clothes."""
    repository = tmp_path / "fashion-mnist"
    repository.mkdir()
    folder = copy_release(repository, 1, "2")
    change_manifest(folder, name="fashion-mnist", labels=list(LABELS))
    return start_server(f"--model-repository={repository}", "--playground")


def test_labels_reach_every_caller(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with DigitClient(server.address) as client:
        model, manifest = client.get_model()
    assert (model.name, tuple(manifest["labels"])) == ("fashion-mnist", LABELS)
    seven = SAMPLES / "7.png"
    assert main(["classify", "--address", server.address, "--no-pictures", str(seven)]) == 0
    printed = capsys.readouterr().out
    assert "label" in printed.splitlines()[0]
    assert LABELS[7] in printed
    request = urllib.request.Request(
        f"{server.http}/v1/classify", seven.read_bytes(), {"Content-Type": "image/png"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
    assert answer["labels"][answer["predictions"][0]["digit"]] == LABELS[7]


def test_server_of_digits_takes_no_other_model(
    server: RunningServer, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    repository = tmp_path / "digits"
    repository.mkdir()
    copy_release(repository, 1, "1")
    digits = start_server(f"--model-repository={repository}", "--reload-interval-s=0")
    copy_release(repository, 2, tmp_path / "fashion-mnist/1")
    assert main(["info", "--address", digits.address]) == 0
    digits.process.send_signal(1)  # SIGHUP
    from tests.conftest import wait_until

    wait_until(lambda: "release 2 rejected: manifest.json: name: " in digits.log_text())
    assert "expected 'digits', the name of the repository" in digits.log_text()
