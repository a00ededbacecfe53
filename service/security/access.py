"""Who may connect, who may call and how much, as the settings say; keeps the files' state fresh."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from service.host.addresses import is_loopback
from service.security.rate_limit import RateLimit
from service.security.tls import Tls
from service.security.tokens import TokenFile

if TYPE_CHECKING:
    from service.config import ServerConfig
    from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# How often the files are polled: a token that leaked should be revoked soon.
LOOK_S = 1.0


class Access:
    """TLS, tokens and rate limit of one server; each is None when nothing asked for it.

    Args:
        config: The settings.
        metrics: Counts attempts to read the files again.

    Attributes:
        tls: What the gRPC port is opened with.
        tokens: Who may call.
        rate_limit: What each caller may ask for.

    Raises:
        CredentialError: If a file can not be used.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._metrics = metrics
        self.tls = Tls.of(config)
        self.tokens = TokenFile(Path(config.auth_token_file)) if config.auth_token_file else None
        rate = config.rate_limit_images_per_s
        self.rate_limit = RateLimit(rate, time.monotonic) if rate else None
        if self.tokens:
            _warn_of_plaintext(config)

    def summary(self) -> str:
        """For people, such as ``mutual TLS, 2 tokens``."""
        tls = "plaintext" if self.tls is None else "mutual TLS" if self.tls.is_mutual else "TLS"
        tokens = f"{len(self.tokens.files.value)} token(s)" if self.tokens else "no tokens"
        return f"{tls}, {tokens}"

    def flags(self) -> str:
        """What a caller adds to ``digits classify``, with a space behind; its files are its own."""
        flags = ""
        if self.tls is not None:
            flags += "--tls-ca CA.pem "
            flags += "--tls-cert CERT.pem --tls-key KEY.pem " if self.tls.is_mutual else ""
        return flags + ("--token-file TOKEN " if self.tokens else "")

    async def watch(self) -> None:
        """Reads files again that changed, until cancelled."""
        watched = {"tls": self.tls, "tokens": self.tokens}
        while any(watched.values()):
            await asyncio.sleep(LOOK_S)
            for kind, owner in watched.items():
                try:
                    changed = owner.files.refresh() if owner else None
                except Exception:  # ending here would end all later polls
                    logger.exception("reading %s again failed; this is a bug", kind)
                    continue
                if changed is not None:
                    self._metrics.credential_load(kind, "loaded" if changed else "refused")


def _warn_of_plaintext(config: ServerConfig) -> None:
    """Tells where tokens would cross a network as they are."""
    if is_loopback(config.host) or (config.tls_cert and not config.playground):
        return
    how = "with --playground, which has no TLS," if config.playground else "without --tls-cert"
    logger.warning(
        "--auth-token-file %s on %s: whoever can read the network's traffic can read the tokens",
        how,
        config.host,
    )
