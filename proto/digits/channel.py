"""The channel to a server: TLS, tokens, load balancing, keepalive, deadlines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import grpc

from digits.target import is_loopback

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
# gRPC takes far longer deadlines for ones that have passed.
MAX_TIMEOUT_S = 1e6

# Calls go to every address that the name resolves to, in turn, and round those that do not answer.
# There is no retry policy: the server's hint when to come back is in the status details, where
# gRPC does not look (see digits.retry).
SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
# A ping on a connection with a call under way and nothing to read for so long. This project's
# servers allow one every 5 s; load balancers forget connections that are silent for 350 s.
KEEPALIVE_S = 30
# Sent bytes and pings that nobody acknowledges for so long end the connection: a server that is
# gone without a word costs its callers this long, not the quarter of an hour that TCP waits.
KEEPALIVE_TIMEOUT_S = 20
# After an outage of any length a server is found again this soon; gRPC's own backoff grows to two
# minutes. An attempt to connect may take longer, TLS being slow when all callers come back at once;
# in 5 s TCP sends its SYN at 0, 1 and 3 s, so that no gap is longer than 2 s there either.
RECONNECT_BACKOFF_S = (0.1, 2.0)
CONNECT_TIMEOUT_S = 5
# An answer of the largest request that a server can be told to take (--max-images-per-request, at
# most 100,000 images of 56 bytes in the answer) fits; a peer gone wrong can not fill the memory.
# gRPC's own limit is 4 MiB.
MAX_ANSWER_BYTES = 2**23
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # of what was sent
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # of pings: a minute otherwise
    ("grpc.initial_reconnect_backoff_ms", int(RECONNECT_BACKOFF_S[0] * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(RECONNECT_BACKOFF_S[1] * 1000)),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_S * 1000),  # the time of an attempt, really
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
]


def channel_options(address: str) -> list[tuple[str, Any]]:
    """For a channel to an address. A proxy would look for a loopback address on its own machine."""
    proxy = [("grpc.enable_http_proxy", 0)] if is_loopback(address) else []
    return [*CHANNEL_OPTIONS, *proxy]


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
