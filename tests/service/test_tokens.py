"""Files of tokens: what they may hold, and how a token is looked up."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

import pytest

from service.security.rotation import CredentialError
from service.security.tokens import MAX_TOKENS, MIN_CHARS, TokenFile, shown_digest
from tests.calls import ANNA, BERT, bearer


def digest(token: str) -> bytes:
    """What the server looks up for a token that a caller shows."""
    found = shown_digest(bearer(token))
    assert found
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("", "expected 1 to 256 tokens, got 0"),
        ("# nothing\n\n", "expected 1 to 256 tokens, got 0"),
        (f"{ANNA}\n{ANNA[:31]}\n", "line 2: expected TOKEN or NAME:TOKEN, a token being 32 to 512"),
        (f"an na:{ANNA}", "line 1: expected TOKEN or NAME:TOKEN"),
        (f"{ANNA} {BERT}", "line 1: expected TOKEN or NAME:TOKEN"),
        (f"Bearer {ANNA}", "line 1: expected TOKEN or NAME:TOKEN"),
        (f"a:{ANNA}\nb:{ANNA}", "line 2: expected each token once, got one again"),
        ("\n".join(f"{n:064}" for n in range(MAX_TOKENS + 1)), "expected 1 to 256 tokens, got 257"),
    ],
)
def test_file_of_tokens_that_is_wrong_is_named_without_what_it_holds(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "tokens"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CredentialError) as caught:
        TokenFile(path)
    assert str(caught.value).startswith(f"--auth-token-file: {path}: {message}")
    assert ANNA[:31] not in str(caught.value)


def test_every_digest_is_compared_whichever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens"
    listed = [secrets.token_hex(32) for _ in range(5)]
    path.write_text("\n".join(listed))
    tokens = TokenFile(path)
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        "service.security.tokens.hmac.compare_digest",
        lambda a, b: compared.append(1) or compare(a, b),
    )
    for token in (listed[0], listed[-1], secrets.token_hex(32)):
        compared.clear()
        tokens.caller(digest(token))
        assert len(compared) == len(listed)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_comment_ends_with_its_line_and_nothing_else(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(f"{ANNA}\n# no more: {separator}{BERT}\n".encode())
    tokens = TokenFile(path)
    assert tokens.caller(digest(ANNA))
    assert tokens.caller(digest(BERT)) is None


def test_tokens_of_one_name_are_one_caller(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"anna:{ANNA}\nanna:{BERT}\n{'0' * MIN_CHARS}\n{'1' * MIN_CHARS}==")
    tokens = TokenFile(path)
    shown = [ANNA, BERT, "0" * MIN_CHARS, "1" * MIN_CHARS + "=="]
    callers = [tokens.caller(digest(token)) for token in shown]
    assert callers[:2] == ["anna", "anna"]
    assert len(set(callers)) == 3
