"""The limits on what callers may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller, and all of them together, may take of the server.

    Attributes:
        connections: At the same time. Beyond it the one that has been idle for longest makes room,
            else the one whose calls have not moved for longest, else the new one is closed.
        streams: Calls of one connection at the same time; the caller's library makes more wait.
        metadata_bytes: Of one call, counted as HTTP/2 counts a header list.
        reserved_bytes: Of requests of more than 64 KiB that one connection may send at the same
            time; others wait for their turn (flow control), one always goes on. With 64 KiB for
            each other call it bounds what a connection can make the server hold.
        held_bytes: Of requests that have not come whole, of all connections together: over it, the
            connection that holds the most loses the call that holds the most.
        unread_bytes: Answers that one connection has not taken: over it, its new calls are refused;
            over four times that it is closed.
        all_unread_bytes: The same of all connections: over it, the one with the most is closed.
        handshake_s: For TLS and the first bytes of HTTP/2.
        request_s: For a request to come whole.
        stall_s: In which a caller must take something of what is being sent to it.
        idle_s: After which a connection without a call is asked to go.
        keepalive_s: Of silence, after which a caller is pinged.
        keepalive_timeout_s: For the answer to that.
        connection_age_s: After which a connection is asked to go, give or take a tenth, so that
            load spreads over new servers; 0 never.
        connection_grace_s: What its calls get then.
    """

    connections: int = 10_000
    streams: int = 256
    metadata_bytes: int = 2**14
    reserved_bytes: int = 2**23
    held_bytes: int = 96 * 2**20
    unread_bytes: int = 2**23
    all_unread_bytes: int = 2**27
    handshake_s: float = 20.0
    request_s: float = 60.0
    stall_s: float = 60.0
    idle_s: float = 900.0
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0
    connection_age_s: float = 0.0
    connection_grace_s: float = 20.0
