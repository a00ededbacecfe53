"""The standard streams of a process that serves: none is closed, and no thread waits for a reader.

A pipe that nobody reads is full after 64 KiB; from then on every write to it blocks. So whatever
is written here is written by a thread that does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import stat
import threading
from collections.abc import Callable

STDIN, STDOUT, STDERR = 0, 1, 2
# What waits to be written at most: thousands of lines.
QUEUE_BYTES = 2**20


def open_closed_streams() -> None:
    """Opens /dev/null in place of each standard stream that is closed.

    A socket would get its number otherwise, and a library that writes to standard error would
    write into a caller's connection.
    """
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # the lowest free number, so it is the same one as a rule
                os.dup2(opened, number)
                os.close(opened)


def never_block(descriptor: int) -> None:
    """Makes writes to a pipe or a terminal fail while it is full, instead of blocking.

    This is for libraries in C, which write to standard error on whichever thread they run. It is
    opened again because O_NONBLOCK belongs to the open file, which other processes share. What can
    not be opened again, such as a socket or another user's pipe, stays as it is.
    """
    if not (stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor)):
        return
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
        opened = os.open(f"/proc/self/fd/{descriptor}", flags)
        os.dup2(opened, descriptor)
        os.close(opened)


def write_all(descriptor: int, data: bytes) -> int:
    """Writes, and waits for as long as the reader takes.

    Returns:
        How many bytes were written: fewer than all of them after an error, such as a full disk.
    """
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, data[written:])
        except BlockingIOError:
            ready = select.poll()
            ready.register(descriptor, select.POLLOUT)
            ready.poll()
        except OSError:
            break
    return written


class LineWriter:
    """Writes lines on a thread of its own. ``write`` never blocks, whatever becomes of the reader.

    Lines that the queue has no room for, or that can not be written, are dropped. Their number is
    written behind the next line that gets through.

    Args:
        descriptor: Where to.
        dropped_line: Makes the line that tells how many were dropped.

    Attributes:
        dropped: Lines dropped so far.
    """

    def __init__(self, descriptor: int, dropped_line: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._dropped_line = dropped_line
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # Reentrant: a finalizer may log on a thread that is in here.
        self._changed = threading.Condition(threading.RLock())
        self._queued_bytes = 0
        self._reported = 0
        self._torn = False
        self.dropped = 0
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def write(self, line: str) -> None:
        """Takes a line, without its end. From any thread."""
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._changed:
            if self._queued_bytes + len(data) > QUEUE_BYTES:
                self.dropped += 1
                return
            self._queued_bytes += len(data)
            self._lines.put(data)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is written or dropped; False if that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queued_bytes, timeout_s)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            written = self._write(line)
            with self._changed:
                self.dropped += not written
                dropped = self.dropped
            if written and dropped > self._reported:
                self._tell(dropped)
            with self._changed:
                self._queued_bytes -= len(line)
                self._changed.notify_all()

    def _tell(self, dropped: int) -> None:
        line = self._dropped_line(dropped - self._reported)
        if self._write(line.encode(errors="backslashreplace") + b"\n"):
            self._reported = dropped

    def _write(self, line: bytes) -> bool:
        """Writes a line; False if not all of it could be written."""
        if self._torn:  # by an error in the middle of the line before
            line = b"\n" + line
        written = write_all(self._descriptor, line)
        self._torn = written < len(line) and (self._torn or written > 0)
        return written == len(line)
