"""Whatever becomes of the reader of a standard stream, only the thread that writes waits for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.host.streams import QUEUE_BYTES, LineWriter, never_block, write_all
from tests.conftest import wait_until

LINE = "x" * 999


class Pipe:
    """A pipe of one page, and what writes lines into it."""

    def __init__(self) -> None:
        self.reader, self.descriptor = os.pipe()
        self._open = {self.reader, self.descriptor}
        self._writers: list[Any] = []
        fcntl.fcntl(self.descriptor, fcntl.F_SETPIPE_SZ, 4096)

    def line_writer(self) -> Any:
        self._writers.append(LineWriter(self.descriptor, lambda count: f"{count} dropped"))
        return self._writers[-1]

    def close(self, end: Any) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)

    def close_all(self) -> None:
        """The queue is dropped before its descriptor may be reused for another file."""
        self.close(self.reader)
        for writer in self._writers:
            assert writer.flush(30)
        self.close(self.descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close_all()


def read_in_background(reader: Any, lines: Any) -> Any:
    own = os.dup(reader)

    def read() -> None:
        with os.fdopen(own) as text:
            lines.extend(line.rstrip("\n") for line in text)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    for text in ("one", "two \udcff", "three"):
        writer.write(text)
    assert writer.flush(30)
    assert os.read(pipe.reader, 100) == b"one\ntwo \\udcff\nthree\n"
    assert writer.dropped == 0


def test_what_nobody_reads_is_dropped_counted_and_told(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    sent = 2 * QUEUE_BYTES // len(LINE)
    for _ in range(sent):
        writer.write(LINE)
    dropped = writer.dropped
    assert sent // 3 < dropped < sent
    assert not writer.flush(0)
    lines: list[Any] = []
    reading = read_in_background(pipe.reader, lines)
    assert writer.flush(30)
    writer.write("the end")
    assert writer.flush(30)
    pipe.close(pipe.descriptor)
    reading.join()
    told = [line for line in lines if line != LINE]
    assert told == [f"{dropped} dropped", "the end"]
    assert len(lines) - len(told) + writer.dropped == sent
    assert writer.dropped == dropped


def test_a_full_disk_and_a_reader_that_left_drop_lines(pipe: Pipe) -> None:
    pipe.close(pipe.reader)
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        for writer in (pipe.line_writer(), LineWriter(full.fileno(), str)):
            for _ in range(3):
                writer.write(LINE)
            assert writer.flush(30)
            assert writer.dropped == 3


def test_a_line_that_was_cut_off_does_not_spoil_the_next(pipe: Pipe, monkeypatch: Any) -> None:
    write, results = os.write, [4, OSError(28, "No space left on device")]

    def limited(where: Any, data: Any) -> Any:
        result = results.pop(0) if results else len(data)
        if isinstance(result, OSError):
            raise result
        return write(where, data[:result])

    monkeypatch.setattr("service.host.streams.os.write", limited)
    writer = pipe.line_writer()
    for text in ("first line", "second line", "third line"):
        writer.write(text)
    assert writer.flush(30)
    assert os.read(pipe.reader, 100) == b"firs\nsecond line\n1 dropped\nthird line\n"


def test_a_pipe_that_does_not_block_is_waited_for(pipe: Pipe) -> None:
    os.set_blocking(pipe.descriptor, False)
    lines: list[Any] = []
    reading = read_in_background(pipe.reader, lines)
    data = f"{LINE}\n".encode() * 50
    assert write_all(pipe.descriptor, data) == len(data)
    pipe.close(pipe.descriptor)
    reading.join()
    assert lines == [LINE] * 50


def test_libraries_do_not_wait_for_a_reader_and_other_processes_still_may(pipe: Pipe) -> None:
    others = os.dup(pipe.descriptor)
    try:
        never_block(pipe.descriptor)
        os.write(pipe.descriptor, bytes(4096))
        with pytest.raises(BlockingIOError):
            os.write(pipe.descriptor, LINE.encode())
        assert os.get_blocking(others)
    finally:
        os.close(others)


def test_a_file_is_not_opened_again(tmp_path: Path) -> None:
    """It would be written from its beginning, and it never blocks."""
    with (tmp_path / "log").open("wb") as file:
        os.write(file.fileno(), b"one ")
        never_block(file.fileno())
        os.write(file.fileno(), b"two")
    assert (tmp_path / "log").read_bytes() == b"one two"


def test_a_finalizer_may_log_while_a_line_is_taken(pipe: Pipe) -> None:
    """The garbage collector runs one on whichever thread it interrupts, locks held or not."""
    writer = pipe.line_writer()
    done = []

    def nested() -> None:
        with writer._changed:
            writer.write("from a finalizer")
        done.append(True)

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    wait_until(lambda: done)
    assert writer.flush(30)
    assert os.read(pipe.reader, 100) == b"from a finalizer\n"


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_no_socket_gets_the_number_of_a_closed_stream(closed: Any) -> None:
    code = f"""if True:
        import os, socket, sys
        from service.host.streams import open_closed_streams
        for number in {closed}:
            os.close(number)
        open_closed_streams()
        sys.exit(50 if socket.socket().fileno() > 2 else 1)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 50
