"""Conformance with RFC 9113 and RFC 7541, by h2spec: every case, strict ones too."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.http2.echo import ROUTES
from tests.http2.wire import running
from tests.suite import made_once

pytestmark = pytest.mark.full

INSTALL = "go install github.com/summerwind/h2spec/cmd/h2spec@latest"


def go_install(_: Any) -> None:
    subprocess.run(INSTALL.split(), check=False, capture_output=True)


@pytest.fixture(scope="module")
def h2spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The program; built by Go where that is installed."""
    found = shutil.which("h2spec") or shutil.which("h2spec", path=str(Path.home() / "go/bin"))
    if found is None and shutil.which("go"):
        made_once(tmp_path_factory, "h2spec", go_install)
        folder = os.environ.get("GOBIN", str(Path.home() / "go/bin"))
        found = shutil.which("h2spec", path=folder)
    if found is None:
        pytest.skip(f"h2spec is not installed ({INSTALL})")
    return found


def run(h2spec: Any, server: Any, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [h2spec, "--strict", "--host", "127.0.0.1", "--port", str(server.port), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_plaintext(h2spec: Any) -> None:
    with running(ROUTES) as server:
        done = run(h2spec, server)
    assert done.returncode == 0, done.stdout[done.stdout.find("Failures:") :]
    assert "0 skipped, 0 failed" in done.stdout


def test_tls(h2spec: Any, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*Authority(tmp_path, "root").issue("server"))
    context.set_alpn_protocols(["h2"])
    with running(ROUTES, tls=lambda: context) as server:
        done = run(h2spec, server, "--tls", "--insecure")
    assert done.returncode == 0, done.stdout[done.stdout.find("Failures:") :]
    assert "0 skipped, 0 failed" in done.stdout
