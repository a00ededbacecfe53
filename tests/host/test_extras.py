"""What a command says of a package that it can not import."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from service.host.extras import not_installed


def test_missing_package_is_named_with_what_installs_it() -> None:
    with pytest.raises(ImportError) as caught:
        importlib.import_module("package_that_nobody_has")
    message = not_installed(caught.value, "cpu")
    assert message.startswith("package_that_nobody_has is not installed: pip install")
    assert ".[cpu]" in message


def test_damaged_package_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.abi3.so").write_bytes(b"no ELF file" * 100)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("damaged")
    message = not_installed(caught.value, "cpu")
    assert "damaged.abi3.so: invalid ELF header" in message
    assert "pip install" not in message
