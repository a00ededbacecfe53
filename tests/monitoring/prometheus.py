"""A Prometheus of our own on a free port, and questions to it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = "digits-serving"
START_TIMEOUT_S = 30
# Prometheus itself asks every 15 s by default; a look that takes a minute needs more.
SCRAPE_INTERVAL = "1s"


class PrometheusError(RuntimeError):
    """Prometheus is missing, did not start, or refused a query; the message says why."""


@dataclass(frozen=True)
class Series:
    """What a query found.

    Attributes:
        labels: Of the series.
        points: Seconds since 1970, and value; one for an instant query.
    """

    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus.

    Attributes:
        url: Of its HTTP API.
    """

    url: str

    def query(self, expr: str) -> list[Series]:
        """What an expression says now.

        Raises:
            PrometheusError: If it does not parse.
        """
        found = self._ask("query", query=expr)
        if found["resultType"] == "scalar":
            return [_series({"metric": {}, "values": [found["result"]]})]
        return [_series({**each, "values": [each["value"]]}) for each in found["result"]]

    def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[Series]:
        """What it said over time, both ends in seconds since 1970.

        Raises:
            PrometheusError: If it does not parse.
        """
        found = self._ask("query_range", query=expr, start=start, end=end, step=step_s)
        return [_series(each) for each in found["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and last error."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes."""
        return list(self._ask("targets")["activeTargets"])

    def _ask(self, path: str, **parameters: Any) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            reason = json.load(error)["error"]
            raise PrometheusError(f"{parameters.get('query', path)}: {reason}") from None


def _series(found: dict[str, Any]) -> Series:
    points = [(float(when), float(value)) for when, value in found["values"]]
    return Series(found["metric"], points)


@contextlib.contextmanager
def running_prometheus(target: str, rules: Path) -> Iterator[Prometheus]:
    """Starts a Prometheus that scrapes ``target`` (``host:port``) and evaluates the rules.

    Raises:
        PrometheusError: If it is not installed, or does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise PrometheusError("prometheus is not installed (Debian: apt-get install prometheus)")
    config = {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
    }
    with tempfile.TemporaryDirectory(prefix="prometheus-") as folder:
        config_file, log = Path(folder, "prometheus.yml"), Path(folder, "log")
        config_file.write_text(json.dumps(config))  # JSON is YAML
        command = [program, f"--config.file={config_file}", f"--storage.tsdb.path={folder}/data"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--web.listen-address=127.0.0.1:0"], stdout=file, stderr=file
            )
        try:
            yield Prometheus(f"http://{_address(process, log)}")
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until it says which port it was given, and is ready."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up:
        text = log.read_text()
        found = re.search(r'msg="Listening on" address=(\S+)', text)
        if found and "Server is ready" in text:
            return found[1]
        time.sleep(0.05)
    raise PrometheusError(f"prometheus did not start:\n{log.read_text()}")
