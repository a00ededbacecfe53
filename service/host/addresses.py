"""Addresses to listen on, to be reached at, and of callers."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """True if only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def socket_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def neighbourhood(address: str) -> str:
    """The network that a rate limit counts an address in: an IPv6 /64, loopback, or itself.

    Args:
        address: Of a caller; what is no IP address is itself.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            network = ipaddress.IPv6Network((int(found), 64), strict=False)
            return "loopback" if found.is_loopback else str(network)
        found = found.ipv4_mapped
    return "loopback" if found.is_loopback else str(found)
