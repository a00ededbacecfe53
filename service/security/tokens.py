"""Bearer tokens from a file: which caller a call is from, by the token it shows."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service.security.rotation import CredentialError, RotatingFiles

FLAG = "--auth-token-file"
# What `openssl rand -hex 16` prints: 128 bits, which nobody guesses.
MIN_CHARS, MAX_CHARS = 32, 512
# Every burst of calls is compared with all of them.
MAX_TOKENS = 256
# Source: RFC 6750, section 2.1. Its alphabet has no colon, so one can end a name.
TOKEN = rf"[A-Za-z0-9._~+/-]{{{MIN_CHARS},{MAX_CHARS}}}={{0,2}}"
LINE = re.compile(rf"(?:(?P<name>[\w.-]{{1,64}}):)?(?P<token>{TOKEN})", re.ASCII)
SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file.

    Attributes:
        digest: SHA-256 of the token, which itself is not kept.
        caller: Whose it is: the line's name, or one made from the digest.
    """

    digest: bytes
    caller: str


class TokenFile:
    """The tokens that are valid now, by a file that may be replaced at any time.

    Args:
        path: One ``TOKEN`` or ``NAME:TOKEN`` a line; ``#`` begins a comment.

    Attributes:
        files: To be refreshed now and then; its value are the tokens.

    Raises:
        CredentialError: If the file can not be used.
    """

    def __init__(self, path: Path) -> None:
        self.files = RotatingFiles({FLAG: path}, partial(_tokens, path), secret={FLAG})

    def caller(self, shown: bytes) -> str | None:
        """Whose token has this digest; None if it is not in the file.

        Takes the same time whichever it is, or nearly is: digests are compared whole, and all of
        them.
        """
        found = None
        for token in self.files.value:
            if hmac.compare_digest(token.digest, shown):
                found = token.caller
        return found


def shown_digest(metadata: Iterable[tuple[str, Any]]) -> bytes | None:
    """SHA-256 of the one bearer token in a call's metadata; None without one."""
    shown = [value for key, value in metadata if key == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str):
        return None
    if shown[0][: len(SCHEME)].lower() != SCHEME:
        return None
    return _digest(shown[0][len(SCHEME) :])


def _tokens(path: Path, content: bytes) -> tuple[Token, ...]:
    try:
        lines = _lines(path, content)
    except CredentialError as error:
        raise CredentialError(f"{FLAG}: {error}") from None
    tokens = []
    for line in lines:
        digest = _digest(line["token"])
        tokens.append(Token(digest, line["name"] or f"token-{digest.hex()[:16]}"))
    return tuple(tokens)


def _lines(path: Path, content: bytes) -> list[re.Match[str]]:
    """The lines that hold a token. Errors tell where something is wrong, never what is there."""
    found: dict[str, re.Match[str]] = {}
    # Not splitlines(), which also splits at characters that a comment may hold.
    for number, raw in enumerate(content.decode("utf-8", "replace").split("\n"), start=1):
        text = raw.partition("#")[0].strip()
        if not text:
            continue
        line = LINE.fullmatch(text)
        if line is None:
            raise CredentialError(
                f"{path}: line {number}: expected TOKEN or NAME:TOKEN, a token being {MIN_CHARS} "
                f"to {MAX_CHARS} of A-Z a-z 0-9 . _ ~ + / -, got {len(text)} characters that are "
                "not that"
            )
        if line["token"] in found:
            raise CredentialError(f"{path}: line {number}: expected each token once, got one again")
        found[line["token"]] = line
    if not 1 <= len(found) <= MAX_TOKENS:
        raise CredentialError(f"{path}: expected 1 to {MAX_TOKENS} tokens, got {len(found)}")
    return list(found.values())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
