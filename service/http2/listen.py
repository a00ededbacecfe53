"""Addresses: listening sockets, and callers as gRPC spells them."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

# Connections that the kernel completes before they are accepted.
BACKLOG = 1024
UNIX = "unix:"


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound, listening sockets for an address; several where a name means several addresses."""
    if host.startswith(UNIX):
        return [_listen_unix(host.removeprefix(UNIX))]
    dual = host == "::" and socket.has_dualstack_ipv6()
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, *_, address in dict.fromkeys(found):
            bound = (address[0], listeners[0].getsockname()[1] if listeners else port)
            listeners.append(
                socket.create_server(bound, family=family, backlog=BACKLOG, dualstack_ipv6=dual)
            )
            listeners[-1].setblocking(False)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen_unix(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if Path(path).is_socket():  # left by a process that is gone
            Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def peer_of(sock: socket.socket, address: Any) -> str:
    """An address, as gRPC spells it."""
    if sock.family == socket.AF_UNIX:
        return UNIX
    if sock.family == socket.AF_INET6:
        return f"ipv6:[{address[0]}]:{address[1]}"
    return f"ipv4:{address[0]}:{address[1]}"
