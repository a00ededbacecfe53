"""What carries Classify: adapters that turn RPCs into ``Call`` objects, and the choice of one."""

from __future__ import annotations

import importlib.util
import ipaddress

from service.config import ServerConfig

CLASSIFY = "/digits.v1.DigitClassifierService/Classify"


class TransportError(RuntimeError):
    """The transport that was asked for can not be had; the message says why."""


def choose_transport(config: ServerConfig) -> tuple[str, str]:
    """The transport's name and the reason for it.

    ``auto`` keeps to grpcio for callers from elsewhere, because the native transport buffers a
    message of any size before it can be refused, and where TLS is asked for, which native lacks.

    Raises:
        TransportError: If ``native`` was asked for and is not installed.
    """
    installed = importlib.util.find_spec("pygrpc_native") is not None
    if config.transport == "native":
        if not installed:
            raise TransportError(
                "transport: native was asked for, but pygrpc-native is not installed: "
                "pip install 'digits-serving[native]'"
            )
        return "native", "native was asked for"
    if config.transport == "grpcio":
        return "grpcio", "grpcio was asked for"
    if config.tls_cert:
        return "grpcio", "auto: TLS was asked for, which native does not have"
    if not installed:
        return "grpcio", "auto: pygrpc-native is not installed"
    if not is_loopback(config.host):
        return "grpcio", f"auto: callers may come from elsewhere than this machine ({config.host})"
    return "native", "auto: pygrpc-native is installed and only this machine can call"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def socket_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
