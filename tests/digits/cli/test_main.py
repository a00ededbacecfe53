"""``digits`` finds commands, and exits as a shell expects."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from digits.cli.flags import printable
from digits.cli.main import main
from tests.conftest import SAMPLES, RunningServer

DIGITS = [sys.executable, "-m", "digits"]
SEVEN = str(SAMPLES / "7.png")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["health", "--unknown"], 1),
        (["health", "--timeout-s", "0"], 1),
        (["health", "--tls-ca", "nowhere.pem"], 1),
        (["health", "--tls-cert", "nowhere.pem"], 1),
        (["info", "--tls-key", "nowhere.pem"], 2),
        (["info", "--timeout-s", "0"], 2),
        (["top", "--tls-key", "nowhere.pem"], 2),
        (["classify"], 2),
        (["classify", "-", "-"], 2),
        (["classify", "--tls-cert", "nowhere.pem", SEVEN], 2),
    ],
)
def test_misused_command_says_how_it_is_used(
    arguments: Any, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.err.startswith(f"usage: digits {arguments[0]}")
    assert printed.out == ""


def test_misuse_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main([]) == 2
    assert main(["dance"]) == 2
    assert "usage: digits COMMAND" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["", "serve", "classify", "info", "health", "top"])
def test_help_exits_with_0(command: str) -> None:
    line = [*DIGITS, *command.split(), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "usage: digits" in done.stdout
    if command in ("classify", "info", "health", "top"):
        for flag in ("--address", "--timeout-s", "--tls-ca", "--tls-cert", "--token-file"):
            assert flag in done.stdout


def test_version_tells_both_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    version = importlib.metadata.version("digits-client")
    expected = f"digits-client {version}\ndigits-serving {version}\n"
    assert capsys.readouterr().out == expected


@pytest.fixture
def distribution(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Adds a command of another distribution, by its source; returns the environment."""

    def add(name: str, source: Any) -> dict[str, Any]:
        metadata = tmp_path / f"{name}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[digits.commands]\n{name} = {name}:run\n")
        (tmp_path / f"{name}.py").write_text(source)
        return {**os.environ, "PYTHONPATH": str(tmp_path)}

    return add


def test_command_of_another_distribution_is_found(
    distribution: Callable[..., dict[str, Any]],
) -> None:
    environment = distribution("greet", "def run(argv):\n    print('hello', *argv)\n    return 3\n")
    command = [*DIGITS, "greet", "--to", "you"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (3, "hello --to you\n")


def test_sigterm_ends_well_while_a_command_is_imported(
    distribution: Callable[..., dict[str, Any]],
) -> None:
    """As of a container that is stopped while it starts."""
    environment = distribution("slow", "import sys\nprint('here', flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [*DIGITS, "slow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"here\n"
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    ["classify {samples}/7.png", "classify --json {samples}/7.png", "info", "info --json", "health",
     "top --once --interval-s 0.1 --metrics {http}/metrics"],
)  # fmt: skip
def test_output_that_nobody_reads_ends_a_command_quietly(
    server: RunningServer, command: str, buffered: bool
) -> None:
    words = command.format(samples=SAMPLES, http=server.http).split()
    unread, output = os.pipe()
    os.close(unread)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [*DIGITS, *words, "--address", server.address],
        stdout=output, stderr=subprocess.PIPE, text=True, env=environment, check=False,
    )  # fmt: skip
    os.close(output)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_client_commands_load_nothing_of_the_server() -> None:
    code = (
        "import sys; from digits.cli import classify, flags, health, info, main;"
        "print([m for m in sys.modules if m.split('.')[0] in ('service', 'training', 'export')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_nothing_of_a_server_reaches_the_terminal_as_a_command() -> None:
    assert printable("a\x1b[2Jb\x07\u202e\nc") == "a\\x1b[2Jb\\x07\\u202e\nc"
    assert printable("Fuß 7") == "Fuß 7"
