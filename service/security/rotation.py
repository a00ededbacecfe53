"""Files that are replaced under a running server: certificates, keys, tokens."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Far more than certificates or tokens ever take.
MAX_FILE_BYTES = 2**20


class CredentialError(RuntimeError):
    """A file can not be used; the message names the setting, never what the file holds."""


class RotatingFiles(Generic[T]):
    """What some files mean, read again whenever one of them changed.

    They are a few kilobytes, so their bytes are compared: a file's times and size can stay the same
    when its content does not.

    Args:
        paths: The files, by the flag that names each.
        parse: Makes the value from their content, in the order of ``paths``.
        secret: Flags of the files that are to be kept from other users. One that everybody may
            write is not taken, one that everybody may read is warned about.

    Attributes:
        value: The last value that could be made.

    Raises:
        CredentialError: If none can be made at the start.
    """

    def __init__(
        self, paths: Mapping[str, Path], parse: Callable[..., T], secret: Container[str] = ()
    ) -> None:
        self._paths = paths
        self._parse = parse
        self._secret = secret
        self._warned: set[str] = set()
        self._seen: list[bytes | str] = self._look()
        self.value = self._read(self._seen)

    def refresh(self) -> bool | None:
        """Looks at the files: True if they brought another value, False if they were refused.

        A refusal is logged once, and the present value stays until the files change again.
        """
        found = self._look()
        if found == self._seen:
            return None
        self._seen = found
        try:
            self.value = self._read(found)
        except CredentialError as error:
            logger.error("%s; still using what was read before", error)
            return False
        logger.info("read again: %s", ", ".join(map(str, self._paths.values())))
        return True

    def _look(self) -> list[bytes | str]:
        """Each file's bytes, or why it can not be read."""
        found: list[bytes | str] = []
        for flag, path in self._paths.items():
            try:
                found.append(self._content(flag, path))
            except OSError as error:
                found.append(error.strerror or "can not be read")
        return found

    def _content(self, flag: str, path: Path) -> bytes | str:
        with open(path, "rb", opener=_open_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                return "expected a regular file, got something else"
            if flag in self._secret:
                if mode & stat.S_IWOTH:
                    return "expected a file of its owner, got one that everybody may write"
                self._warn(flag, path, is_open=bool(mode & stat.S_IROTH))
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            return f"expected at most {MAX_FILE_BYTES} bytes, got more"
        return content

    def _warn(self, flag: str, path: Path, *, is_open: bool) -> None:
        """Tells of a secret that is none, once."""
        if is_open and flag not in self._warned:
            logger.warning("%s: every user of this machine may read %s", flag, path)
        (self._warned.add if is_open else self._warned.discard)(flag)

    def _read(self, found: list[bytes | str]) -> T:
        for (flag, path), content in zip(self._paths.items(), found, strict=True):
            if isinstance(content, str):
                raise CredentialError(f"{flag}: {path}: {content}")
        try:
            return self._parse(*found)
        except OSError as error:  # a file went away since
            raise CredentialError(f"{error.filename}: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Of a pipe, nothing may ever come."""
    return os.open(path, flags | os.O_NONBLOCK)
