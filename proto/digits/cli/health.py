"""``digits health``: asks ``grpc.health.v1``, with the exit status of grpc-health-probe."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from digits.channel import call_metadata, checked_timeout_s
from digits.cli.flags import add_connection_flags, explained, printable, tls_of, token_of

SERVING, MISUSED, NOT_CONNECTED, FAILED, UNHEALTHY = range(5)
READINESS = "digits.v1.DigitClassifierService"
EPILOG = """\
exit status, as of grpc-health-probe:
  0  SERVING
  1  misused
  2  no connection within the deadline
  3  the call failed, took too long, or the service is not known
  4  another status than SERVING
"""


class _Parser(argparse.ArgumentParser):
    """Misuse is 1 here, since 2 means no connection."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(MISUSED, f"{self.prog}: error: {message}\n")


def health(argv: list[str]) -> int:
    """Prints a service's status; returns the exit status."""
    parser = _Parser(
        prog="digits health",
        description="Asks a server for its health, once, by the standard protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--service",
        default="",
        help=f"whose health: empty for the server's liveness (default), {READINESS} for readiness",
    )
    add_connection_flags(parser, timeout_s=1.0)
    arguments = parser.parse_args(argv)
    try:
        checked_timeout_s(arguments.timeout_s)
        tls = tls_of(arguments)
        credentials = tls.credentials() if tls else None
        metadata = call_metadata(token_of(arguments))
    except (ValueError, OSError) as error:
        parser.error(explained(error))
    if credentials is None:
        channel = grpc.insecure_channel(arguments.address)
    else:
        channel = grpc.secure_channel(arguments.address, credentials)
    with channel:
        return _asked(channel, arguments, metadata)


def _asked(
    channel: grpc.Channel, arguments: argparse.Namespace, metadata: tuple[tuple[str, str], ...]
) -> int:
    timeout_s = arguments.timeout_s
    try:
        grpc.channel_ready_future(channel).result(timeout_s)
    except grpc.FutureTimeoutError:
        print(f"no connection to {arguments.address} within {timeout_s:g} s", file=sys.stderr)
        return NOT_CONNECTED
    request = health_pb2.HealthCheckRequest(service=arguments.service)
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(request, timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        print(printable(f"{error.code().name}: {error.details()}"), file=sys.stderr)
        return FAILED
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(status)
    return SERVING if status == "SERVING" else UNHEALTHY
