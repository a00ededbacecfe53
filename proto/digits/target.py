"""The address of a server, a gRPC target: its form, and the HTTP proxy that gRPC takes to it."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import unquote, urlsplit

# Source: github.com/grpc/grpc/blob/master/doc/naming.md. What has none of these schemes is a name
# for DNS.
SCHEMES = "dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|google-c2p|passthrough"
TARGET = re.compile(rf"(?:({SCHEMES}):(?://[^/]*/)?)?(.*)", re.DOTALL)
# The schemes of which the rest is checked here; None is for no scheme.
CHECKED = {None, "dns", "ipv4", "ipv6"}
# A name, an IPv4 address or an IPv6 address in brackets, with or without a port; or a bare IPv6
# address, in which a port can not be told.
ENDPOINT = re.compile(r"(?:([^\s:/\[\],]+)|\[([^\s/\[\],]+)\])(?::([0-9]{1,5}))?")
BARE_IPV6 = re.compile(r"[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*(?:%\w+)?")
# Variables of the environment, as gRPC reads them; the first that is set counts.
# Source: src/core/handshaker/http_connect/http_proxy_mapper.cc.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")


def checked_address(address: str) -> str:
    """The address, unchanged.

    Raises:
        ValueError: If it is no gRPC target, or its port is none.
    """
    scheme, rest = _split(address)
    if scheme in ("ipv4", "ipv6"):
        good = all(_is_endpoint(each, bare=False) for each in rest.split(","))
    elif scheme in CHECKED:
        good = _is_endpoint(rest)
    else:
        good = bool(rest)
    if not good:
        got = f"the URL {address!r}" if scheme is None and "://" in address else repr(address)
        raise ValueError(f"address: expected host:port or a gRPC target, got {got}")
    return address


def is_loopback(address: str) -> bool:
    """True if an address can only mean this machine."""
    scheme, rest = _split(address)
    if scheme in ("unix", "unix-abstract"):
        return True
    return scheme in CHECKED and all(_is_loopback(_host(each)) for each in rest.split(","))


def proxy_of(address: str) -> str | None:
    """The proxy between here and an address, as the environment says, or None.

    Without the credentials that may be in it.
    """
    scheme, rest = _split(address)
    proxy = _first_set(PROXY_VARIABLES)
    if not proxy or scheme not in CHECKED or is_loopback(address):
        return None
    host = _host(rest)
    if any(_excludes(entry.strip(), host) for entry in _first_set(NO_PROXY_VARIABLES).split(",")):
        return None
    url = urlsplit(proxy)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _split(address: str) -> tuple[str | None, str]:
    """The scheme, if it has one, and what is behind it."""
    match = TARGET.fullmatch(address)
    assert match is not None, "the pattern takes any text"
    return match[1], unquote(match[2])


def _is_endpoint(text: str, *, bare: bool = True) -> bool:
    """True for ``host:port``, and for a host alone if ``bare``."""
    match = ENDPOINT.fullmatch(text)
    if match is None or match[3] is None:
        return bare and (match is not None or BARE_IPV6.fullmatch(text) is not None)
    return 0 < int(match[3]) < 2**16


def _host(endpoint: str) -> str:
    match = ENDPOINT.fullmatch(endpoint)
    return (match[1] or match[2]) if match else endpoint


def _is_loopback(host: str) -> bool:
    try:
        ip = ipaddress.ip_address(host)
        return ip.is_loopback or ip.is_unspecified
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")


def _first_set(variables: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in variables if name in os.environ), "")


def _excludes(entry: str, host: str) -> bool:
    """True if a ``no_proxy`` entry covers a host, by the end of its name or by its network."""
    if not entry:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())
