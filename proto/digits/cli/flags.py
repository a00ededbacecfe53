"""Where a command's calls go: the flags that all commands with a client share."""

from __future__ import annotations

import argparse
from pathlib import Path

from digits.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, DigitClient, DigitError, Tls

# What ``connect`` and its client raise when a server can not be asked.
CALL_ERRORS = (OSError, DigitError)


def add_connection_flags(
    parser: argparse.ArgumentParser, timeout_s: float = DEFAULT_TIMEOUT_S
) -> None:
    """Adds them, in a group of their own."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--address", default=DEFAULT_ADDRESS, help=f"gRPC host:port (default {DEFAULT_ADDRESS})"
    )
    group.add_argument(
        "--timeout-s",
        type=float,
        default=timeout_s,
        metavar="S",
        help=f"deadline of a call in seconds (default {timeout_s:g})",
    )
    group.add_argument("--tls-ca", metavar="FILE", help="PEM roots of the server's certificate")
    group.add_argument("--tls-cert", metavar="FILE", help="PEM certificate to show (mutual TLS)")
    group.add_argument("--tls-key", metavar="FILE", help="PEM private key of --tls-cert")
    group.add_argument(
        "--token-file", metavar="FILE", help="file of TOKEN or NAME:TOKEN lines; the first is shown"
    )


def connect(arguments: argparse.Namespace) -> DigitClient:
    """A client as the flags say.

    Raises:
        ValueError: If they do not go together, or the file of tokens holds none.
        OSError: If a file can not be read.
    """
    return DigitClient(
        arguments.address,
        timeout_s=arguments.timeout_s,
        tls=tls_of(arguments),
        token=token_of(arguments),
    )


def tls_of(arguments: argparse.Namespace) -> Tls | None:
    """The encryption that the flags ask for; raises ValueError as ``connect`` does."""
    if arguments.tls_ca:
        return Tls(ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key)
    if arguments.tls_cert or arguments.tls_key:
        raise ValueError("--tls-cert and --tls-key: expected --tls-ca beside them, got none")
    return None


def token_of(arguments: argparse.Namespace) -> str | None:
    """The token that the flags name; raises as ``connect`` does."""
    return _first_token(Path(arguments.token_file)) if arguments.token_file else None


def _first_token(path: Path) -> str:
    """Of a file such as the server's: ``TOKEN`` or ``NAME:TOKEN`` a line, ``#`` begins a comment.

    Raises:
        ValueError: If it holds none; the message tells nothing that is in the file.
        OSError: If it can not be read.
    """
    # Not splitlines(), which also splits at characters that a comment may hold.
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        if entry := line.partition("#")[0].strip():
            return entry.rpartition(":")[2]
    raise ValueError(f"{path}: expected a line with TOKEN or NAME:TOKEN, got none")


def explained(error: Exception) -> str:
    """One line for the terminal."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(str(error))


def printable(text: str) -> str:
    """Text of a server, or a file's name, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
