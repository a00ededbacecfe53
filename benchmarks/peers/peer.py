"""How each peer is installed, started and called."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt

from benchmarks.harness import BenchmarkError, served_artifact
from benchmarks.load import GRPC_HEADERS, INFER_PATH, duration_s, framed, infer_request, run_h2load
from benchmarks.peers.environment import Environment, same_engine
from digits.oip import inference_pb2, inference_pb2_grpc

SERVERS = Path(__file__).parent / "servers"
START_TIMEOUT_S = 90


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        name: What it calls itself.
        requirement: What its environment holds beside the engine.
        command: Makes what its environment runs, of a port, the largest batch and an empty folder.
        body: Makes a request of images.
        answer: Reads the probabilities, float32[N, 10], out of an answer's body.
        path: Of the method.
        headers: Of a request.
        grpc: Whether it is called over HTTP/2 with gRPC's framing, else over HTTP/1.1.
        batches: Largest dynamic batches to try, in requests; 1 is without. The best one counts.
        share: Of the calls of a round that it gets: slower ones need fewer for as long a run.
    """

    name: str
    requirement: str
    command: Callable[[int, int, Path], list[str]]
    body: Callable[[npt.NDArray[np.uint8]], bytes]
    answer: Callable[[bytes], npt.NDArray[np.float32]]
    path: str
    headers: tuple[str, ...] = ()
    grpc: bool = False
    batches: tuple[int, ...] = (64, 1)
    share: float = field(default=1.0)

    @property
    def environment(self) -> Environment:
        """Where it is installed."""
        return Environment(self.name, (self.requirement, *same_engine()))


def _mlserver(port: int, batch: int, folder: Path) -> list[str]:
    ports = {"http_port": _free_port(), "grpc_port": port, "metrics_port": _free_port()}
    settings = {"debug": False, "host": "127.0.0.1", "parallel_workers": 0, **ports}
    model: dict[str, object] = {"name": "digits", "implementation": "mlserver_model.Digits"}
    if batch > 1:
        model |= {"max_batch_size": batch, "max_batch_time": 0.001}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return ["mlserver", "start", str(folder)]


def _infer_answer(answer: bytes) -> npt.NDArray[np.float32]:
    response = inference_pb2.ModelInferResponse.FromString(answer)
    if response.raw_output_contents:
        return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(-1, 10)
    return np.array(response.outputs[0].contents.fp32_contents, np.float32).reshape(-1, 10)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "mosec",
            "mosec==0.9.8",
            lambda port, _batch, _folder: [
                "python", str(SERVERS / "mosec_server.py"), "--address", "127.0.0.1",
                "--port", str(port), "--log-level", "warning",
            ],
            lambda images: images.tobytes(),
            lambda answer: np.frombuffer(answer, np.float32).reshape(-1, 10),
            "/inference",
            batches=(64, 16, 1),
        ),
        Peer(
            "litserve",
            "litserve==0.2.19",
            lambda port, _batch, _folder: [
                "python", str(SERVERS / "litserve_server.py"), str(port),
            ],
            lambda images: json.dumps(
                {"pixels": base64.b64encode(images.tobytes()).decode()}
            ).encode(),
            lambda answer: np.array(json.loads(answer)["probabilities"], np.float32),
            "/predict",
            ("content-type: application/json",),
            share=0.2,
        ),
        Peer(
            "mlserver",
            "mlserver==1.7.1",
            _mlserver,
            infer_request,
            _infer_answer,
            INFER_PATH,
            GRPC_HEADERS,
            grpc=True,
            share=0.1,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class RunningPeer:
    """A peer that answers.

    Attributes:
        peer: Which.
        port: Where, on loopback.
    """

    peer: Peer
    port: int

    @property
    def url(self) -> str:
        """Of its method."""
        return f"http://127.0.0.1:{self.port}{self.peer.path}"

    def check_answers(self) -> None:
        """The golden digits must get the answers that ours get: it is the same model at work.

        Raises:
            ArtifactError: If one does not.
        """
        artifact = served_artifact()
        probabilities = self.call(artifact.golden.images)
        artifact.golden.check(probabilities, artifact.precision)

    def call(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities of images."""
        body = self.peer.body(images)
        if self.peer.grpc:
            with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
                request = inference_pb2.ModelInferRequest.FromString(body)
                response = stub.ModelInfer(request, timeout=30)
                return self.peer.answer(response.SerializeToString())
        headers = dict(header.split(": ") for header in self.peer.headers)
        with urllib.request.urlopen(
            urllib.request.Request(self.url, body, headers), timeout=30
        ) as response:
            return self.peer.answer(response.read())

    def calls_per_s(self, images: int, in_flight: int, calls: int) -> float:
        """Rate of calls with so many images each.

        Raises:
            BenchmarkError: If a call was not answered with 2xx.
        """
        body = self.peer.body(np.resize(served_artifact().golden.images, (images, 28, 28)))
        # HTTP/1.1 has one call at a time on a connection.
        connections = min(8, in_flight) if self.peer.grpc else in_flight
        output = run_h2load(
            self.url,
            framed(body) if self.peer.grpc else body,
            calls,
            connections,
            in_flight // connections,
            headers=self.peer.headers,
            options=() if self.peer.grpc else ("--h1",),
        )
        return calls / duration_s(output)


@contextlib.contextmanager
def running_peer(peer: Peer, batch: int) -> Iterator[RunningPeer]:
    """Starts a peer, waits until it answers, and ends it with all of its processes."""
    port, programs = _free_port(), peer.environment.programs
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        model = Path(folder, "model.onnx")
        model.write_bytes(served_artifact().model)
        search = os.pathsep.join((str(programs), os.environ["PATH"]))
        environment = {
            **os.environ,
            "PATH": search,
            "PYTHONPATH": str(SERVERS),
            "TMPDIR": folder,  # some leave files there when they are killed
            "PEER_MODEL": str(model),
            "PEER_BATCH": str(batch),
        }
        program, *arguments = peer.command(port, batch, Path(folder))
        process = subprocess.Popen(
            [shutil.which(program, path=search) or program, *arguments],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            server = RunningPeer(peer, port)
            _wait(server, process, log.fileno())
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _wait(server: RunningPeer, process: subprocess.Popen[bytes], log: int) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.call(np.zeros((1, 28, 28), np.uint8))
        except (OSError, grpc.RpcError) as error:
            if process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.2)
                continue
            text = os.pread(log, 2**20, 0).decode()
            raise BenchmarkError(f"{server.peer.name} does not answer: {error}\n{text}") from error
        return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
