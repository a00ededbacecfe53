"""Files that are replaced under a running server: certificates, keys, tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CredentialError(RuntimeError):
    """A file can not be used; the message names the setting, never what the file holds."""


class RotatingFiles(Generic[T]):
    """What some files mean, read again whenever one of them changed.

    They are a few kilobytes, so their bytes are compared: a file's times and size can stay the same
    when its content does not.

    Args:
        paths: The files, by the flag that names each.
        parse: Makes the value from their content, in the order of ``paths``.

    Attributes:
        value: The last value that could be made.

    Raises:
        CredentialError: If none can be made at the start.
    """

    def __init__(self, paths: Mapping[str, Path], parse: Callable[..., T]) -> None:
        self._paths = paths
        self._parse = parse
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
            logger.error("%s; what was read before stays in use", error)
            return False
        logger.info("read again: %s", ", ".join(map(str, self._paths.values())))
        return True

    def _look(self) -> list[bytes | str]:
        """Each file's bytes, or why it can not be read."""
        found: list[bytes | str] = []
        for path in self._paths.values():
            try:
                found.append(path.read_bytes())
            except OSError as error:
                found.append(error.strerror or "can not be read")
        return found

    def _read(self, found: list[bytes | str]) -> T:
        for (flag, path), content in zip(self._paths.items(), found, strict=True):
            if isinstance(content, str):
                raise CredentialError(f"{flag}: {path}: {content}")
        try:
            return self._parse(*found)
        except OSError as error:  # a file went away since
            raise CredentialError(f"{error.filename}: {error.strerror}") from None
