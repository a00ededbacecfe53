"""Log lines: text for people, JSON for machines; no thread that logs waits for who reads them."""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from service.host.streams import STDERR, LineWriter

logger = logging.getLogger(__name__)

# For the last lines to be written before the process ends.
FLUSH_S = 1.0


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """The message, then what belongs to it as ``name=value``."""
        fields: dict[str, object] = getattr(record, "fields", {})
        said = [f"{name}={_quoted(value)}" for name, value in fields.items()]
        return " ".join([super().formatMessage(record), *said])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if " " in text else text


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One object a line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class LogHandler(logging.Handler):
    """Formats on the thread that logs, which keeps no object of a call alive; writes on another.

    Args:
        descriptor: Where to write.
        formatter: Makes a line of a record.
    """

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = LineWriter(descriptor, self._dropped_line)

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self._writer.dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a line. Never blocks or raises."""
        try:
            line = self.format(record)
        except Exception as error:  # whatever the arguments of the record raise
            line = self._line("a log record of %s: %s", record.name, type(error).__name__)
        self._writer.write(line)

    def finish(self) -> None:
        """Waits until the lines so far are written, for a moment at most."""
        self._writer.flush(FLUSH_S)

    def _dropped_line(self, count: int) -> str:
        text = "%d log lines were dropped: standard error was not read fast enough, or was full"
        return self._line(text, count)

    def _line(self, text: str, *args: object) -> str:
        level = logging.WARNING
        return self.format(logging.LogRecord(__name__, level, "", 0, text, args, None))


def configure_logging(log_format: str) -> None:
    """Sends all logs to standard error as ``text`` or ``json``, with warnings and lost errors."""
    formatter: logging.Formatter = _JsonFormatter()
    if log_format == "text":
        formatter = _TextFormatter("%(asctime)s %(levelname)s %(message)s")
    handler = LogHandler(STDERR, formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    threading.excepthook = _log_thread_error
    sys.unraisablehook = _log_unraisable


def finish_logs() -> None:
    """Writes the last lines before the process ends."""
    for handler in _handlers():
        handler.finish()


def dropped_lines() -> int:
    """Log lines that were dropped since the start."""
    return sum(handler.dropped for handler in _handlers())


def _handlers() -> list[LogHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, LogHandler)]


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    if error.exc_value is None or isinstance(error.exc_value, SystemExit):
        return
    name = error.thread.name if error.thread is not None else "unknown"
    logger.critical("thread %s ended with an error", name, exc_info=error.exc_value)


def _log_unraisable(error: Any) -> None:  # sys.UnraisableHookArgs exists for type checkers only
    what = error.err_msg or "an error was ignored"
    logger.error("%s in %s", what, type(error.object).__name__, exc_info=error.exc_value)
