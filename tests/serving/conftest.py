"""A repository to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.serving.loading import DEFAULT


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the default version, free to be damaged."""
    shutil.copytree(DEFAULT, tmp_path / "digits/1")
    return tmp_path / "digits"
