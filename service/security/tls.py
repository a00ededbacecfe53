"""TLS of the gRPC port: the certificate, its key, and who signs the certificates of callers."""

from __future__ import annotations

import base64
import datetime as dt
import logging
import re
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from service.security.rotation import CredentialError, RotatingFiles

if TYPE_CHECKING:
    from service.config import ServerConfig

logger = logging.getLogger(__name__)

CERTIFICATE, KEY, CLIENT_CA = "--tls-cert", "--tls-key", "--tls-client-ca"
FIRST_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END", re.DOTALL)
# How the public key of a certificate begins. Source: RFC 8410, section 4.
# The two times of a certificate, one behind the other. Source: RFC 5280, section 4.1.2.5.
TIME = rb"(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z"
VALIDITY = re.compile(rb"\x30." + TIME + TIME, re.DOTALL)
ED25519_KEY = bytes.fromhex("300506032b6570032100")


class Tls:
    """The server's side of TLS, by files that may be replaced at any time.

    A handshake uses what the files held when they were last read and valid; connections
    that exist are not touched. A certificate that has expired, or is not valid yet, is warned about
    at the start, and not taken in place of another.

    Args:
        certificate: PEM file of the certificate, and of those between it and its root.
        key: PEM file of its private key, unencrypted.
        client_ca: PEM file of the roots of callers' certificates; with it every caller needs one.

    Attributes:
        files: To be refreshed now and then.

    Raises:
        CredentialError: If the files can not be used.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        paths = {CERTIFICATE: certificate, KEY: key}
        if client_ca is not None:
            paths[CLIENT_CA] = client_ca
        self._has_begun = False
        self.files = RotatingFiles(paths, partial(self._credentials, paths), secret={KEY})
        self._has_begun = True
        self.is_mutual = client_ca is not None
        self._in_use = self.files.value.configuration

    @classmethod
    def of(cls, config: ServerConfig) -> Tls | None:
        """By the settings; None for plaintext."""
        if not config.tls_cert:
            return None
        client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
        return cls(Path(config.tls_cert), Path(config.tls_key), client_ca)

    def _credentials(self, paths: dict[str, Path], *contents: bytes) -> Credentials:
        made = _credentials(paths, *contents)
        trouble = _time_trouble(_first_certificate(contents[0]), dt.datetime.now(dt.UTC))
        if trouble:
            message = f"{CERTIFICATE}: {paths[CERTIFICATE]}: {trouble}"
            if self._has_begun:
                raise CredentialError(message)
            logger.warning("%s: callers will refuse to connect", message)
        return made

    def context(self) -> ssl.SSLContext:
        """What the next connection of ``service.http2`` is made with."""
        return self.files.value.context

    def server_credentials(self) -> grpc.ServerCredentials:
        """What a port of grpcio is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._in_use,
            self._fetch,  # type: ignore[arg-type] # may return None: the stubs do not know
            require_client_authentication=self.is_mutual,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC before each handshake: another configuration, or None for no change."""
        latest = self.files.value.configuration
        if latest is self._in_use:
            return None
        self._in_use = latest
        return latest


@dataclass(frozen=True)
class Credentials:
    """What a certificate, its key and perhaps the roots of callers' certificates make.

    Attributes:
        context: For ``service.http2``.
        configuration: For grpcio.
    """

    context: ssl.SSLContext
    configuration: grpc.ServerCertificateConfiguration


def _credentials(
    paths: dict[str, Path], certificate: bytes, key: bytes, client_ca: bytes | None = None
) -> Credentials:
    """Checked first: a certificate that can not be used would only fail at every handshake."""
    for flag in paths.keys() - {KEY}:
        _check_certificates(flag, paths[flag])
    _check_kind(paths[CERTIFICATE], _first_certificate(certificate))
    context = _context(paths)
    # OpenSSL reads the files itself. It must have seen what gRPC is given.
    if (paths[CERTIFICATE].read_bytes(), paths[KEY].read_bytes()) != (certificate, key):
        raise CredentialError(f"{CERTIFICATE}: {paths[CERTIFICATE]}: changed while it was read")
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
    return Credentials(context, configuration)


def _context(paths: dict[str, Path]) -> ssl.SSLContext:
    """TLS as HTTP/2 asks for it. Source: RFC 9113, section 9.2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["h2"])
    _load_pair(context, paths[CERTIFICATE], paths[KEY])
    if CLIENT_CA in paths:
        context.load_verify_locations(paths[CLIENT_CA])
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session is not verified again: it would let in a certificate that has expired.
        # Of TLS 1.3 tickets can be turned off; the session cache of 1.2 can not, from Python.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
    return context


def _check_certificates(flag: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise CredentialError(
            f"{flag}: {path}: expected PEM certificates, got something else"
        ) from None


def _first_certificate(certificate: bytes) -> bytes:
    """The first certificate of a PEM file, which is the server's; empty if it is not found."""
    first = FIRST_CERTIFICATE.search(certificate)
    try:
        return base64.b64decode(first[1]) if first else b""
    except ValueError:  # a comment looks like a certificate; OpenSSL found one
        return b""


def _time_trouble(der: bytes, now: dt.datetime) -> str:
    """Describes an expired or not yet valid certificate; empty if it is valid now."""
    found = VALIDITY.search(der)
    if found is None:
        return ""
    begins, ends = (_time(short, long) for short, long in (found.groups()[:2], found.groups()[2:]))
    if now > ends:
        return f"expected a certificate that is valid, got one that expired at {ends:%F %T} UTC"
    if now < begins:
        return f"expected a certificate that is valid, got one from {begins:%F %T} UTC on"
    return ""


def _time(short: bytes | None, long: bytes | None) -> dt.datetime:
    """UTCTime, whose years are those from 1950 to 2049, or GeneralizedTime."""
    text = (long or (b"19" if (short or b"") >= b"50" else b"20") + (short or b"")).decode()
    return dt.datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=dt.UTC)


def _check_kind(path: Path, der: bytes) -> None:
    if ED25519_KEY in der:
        raise CredentialError(
            f"{CERTIFICATE}: {path}: expected a certificate with an RSA or ECDSA key, got one with "
            "an Ed25519 key, which gRPC's TLS does not take"
        )


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        reasons = {"KEY_VALUES_MISMATCH": "the key of another certificate"}
        got = reasons.get(error.reason or "", error.reason or "something else")
        raise CredentialError(
            f"{KEY}: {key}: expected the unencrypted PEM private key of {CERTIFICATE} "
            f"{certificate}, got {got}"
        ) from None
