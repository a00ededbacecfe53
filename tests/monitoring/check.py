"""What Prometheus itself finds wrong with a server, its rules and its dashboard."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Sequence

from tests.monitoring.dashboard import without_data
from tests.monitoring.prometheus import Prometheus, PrometheusError

# Until what happened last was scraped, and every rule was evaluated on it.
SETTLE_S = 15


def problems(prometheus: Prometheus, metrics_url: str, start: float, end: float) -> list[str]:
    """One line for each; none after a run that loaded every part.

    Args:
        prometheus: What scraped the server.
        metrics_url: The server's /metrics.
        start: When the load began, in seconds since 1970.
        end: When it ended.

    Raises:
        PrometheusError: If a query of the dashboard does not parse.
    """
    lint = promtool("check", "metrics", text=urllib.request.urlopen(metrics_url).read().decode())
    return [
        *lint,
        *_rules(prometheus),
        *(f"no data: {q}" for q in without_data(prometheus, start, end)),
    ]


def promtool(*arguments: str, text: str = "") -> list[str]:
    """The lines of a promtool run that complains; none if it is content.

    Raises:
        PrometheusError: If it is not installed.
    """
    program = shutil.which("promtool")
    if program is None:
        raise PrometheusError("promtool is not installed (Debian: apt-get install prometheus)")
    command: Sequence[str] = [program, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines() if done.returncode else []


def _rules(prometheus: Prometheus) -> list[str]:
    """Rules that can not be evaluated."""
    give_up = time.monotonic() + SETTLE_S
    while time.monotonic() < give_up:
        unwell = [rule for rule in prometheus.rules() if rule["health"] != "ok"]
        if not unwell or any(rule["health"] == "err" for rule in unwell):
            break
        time.sleep(0.1)
    return [f"rule {rule['name']}: {rule.get('lastError', rule['health'])}" for rule in unwell]
