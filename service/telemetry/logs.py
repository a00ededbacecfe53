"""Log lines as text or JSON. Logging never blocks: a full queue drops lines and counts them.

Libraries' lines and warnings pass through here too. Each logger is rate-limited, control characters
are escaped, and lines of libraries lose their arguments, which may hold what a caller sent.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import threading
import time
import traceback
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from service.host.streams import STDERR, LineWriter
from service.telemetry.allowance import Allowance

logger = logging.getLogger(__name__)

# Loggers whose lines are those of this project, or of libraries that meet no caller.
TRUSTED = {"service", "digits", "root", "opentelemetry"}
# Has an allowance of its own, which is a setting.
REQUEST_LOG = "service.telemetry.request_log"
# Lines a second of one logger, and its largest burst; libraries share a smaller allowance.
LINES_PER_S, LIBRARY_LINES_PER_S = 100.0, 5.0
# Of a line of a library.
MAX_LIBRARY_CHARS = 300
WARNINGS = "py.warnings"
# What moves the cursor of a terminal, ends a line, or reverses what is read.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SIMPLE = re.compile(r"[^\s\"\\]+")

# For the last lines to be written before the process ends.
FLUSH_S = 1.0


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """The message, then what belongs to it as ``name=value``."""
        fields: dict[str, object] = getattr(record, "fields", {})
        said = [f"{name}={_quoted(value)}" for name, value in fields.items()]
        return _printable(" ".join([super().formatMessage(record), *said]))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the base class's name
        """Lines stay lines."""
        return "\n".join(map(_printable, super().formatException(ei).split("\n")))


def _quoted(value: object) -> str:
    text = str(value)
    return text if SIMPLE.fullmatch(text) else json.dumps(text)


def _printable(text: str) -> str:
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
        elif record.exc_text:
            entry["exception"] = record.exc_text
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
        self._of_libraries = Allowance(LIBRARY_LINES_PER_S)
        self._of_own: defaultdict[str, Allowance] = defaultdict(lambda: Allowance(LINES_PER_S))

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self._writer.dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a line, unless there were too many like it. Never blocks or raises."""
        is_own = record.name.partition(".")[0] in TRUSTED
        suppressed = 0
        if record.name != REQUEST_LOG:
            allowance = self._of_own[record.name] if is_own else self._of_libraries
            granted, suppressed = allowance.take(1, time.monotonic())
            if not granted:
                return
        try:
            record = record if is_own else _of_library(record)
            line = self.format(_telling(record, suppressed) if suppressed else record)
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


def _of_library(record: logging.LogRecord) -> logging.LogRecord:
    """A library's record without anything a caller may have sent: no arguments, no error text.

    The text of a warning is an argument, but written by the code that warns: it stays.
    """
    known = copy.copy(record)
    text = str(record.msg)
    if record.name == WARNINGS and isinstance(record.args, tuple) and record.args:
        text = str(record.args[0])
    known.msg, known.args = text[:MAX_LIBRARY_CHARS].strip(), ()
    known.exc_text = None
    if record.exc_info and record.exc_info[0] is not None:
        kind, _, trace = record.exc_info
        known.exc_text = f"{''.join(traceback.format_tb(trace))}{kind.__name__}"
    known.exc_info = None
    return known


def _telling(record: logging.LogRecord, suppressed: int) -> logging.LogRecord:
    """A copy of the record with the number of suppressed lines before it."""
    known = copy.copy(record)
    known.fields = {**getattr(record, "fields", {}), "suppressed": suppressed}
    return known


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
