from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from digits.cli.main import main
from tests.conftest import RunningServer, wait_until


def health(*arguments: Any) -> Any:
    return main(["health", "--timeout-s", "10", *arguments])


def test_health_exits_as_the_probe_does(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    readiness = "digits.v1.DigitClassifierService"
    assert health("--address", server.address) == 0
    assert health("--address", server.address, "--service", readiness) == 0
    assert capsys.readouterr().out == "SERVING\nSERVING\n"
    assert health("--address", server.address, "--service", "other") == 3
    assert "NOT_FOUND" in capsys.readouterr().err
    assert main(["health", "--address", "127.0.0.1:1", "--timeout-s", "0.5"]) == 2
    assert "no connection to 127.0.0.1:1 within 0.5 s" in capsys.readouterr().err


def test_health_of_a_server_that_drains_is_unhealthy(
    start_server: Callable[..., RunningServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server("--drain-delay-s=20")
    server.process.send_signal(signal.SIGTERM)
    readiness = ["--service", "digits.v1.DigitClassifierService"]
    wait_until(lambda: health("--address", server.address, *readiness) != 0)
    assert capsys.readouterr().out.splitlines()[-1] == "NOT_SERVING"
    assert health("--address", server.address, *readiness) == 4
