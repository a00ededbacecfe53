"""The ``digits`` command: finds what was asked for. Imports little, so that it is quick."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

Command: TypeAlias = Callable[[list[str]], int]

USAGE = """\
usage: digits COMMAND ...

  digits classify FILE ...       ask a server about pictures: files, folders, patterns, stdin
  digits info                    tell which model a server serves
  digits health                  ask a server for its health, for scripts and probes
  digits serve [FLAG ...]        serve the model over gRPC (with digits-serving)
  digits top                     watch a running server in the terminal (with digits-serving)
  digits --version               tell what is installed

Each explains itself: digits COMMAND --help. Exit status: 0 done, 1 failed, 2 misused; digits
health has its own.
"""

# Of the client: module and function.
OWN = {
    "classify": ("digits.cli.classify", "classify"),
    "info": ("digits.cli.info", "info"),
    "health": ("digits.cli.health", "health"),
}
# Of the server's distribution, which registers them in this group of entry points.
SERVERS = ("serve", "top")
GROUP = "digits.commands"
DISTRIBUTIONS = ("digits-client", "digits-serving")
NOT_INSTALLED = (
    "it comes with digits-serving, which is not installed here: "
    "pip install -e ./proto -e '.[cpu,top]' in a clone, or "
    "pip install 'FOLDER/digits_serving-VERSION-py3-none-any.whl[cpu,top]' from a wheel"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 misused.

    A reader that has enough, such as ``head``, ends a command without a word and with the exit
    code that a shell gives for SIGPIPE. The signal itself would end it for a broken socket too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows another one; the command has not failed.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run(arguments)
        finally:  # here, not when the interpreter ends, where nobody can catch it
            print(end="", flush=True)
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in OWN:
        module, function = OWN[name]
        own: Command = getattr(importlib.import_module(module), function)
        return own(rest)
    if name == "--version":
        print(_versions())
        return 0
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command = _registered(name)
    if command is not None:
        return command(rest)
    print(f"digits {name}: {NOT_INSTALLED}" if name in SERVERS else USAGE.rstrip(), file=sys.stderr)
    return 1 if name in SERVERS else 2


def _registered(name: str) -> Command | None:
    """The command of another distribution."""
    # As PID 1 a process without a handler ignores SIGTERM. Looking around takes a while, and
    # nothing has to be cleaned up yet.
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        from importlib.metadata import entry_points  # noqa: PLC0415 - takes as long as a call

        command: Command | None = None
        for entry in entry_points(group=GROUP, name=name):
            command = entry.load()
        return command
    finally:
        signal.signal(signal.SIGTERM, before)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - as above

    lines = []
    for distribution in DISTRIBUTIONS:
        try:
            lines.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            lines.append(f"{distribution} is not installed")
    return "\n".join(lines)


def _discard_output() -> None:
    """Lets the interpreter end, which writes out what is left in its buffers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
