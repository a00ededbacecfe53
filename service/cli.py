"""The ``digits`` command. Imports little, so that ``serve`` can take signals before it loads."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: digits COMMAND ...

  digits serve [FLAG ...]        serve the model over gRPC
  digits classify FILE ...       ask a server about pictures: files, folders, idx files, stdin
  digits info                    tell which model a server serves
  digits health                  ask a server for its health, for scripts and probes
  digits top                     watch a running server in the terminal

Each explains itself: digits COMMAND --help. Exit status: 0 done, 1 failed, 2 misused; digits
health has its own.
"""


COMMANDS = {
    "classify": ("service.classify_command", "classify_files"),
    "info": ("service.info_command", "info"),
    "health": ("service.health_command", "health"),
    "top": ("service.top.command", "top"),
}
# What a command needs beyond the bare install.
EXTRAS = {"top": "top"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 misused.

    A reader that has enough, such as ``head``, ends a command without a word and with the exit
    code that a shell gives for SIGPIPE. The signal itself would end it for a broken socket too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # prints nothing there: a broken pipe would be something else
        return _serve(arguments[1:])
    try:
        try:
            return _command(arguments)
        finally:  # here, not when the interpreter ends, where nobody can catch it
            print(end="", flush=True)
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE


def _discard_output() -> None:
    """Lets the interpreter end, which writes out what is left in its buffers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _command(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in COMMANDS:
        module, function = COMMANDS[command]
        try:
            run = getattr(importlib.import_module(module), function)
        except ImportError as error:
            install = f"pip install 'digits-serving[{EXTRAS.get(command, 'cpu')}]'"
            print(f"digits {command}: {error.name} is not installed: {install}", file=sys.stderr)
            return 1
        try:
            return int(run(rest))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    asked = command in ("-h", "--help", "help")
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _serve(argv: list[str]) -> int:
    started = time.monotonic()
    # As PID 1 a process without a handler ignores SIGTERM; the imports below take a while, and
    # nothing has to be cleaned up yet.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # means reload, and there is nothing loaded yet
    from service.config import ServerConfig, load_config
    from service.host.streams import STDERR, never_block, open_closed_streams
    from service.settings import ConfigError, help_text

    open_closed_streams()
    if "-h" in argv or "--help" in argv:
        print(f"usage: digits serve [FLAG ...]\n\n{help_text(ServerConfig)}")
        return 0
    try:
        config = load_config(argv, os.environ)
    except ConfigError as error:
        for line in error.errors:
            print(f"digits serve: {line}", file=sys.stderr)
        return 2
    try:
        from service.server import serve
        from service.telemetry.logs import configure_logging, finish_logs
    except ImportError as error:
        print(
            f"digits serve: {error.name} is not installed: pip install 'digits-serving[cpu]' "
            "(or [gpu])",
            file=sys.stderr,
        )
        return 1
    never_block(STDERR)
    configure_logging(config.log_format)
    code = serve(config, started)
    finish_logs()
    # A thread that is still inside onnxruntime would abort the interpreter's own shutdown.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
