"""What carries Classify: adapters that turn RPCs into ``Call`` objects, and the choice of one."""

from __future__ import annotations

import importlib.util
import ipaddress
import resource
from dataclasses import dataclass

from service import wire
from service.config import ServerConfig

# Room in a message beside the pixels of the largest request, and for files.
MESSAGE_SLACK_BYTES = 2**20
# Where the process may have more file descriptors than anybody needs.
MAX_CONNECTIONS = 10_000
CLASSIFY = "/digits.v1.DigitClassifierService/Classify"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may take of the server before any code of ours sees a call.

    Those without a default are settings; ``grpcio.py`` and ``native.py`` say which of them their
    transport can enforce.

    Attributes:
        message_bytes: Of a request, after decompression.
        connections: At the same time.
        connection_age_s: After which a connection is asked to go; 0 never does.
        connection_grace_s: What its calls get then.
        calls_per_connection: At the same time; the caller's library makes more of them wait.
        metadata_bytes: Of a call, counted as HTTP/2 counts a header list.
        idle_s: After which a connection without a call is asked to go.
        keepalive_s: Of silence, after which a connection is asked whether its caller still lives.
        keepalive_timeout_s: For the answer to that.
        ping_interval_s: That a caller leaves between its own pings.
        handshake_s: For the first bytes of HTTP/2.
        pending: Calls, of all callers, that have begun and that the server has not come to yet. Of
            more than that some are reset, of more than twice that all.
        arriving: Calls, of all callers, whose request has begun to come and is not there yet.
        arrival_s: For a request to come whole.
        young_s: Age up to which a call is not given up for more than ``arriving``.
    """

    message_bytes: int
    connections: int
    connection_age_s: float
    connection_grace_s: float
    calls_per_connection: int
    keepalive_s: float
    keepalive_timeout_s: float
    ping_interval_s: float
    metadata_bytes: int = 16 * 1024
    idle_s: float = 900.0
    handshake_s: float = 20.0
    pending: int = 4096
    arriving: int = 256
    arrival_s: float = 60.0
    young_s: float = 1.0


def limits_of(config: ServerConfig) -> Limits:
    """What the settings say about callers."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        message_bytes=config.max_images_per_request * wire.IMAGE_BYTES + MESSAGE_SLACK_BYTES,
        connections=config.max_connections or min(MAX_CONNECTIONS, descriptors // 2),
        connection_age_s=config.max_connection_age_s,
        connection_grace_s=config.grace_s,
        calls_per_connection=config.max_calls_per_connection,
        keepalive_s=config.keepalive_s,
        keepalive_timeout_s=config.keepalive_timeout_s,
        ping_interval_s=config.min_ping_interval_s,
    )


class TransportError(RuntimeError):
    """The transport that was asked for can not be had; the message says why."""


def choose_transport(config: ServerConfig) -> tuple[str, str]:
    """The transport's name and the reason for it.

    ``auto`` keeps to grpcio for callers from elsewhere, because the native transport buffers a
    message of any size before it can be refused, and where TLS is asked for, which native lacks.

    Raises:
        TransportError: If ``native`` was asked for and is not installed, or can not do something
            else that was asked for.
    """
    installed = importlib.util.find_spec("pygrpc_native") is not None
    if config.transport == "native":
        flag = _only_grpcio_can_do(config)
        if flag:
            raise TransportError(
                f"transport: native was asked for, and so was {flag}, which only grpcio can do"
            )
        if not installed:
            raise TransportError(
                "transport: native was asked for, but pygrpc-native is not installed: "
                "pip install 'digits-serving[native]'"
            )
        return "native", "native was asked for"
    if config.transport == "grpcio":
        return "grpcio", "grpcio was asked for"
    reason = _against_native(config, installed=installed)
    if reason:
        return "grpcio", f"auto: {reason}"
    return "native", "auto: pygrpc-native is installed and only this machine can call"


def _only_grpcio_can_do(config: ServerConfig) -> str:
    """The flag that native has nothing for; empty if none of them is given."""
    if config.max_connection_age_s:
        return "--max-connection-age-s"
    return "--channelz" if config.channelz else ""


def _against_native(config: ServerConfig, *, installed: bool) -> str:
    """Why ``auto`` keeps to grpcio, or nothing."""
    if config.tls_cert:
        return "TLS was asked for, which native does not have"
    flag = _only_grpcio_can_do(config)
    if flag:
        return f"only grpcio can do {flag}"
    if not installed:
        return "pygrpc-native is not installed"
    if not is_loopback(config.host):
        return f"callers may come from elsewhere than this machine ({config.host})"
    return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def socket_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
