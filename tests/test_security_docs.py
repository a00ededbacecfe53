"""The commands of SECURITY.md, run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from digits.cli.main import main
from tests.conftest import ROOT, RunningServer

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def split(block: Any) -> tuple[list[Any], str]:
    """A block's commands of ours, each in words, and the rest of it."""
    lines = block.replace("\\\n", " ").splitlines()
    ours = [shlex.split(line) for line in lines if line.startswith("digits ")]
    return ours, "\n".join(line for line in lines if not line.startswith("digits "))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_commands_work_as_they_stand(
    start_server: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    address, started, asked = "", 0, 0
    for block in BLOCK.findall((ROOT / "SECURITY.md").read_text()):
        ours, rest = split(block)
        subprocess.run(["bash", "-e"], input=rest, text=True, check=True, capture_output=True)
        for _, command, *arguments in ours:
            if command == "serve":
                address = start_server(*arguments).address
                started += 1
            else:
                assert main([command, "--address", address, *arguments]) == 0
                asked += 1
    assert (started, asked) == (2, 2)
