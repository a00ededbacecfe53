"""``digits serve`` and ``digits top``. Imports little: signal handlers come first."""

from __future__ import annotations

import os
import signal
import sys
import time


def serve(argv: list[str]) -> int:
    """``digits serve``: returns the exit code where nothing was served, else ends the process."""
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
    # gRPC's core would write a line for each bad handshake or header, past every log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
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
        from service.server import serve as serve_until_stopped
        from service.telemetry.logs import configure_logging, finish_logs
    except ImportError as error:
        return _lacks("serve", error, "cpu")
    never_block(STDERR)
    configure_logging(config.log_format)
    code = serve_until_stopped(config, started)
    finish_logs()
    # A thread that is still inside onnxruntime would abort the interpreter's own shutdown.
    os._exit(code)


def top(argv: list[str]) -> int:
    """``digits top``: returns the exit code."""
    try:
        from service.top.command import top as watch
    except ImportError as error:
        return _lacks("top", error, "top")
    return watch(argv)


def _lacks(command: str, error: ImportError, extra: str) -> int:
    from service.host.extras import not_installed

    print(f"digits {command}: {not_installed(error, extra)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    from digits.cli.main import main

    sys.exit(main())
