"""The folder of the socket between the native front and the grpcio server behind it.

Only this user may enter it. Its owner holds a lock on it, which ends with the process: a server
that was killed leaves its folder behind, and the next one to start sees that by the lock and
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from service.transports import TransportError

PREFIX = "digits-serving-"
SOCKET = "grpcio.sock"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for ``SOCKET``, removed at the end.

    Raises:
        TransportError: If there is no place for one.
    """
    try:
        for abandoned in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
            with contextlib.suppress(OSError):  # not ours to enter, or not a folder
                _remove_if_abandoned(abandoned)
        folder, lock = _make()
    except OSError as error:
        raise TransportError(f"native needs a folder for its socket: {error}") from error
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def remove(folder: Path) -> None:
    """Removes the socket and the folder; one that holds anything else was not ours and stays."""
    with contextlib.suppress(OSError):
        (folder / SOCKET).unlink(missing_ok=True)
        folder.rmdir()


def _make() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = _lock(folder)
        if lock is not None:
            return folder, lock
        # Another server found it in the moment before it was locked, and removed it.


def _remove_if_abandoned(folder: Path) -> None:
    lock = _lock(folder)
    if lock is not None:
        remove(folder)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that locks the folder; None if another process does, or has removed it."""
    with contextlib.ExitStack() as closing:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            closing.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), folder.stat()):
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        closing.pop_all()
        return descriptor
