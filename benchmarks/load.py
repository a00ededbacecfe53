"""The load generator: h2load, from Debian's nghttp2-client."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt

from benchmarks.harness import (
    CLASSIFY_PATH,
    BenchmarkError,
    ServerProcess,
    served_artifact,
    settled,
)
from digits.oip import inference_pb2
from digits.v1 import digits_pb2

STREAM_PATH = "/digits.v1.DigitClassifierService/ClassifyStream"
INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
Pixels = npt.NDArray[np.uint8]


def classify_request(images: Pixels) -> bytes:
    """A serialised ClassifyRequest of uint8[N, 28, 28]."""
    return digits_pb2.ClassifyRequest(pixels=images.tobytes()).SerializeToString()


def stream_request(images: Pixels) -> bytes:
    """A serialised ClassifyStreamRequest of uint8[N, 28, 28]."""
    request = digits_pb2.ClassifyRequest(pixels=images.tobytes())
    return digits_pb2.ClassifyStreamRequest(request=request).SerializeToString()


def infer_request(images: Pixels) -> bytes:
    """A serialised ModelInferRequest of uint8[N, 28, 28] as raw contents, Triton's way."""
    request = inference_pb2.ModelInferRequest(model_name="digits")
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request.SerializeToString()


def classify_call(channel: grpc.Channel) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    """Classify with messages that are serialised already."""
    return channel.unary_unary(CLASSIFY_PATH, bytes, bytes)


def framed(message: bytes) -> bytes:
    """A message as gRPC puts it into DATA frames."""
    return b"\0" + len(message).to_bytes(4, "big") + message


@dataclass(frozen=True)
class Run:
    """What the load generator does.

    Attributes:
        images: Images per call, or per message of one.
        in_flight: Calls kept open.
        calls: Calls in all.
        connections: The calls are spread over so many, or over one each where they are fewer.
        rate: Calls begun each second, over all connections; 0 begins one when another ended.
        all_ok: Whether a call that is not answered with OK spoils the run.
        headers: Of each call, besides those of gRPC.
        tls: Whether to call over TLS, without a look at the certificate.
        path: Of the method that is called.
        encode: Makes its request of pixels uint8[N, 28, 28].
        messages: How often a call sends that request.
    """

    images: int
    in_flight: int
    calls: int
    connections: int = 8
    rate: float = 0.0
    all_ok: bool = True
    headers: tuple[str, ...] = ()
    tls: bool = False
    path: str = CLASSIFY_PATH
    encode: Callable[[Pixels], bytes] = classify_request
    messages: int = 1

    def body(self) -> bytes:
        """Of each call."""
        images = np.resize(served_artifact().golden.images, (self.images, 28, 28))
        return framed(self.encode(images)) * self.messages


@dataclass(frozen=True)
class Load:
    """The outcome of one run.

    Attributes:
        calls: Calls answered with OK; of a server without metrics, all.
        seconds: Duration of the run.
        server_cpu_us: CPU time of the server per call, in microseconds.
        latencies_s: Duration of each call, float64[calls], where asked for.
    """

    calls: int
    seconds: float
    server_cpu_us: float
    latencies_s: npt.NDArray[np.float64]

    @property
    def calls_per_s(self) -> float:
        """Rate."""
        return self.calls / self.seconds

    def quantile_s(self, share: float) -> float:
        """Latency that this share of the calls stays below."""
        return float(np.quantile(self.latencies_s, share))


def h2load(server: ServerProcess, run: Run, *, latencies: bool = False) -> Load:
    """Sends calls.

    h2load sees only HTTP 200, which a gRPC error carries too: the server's own count of OK
    decides whether the figure counts.

    Raises:
        BenchmarkError: If h2load is missing, or calls were not answered with OK.
    """
    connections = min(run.connections, run.in_flight)
    url = f"{'https' if run.tls else 'http'}://{server.address}{run.path}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        options = ["--rps", str(max(1, round(run.rate / connections)))] if run.rate else []
        options += ["--log-file", str(log)] if latencies else []
        before, cpu_before = _ok_calls(server, run), server.cpu_seconds()
        output = run_h2load(
            url, run.body(), run.calls, connections, run.in_flight // connections,
            headers=(*GRPC_HEADERS, *run.headers), options=options,
        )  # fmt: skip
        cpu = server.cpu_seconds() - cpu_before
        durations = np.loadtxt(log, usecols=2, ndmin=1) / 1e6 if latencies else np.empty(0)
    calls = _count(server, before, run) if server.http else run.calls
    return Load(calls, duration_s(output), cpu / max(1, calls) * 1e6, durations)


def run_h2load(
    url: str,
    body: bytes,
    calls: int,
    connections: int,
    in_flight: int,
    *,
    headers: Sequence[str] = (),
    options: Sequence[str] = (),
) -> str:
    """What h2load prints of so many calls, with so many in flight on each connection.

    Raises:
        BenchmarkError: If it is missing, or not every call got an answer with 2xx.
    """
    program = shutil.which("h2load")
    if program is None:
        raise BenchmarkError("h2load is not installed (Debian: apt-get install nghttp2-client)")
    command = [program, "-n", str(calls), "-c", str(connections), "-m", str(in_flight), "-t", "1"]
    for header in headers:
        command += ["-H", header]
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        command += ["-d", file.name, *options, url]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answered = re.search(r"status codes: (\d+) 2xx", output)
    if answered is None or int(answered[1]) != calls:
        raise BenchmarkError(f"expected {calls} answers with 2xx of {url}:\n{output}")
    return output


def duration_s(output: str) -> float:
    """What h2load says it took, without its own start."""
    found = re.search(r"finished in ([0-9.]+)(us|ms|s|m)", output)
    if found is None:
        raise BenchmarkError(f"h2load printed no duration:\n{output}")
    return float(found[1]) * UNITS_S[found[2]]


def _ok_calls(server: ServerProcess, run: Run) -> int:
    return server.ok_calls(run.path) if server.http else 0


def _count(server: ServerProcess, before: int, run: Run) -> int:
    answered = settled(lambda: _ok_calls(server, run) - before, run.calls)
    if answered != run.calls and run.all_ok:
        raise BenchmarkError(
            f"expected {run.calls} calls answered with OK, the server counts {answered}"
        )
    return answered
