"""``digits serve`` and ``digits top`` without their dependencies."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("serve", "hpack", "cpu"), ("top", "rich", "top")]
)
def test_missing_package_is_named_with_what_installs_it(
    command: str, package: str, extra: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import service.cli as commands;"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(commands.{command}([]))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"digits {command}: {package}")
    assert " is not installed: " in done.stderr
    assert f"pip install -e ./proto -e '.[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
