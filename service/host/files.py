"""Reads files that are not trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    A pipe or a device could block the reader for ever, or never end; it is opened without blocking
    and then rejected. The size is checked before anything is read.

    Raises:
        OSError: If it can not be read; EFBIG if it is larger than ``max_bytes``, EINVAL if it is no
            regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file", str(path))
        if status.st_size > max_bytes:
            got = f"expected at most {max_bytes} bytes, got {status.st_size}"
            raise OSError(errno.EFBIG, got, str(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it is growing
        raise OSError(errno.EFBIG, f"expected at most {max_bytes} bytes, got more", str(path))
    return data
