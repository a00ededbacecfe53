"""Who may connect, who may call and how much, as the settings say; keeps the files' state fresh."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from service.addresses import is_loopback
from service.rpc.recorder import Recorder
from service.security.guard import Guard
from service.security.rate_limit import RateLimit
from service.security.tls import Tls
from service.security.tokens import TokenFile

if TYPE_CHECKING:
    from service.config import ServerConfig
    from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# How often the files are looked at: a token that leaked should be dead soon.
LOOK_S = 1.0


class Access:
    """TLS, tokens and rate limit of one server; each is None when nothing asked for it.

    Args:
        config: The settings.
        metrics: Counts attempts to read the files again.

    Attributes:
        tls: What the gRPC port is opened with.
        rate_limit: What each caller may ask for.

    Raises:
        CredentialError: If a file can not be used.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._metrics = metrics
        self.tls = Tls.of(config)
        self._tokens = TokenFile(Path(config.auth_token_file)) if config.auth_token_file else None
        rate = config.rate_limit_images_per_s
        self.rate_limit = RateLimit(rate, time.monotonic) if rate else None
        if self._tokens:
            _warn_of_plaintext(config)

    def guard(self, recorder: Recorder) -> Guard:
        """What stands before every method."""
        return Guard(self._tokens, recorder, self._metrics.dropped)

    def summary(self) -> str:
        """For people, such as ``mutual TLS, 2 tokens``."""
        tls = "plaintext" if self.tls is None else "mutual TLS" if self.tls.is_mutual else "TLS"
        tokens = f"{len(self._tokens.files.value)} token(s)" if self._tokens else "no tokens"
        return f"{tls}, {tokens}"

    def flags(self) -> str:
        """What a caller adds to ``digits classify``, with a space behind; its files are its own."""
        flags = ""
        if self.tls is not None:
            flags += "--tls-ca CA.pem "
            flags += "--tls-cert CERT.pem --tls-key KEY.pem " if self.tls.is_mutual else ""
        return flags + ("--token-file TOKEN " if self._tokens else "")

    async def watch(self) -> None:
        """Reads files again that changed, until cancelled."""
        watched = {"tls": self.tls, "tokens": self._tokens}
        while any(watched.values()):
            await asyncio.sleep(LOOK_S)
            for kind, owner in watched.items():
                try:
                    changed = owner.files.refresh() if owner else None
                except Exception:  # ending here would end every later look
                    logger.exception("reading %s again failed; this is a bug", kind)
                    continue
                if changed is not None:
                    self._metrics.credential_load(kind, "loaded" if changed else "refused")


def _warn_of_plaintext(config: ServerConfig) -> None:
    """Tells where tokens would cross a network as they are."""
    ports = []
    if not config.tls_cert:
        ports.append(("without --tls-cert", config.host))
    if config.classifies_over_http:
        ports.append(("with --http-classify, which has no TLS,", config.http_host or config.host))
    for how, host in ports:
        if not is_loopback(host):
            logger.warning(
                "--auth-token-file %s on %s: whoever can read the network's traffic can read the "
                "tokens",
                how,
                host,
            )
