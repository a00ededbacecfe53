"""The client alone, in environments of its own, with the oldest and the newest gRPC it allows."""

from __future__ import annotations

import json
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SAMPLES, RunningServer, run_outside

pytestmark = pytest.mark.full

# The floors of proto/pyproject.toml, and whatever is newest.
OLDEST = ["grpcio==1.76.*", "protobuf==6.31.1"]
NEWEST = ["grpcio", "protobuf"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ABSENT = {"onnxruntime", "pillow", "torch", "prometheus-client", "rich"}

SCRIPT = """
import asyncio, json, sys
import google.protobuf, grpc, numpy as np
from digits.client import AsyncDigitClient, DigitClient, DigitError, progress_bar

address, path = sys.argv[1:]
images = np.zeros((600, 28, 28), np.uint8)
images[:, 4:24, 13:15] = 255  # a one

async def ask():
    async with AsyncDigitClient(address) as client:
        return (await client.classify([path, images[0]])).digits

with DigitClient(address) as client, progress_bar(len(images)) as progress:
    many = client.classify(images, progress=progress).digits
    file = client.classify(path).digits
    streamed = [answer.digits for answer in client.classify_stream([images[:2], images[2]])]
    try:
        client.classify(b"nonsense")
    except DigitError as error:
        violations = list(error.violations)
print(json.dumps({
    "versions": [grpc.__version__, google.protobuf.__version__], "file": file, "many": many,
    "streamed": streamed, "both": asyncio.run(ask()), "violations": violations,
    "server": [name for name in ("onnxruntime", "PIL", "torch") if name in sys.modules],
}))
"""


def run(command: Any, **options: Any) -> Any:
    """The output of a command."""
    done = run_outside(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("versions", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_client_in_a_clean_environment_calls_a_server(
    versions: Any, wheels: Path, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    [wheel] = wheels.glob("digits_client-*.whl")
    run([*PIP, "--python", python, "install", wheel, *versions])
    listed = json.loads(run([*PIP, "--python", python, "list", "--format=json"]))
    installed = {package["name"].lower(): package["version"] for package in listed}
    assert not ABSENT & installed.keys()
    assert len(installed) <= 8

    server = start_server()
    sample = str(SAMPLES / "7.png")
    answer = json.loads(run([python, "-c", SCRIPT, server.address, sample], cwd=tmp_path))
    assert answer["versions"] == [installed["grpcio"], installed["protobuf"]]
    if versions is OLDEST:
        assert installed["grpcio"].startswith("1.76.")
    assert answer["file"] == [7]
    assert answer["many"] == [1] * 600
    assert answer["streamed"] == [[1, 1], [1]]
    assert answer["both"] == [7, 1]
    assert answer["violations"] == ["encoded.files[0]"]
    assert answer["server"] == []

    digits, address = Path(python).with_name("digits"), ["--address", server.address]
    assert "  7  " in run([digits, "classify", *address, sample], cwd=tmp_path)
    assert "digits/" in run([digits, "info", *address], cwd=tmp_path)
    assert run([digits, "health", "--timeout-s=10", *address], cwd=tmp_path) == "SERVING\n"
