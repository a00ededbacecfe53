"""``make release`` sets the version in every file that names it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
VERSION = re.search('^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What git knows of this tree, in a repository of its own."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def release(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "release", f"VERSION={version}"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_release_sets_the_version_everywhere(copy: Path) -> None:
    assert VERSION is not None
    done = release(copy, "7.8.9")
    assert done.returncode == 0, done.stderr
    for name in ("pyproject.toml", "proto/pyproject.toml"):
        assert '\nversion = "7.8.9"' in (copy / name).read_text()
    assert "digits-client==7.8.9" in (copy / "pyproject.toml").read_text()
    assert "image: digits-serving:7.8.9" in (copy / "deploy/base/deployment.yaml").read_text()
    assert re.search(r"^## 7\.8\.9, \d{4}-", (copy / "CHANGELOG.md").read_text(), re.MULTILINE)
    of_others = {".lock", ".mod", ".sum"}
    left = [
        path.name
        for path in [*copy.glob("*"), *copy.glob("deploy/**/*"), *copy.glob("proto/**/*")]
        if path.is_file() and path.suffix not in of_others and path.name != "CHANGELOG.md"
        and VERSION[1].encode() in path.read_bytes()
    ]  # fmt: skip
    assert left == []


@pytest.mark.parametrize("version", ["", "1.2", "v1.2.3", "1.2.3; touch x"])
def test_a_wrong_version_changes_nothing(copy: Path, version: str) -> None:
    done = release(copy, version)
    assert done.returncode != 0
    assert f'expected a number such as 0.2.0, got "{version}"' in done.stderr
    assert not subprocess.check_output(["git", "diff", "--stat"], cwd=copy)
    assert not (copy / "x").exists()
