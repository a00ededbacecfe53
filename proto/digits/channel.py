"""How the clients reach a server: encryption, tokens, balancing, keepalive, deadlines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
# gRPC takes far longer deadlines for ones that have passed.
MAX_TIMEOUT_S = 1e6

# Calls go to every address that the name resolves to, in turn, and round those that do not answer.
# There is no retry policy: the server's hint when to come back is in the status details, where
# gRPC does not look (see digits.patience).
SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
# A ping on a connection with a call under way and nothing to read for so long. This project's
# servers allow one every 5 s; load balancers forget connections that are silent for 350 s.
KEEPALIVE_S = 30
# Sent bytes and pings that nobody acknowledges for so long end the connection: a server that is
# gone without a word costs its callers this long, not the quarter of an hour that TCP waits.
KEEPALIVE_TIMEOUT_S = 20
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # of what was sent
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # of pings: a minute otherwise
]


@dataclass(frozen=True)
class Tls:
    """How a channel is encrypted, and who is at its ends. Files are PEM.

    Attributes:
        ca: File of the roots that may have signed the server's certificate; None for gRPC's own.
        cert: File of the certificate that this caller shows, where the server asks for one.
        key: File of its private key.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel.

        Raises:
            OSError: If a file can not be read.
            ValueError: If only one of ``cert`` and ``key`` is given.
        """
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: expected cert and key together, got one of them")
        ca, cert, key = (
            None if path is None else Path(path).read_bytes()
            for path in (self.ca, self.cert, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What a call shows. gRPC refuses call credentials on plaintext, so the token is metadata.

    Raises:
        ValueError: If the token can not be one.
    """
    if token is None:
        return ()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("token: expected printable ASCII without spaces, got something else")
    return (("authorization", f"Bearer {token}"),)


def checked_timeout_s(timeout_s: float) -> float:
    """The same number.

    Raises:
        ValueError: If it is no time that gRPC takes.
    """
    if not isinstance(timeout_s, Real) or not 0 < timeout_s < MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s: expected 0 to {MAX_TIMEOUT_S:g} seconds, got {timeout_s!r}")
    return timeout_s
