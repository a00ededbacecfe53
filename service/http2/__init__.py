"""HTTP/2 and gRPC on sockets, in Python alone. Imports nothing else of ``service``.

``Server`` is the loop and the sockets, ``Link`` one connection with its calls, ``Connection`` the
protocol without I/O, ``Call`` one RPC.
"""

from service.http2.call import Call
from service.http2.connection import Connection, ConnectionLimits
from service.http2.limits import Limits
from service.http2.server import Server

__all__ = ["Call", "Connection", "ConnectionLimits", "Limits", "Server"]
