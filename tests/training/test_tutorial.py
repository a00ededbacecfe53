"""docs/own-digits.md, from a folder of pictures to a release that serves, without MNIST."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from digits.client import DigitClient
from export.__main__ import main as export_main
from service.artifact.format import load_artifact
from tests.conftest import ROOT, RunningServer
from tests.hand import EACH, FOLDER
from training import __main__ as training
from training.data import DataError

pytestmark = pytest.mark.full


@pytest.fixture
def without_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: accuracy on MNIST is then told to be missing."""

    def absent(*_: Any) -> None:
        raise DataError("mnist is not here")

    monkeypatch.setattr("training.commands.load_split", absent)


def test_pictures_become_a_release_that_serves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_mnist: None,
    start_server: Callable[..., RunningServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--data={FOLDER}"
    flags = [f"--init={ROOT / 'models/digits/1'}", "--epochs=8", "--max-lr=1e-3"]
    assert training.main([data, *flags]) == 0
    printed = capsys.readouterr().out
    assert f"{10 * EACH} images, by digit 0: {EACH}" in printed
    assert "accuracy on MNIST was not measured: mnist is not here" in printed
    assert export_main([data, "--min-accuracy=0.5"]) == 3
    assert "promote 1 --accept-lower" in capsys.readouterr().err
    assert export_main(["promote", "1", "--accept-lower"]) == 0
    release = load_artifact(Path("models/local/digits/1"))
    assert release.manifest["dataset"]["name"] == "own"
    assert release.manifest["comparison"]["against"] == "1"
    server = start_server(f"--model-repository={tmp_path / 'models/local/digits'}")
    with DigitClient(server.address) as client:
        answered = client.classify_files([FOLDER / f"{digit}/00.png" for digit in range(10)])
        manifest = client.get_model()[1]
    assert sum(a == b for a, b in zip(answered.digits, range(10), strict=True)) >= 8
    assert json.dumps(manifest["dataset"]) == json.dumps(release.manifest["dataset"])
