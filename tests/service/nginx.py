"""nginx as deploy/ sets it up."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_ports, wait_until

TEMPLATE = ROOT / "deploy/examples/nginx.conf"
# nginx makes folders for them that belong to the system unless it is told otherwise.
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def nginx_program() -> str:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    return program


class Nginx:
    """The template, with addresses of this test."""

    def __init__(self, folder: Path, backends: Sequence[str]) -> None:
        self.folder, self._backends = folder, backends
        (self._port,) = free_ports(1)
        self.address = f"127.0.0.1:{self._port}"
        self._log = folder / "nginx.log"
        self._write(down=())
        own = f"daemon off; pid {folder}/nginx.pid; error_log stderr notice;"
        command = [
            nginx_program(),
            "-p",
            str(folder),
            "-c",
            "nginx.conf",
            "-e",
            "stderr",
            "-g",
            own,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(self._workers)
        except BaseException:
            self.close()
            raise

    def _write(self, down: Collection[str]) -> None:
        text = TEMPLATE.read_text().replace("listen 50051", f"listen {self.address}")
        for number, address in enumerate(self._backends, 1):
            line = f"server digits-{number}.example.com:50051;"
            assert line in text
            text = text.replace(line, f"server {address}{' down' * (address in down)};")
        own = " ".join(f"{kind}_temp_path {self.folder}/{kind};" for kind in TEMPORARY)
        (self.folder / "nginx.conf").write_text(text.replace("http {", f"http {{\n{own}"))

    def _workers(self) -> int:
        text = self._log.read_text()
        assert self._process.poll() is None, text
        return text.count("start worker process ")

    def leave_out(self, *down: str) -> None:
        """Until it is called again, connections from now on lead to the others."""
        before = self._workers()
        self._write(down)
        self._process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._workers() > before)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
