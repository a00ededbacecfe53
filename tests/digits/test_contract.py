"""The schema goes on understanding those who call by the first release's, which is committed here.

``contract.binpb`` is that schema, made by ``buf build --exclude-source-info -o``. A schema that
breaks it is another major version, in a package of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

CONTRACT = Path(__file__).with_name("contract.binpb")


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    """The schema as it is, to be changed."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    return tmp_path


def broken(folder: Path) -> Any:
    """What breaks callers, one line for each."""
    buf = shutil.which("buf", path=sysconfig.get_path("scripts"))
    if buf is None:
        pytest.skip("buf is not installed: make test installs it")
    command: list[Any] = [buf, "breaking", folder, "--against", CONTRACT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 100}, done.stderr
    return done.stdout.splitlines()


def change(schema: Any, old: Any, new: Any) -> None:
    path = schema / "proto/digits/v1/digits.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_callers_of_the_first_release_are_understood(schema: Path) -> None:
    assert broken(schema) == []


def test_new_field_breaks_nobody(schema: Path) -> None:
    change(schema, "bytes pixels = 1;", "bytes pixels = 1;\n    bytes further = 99;")
    assert broken(schema) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("bytes pixels = 1;", "string pixels = 1;", id="type"),
        pytest.param("bytes pixels = 1;", "bytes pixels = 9;", id="number"),
        pytest.param("rpc GetModel(", "rpc TellModel(", id="method"),
    ],
)
def test_change_that_breaks_callers_is_found(schema: Path, old: str, new: str) -> None:
    change(schema, old, new)
    assert broken(schema)
