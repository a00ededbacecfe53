"""Callers that nobody here wrote: grpc-go, grpc-js, grpc-java, and the tools people reach for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2

from digits.v1 import digits_pb2
from tests.conftest import RunningServer, wait_until
from tests.suite import made_once, one_at_a_time

pytestmark = pytest.mark.full

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "digits-serving-tests"
BUILD_S, RUN_S = 600, 120
LARGE = 4096


def need(program: Any) -> Any:
    """The path of a program, or a skip that says what to install."""
    found = shutil.which(program) or shutil.which(program, path=str(Path.home() / "go/bin"))
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def build(command: Any, folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=BUILD_S
    )
    if done.returncode:
        pytest.skip(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Builds a caller, once a run, in a folder that keeps what it downloaded from run to run."""

    def build_with(name: str, *commands: Any) -> Any:
        def make(_: Any) -> None:
            with one_at_a_time(CACHE / f"{name}.lock"):
                shutil.copytree(HERE / name, CACHE / name, dirs_exist_ok=True)
                for command in commands:
                    build(command, CACHE / name)

        made_once(tmp_path_factory, f"caller-{name}", make)
        return CACHE / name

    return build_with


@pytest.fixture(scope="session")
def go_caller(built: Callable[..., Any]) -> list[str]:
    go = need("go")
    folder = built("go", [go, "mod", "tidy"], [go, "build", "-o", "caller", "."])
    return [str(folder / "caller")]


@pytest.fixture(scope="session")
def node_caller(built: Callable[..., Any]) -> list[Any]:
    node, npm = need("node"), need("npm")
    folder = built("node", [npm, "install", "--no-audit", "--no-fund", "--silent"])
    return [node, str(folder / "main.js")]


@pytest.fixture(scope="session")
def java_caller(built: Callable[..., Any]) -> list[Any]:
    java, mvn = need("java"), need("mvn")
    folder = built("java", [mvn, "--batch-mode", "--quiet", "package"])
    return [java, "-cp", f"{folder}/target/classes:{folder}/target/lib/*", "Caller"]


@pytest.fixture(params=["go", "node", "java"])
def caller(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_caller")


@pytest.fixture
def ask(caller: Any, server: RunningServer, tmp_path: Path) -> Callable[..., Any]:
    """Runs a scenario; what the caller saw."""

    def run(scenario: Any, message: Any) -> Any:
        file = tmp_path / "message"
        file.write_bytes(message.SerializeToString())
        done = subprocess.run(
            [*caller, server.address, scenario, str(file)],
            capture_output=True, text=True, check=True, timeout=RUN_S,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    return run


def classify(images: np.ndarray) -> Any:
    return digits_pb2.ClassifyRequest(pixels=images.tobytes())


def digits_of(answer: Any) -> list[Any]:
    response = digits_pb2.ClassifyResponse.FromString(base64.b64decode(answer))
    return [prediction.digit for prediction in response.predictions]


def test_unary(ask: Callable[..., Any], sample: dict[str, np.ndarray]) -> None:
    said = ask("unary", classify(sample["images"][:20]))
    assert said["code"] == 0, said["message"]
    assert np.mean(digits_of(said["answers"][0]) == sample["labels"][:20]) > 0.9


def test_large_message(ask: Callable[..., Any], sample: dict[str, np.ndarray]) -> None:
    said = ask("unary", classify(np.resize(sample["images"], (LARGE, 28, 28))))
    assert said["code"] == 0, said["message"]
    assert len(digits_of(said["answers"][0])) == LARGE


def test_stream(ask: Callable[..., Any], sample: dict[str, np.ndarray]) -> None:
    message = digits_pb2.ClassifyStreamRequest(request=classify(sample["images"][:64]))
    said = ask("stream", message)
    assert (said["code"], len(said["answers"])) == (0, 100), said["message"]


def test_deadline(ask: Callable[..., Any], sample: dict[str, np.ndarray]) -> None:
    code = ask("deadline", classify(sample["images"][:1]))["code"]
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def test_cancel(ask: Callable[..., Any], sample: dict[str, np.ndarray]) -> None:
    code = ask("cancel", classify(sample["images"][:1]))["code"]
    assert code == grpc.StatusCode.CANCELLED.value[0]


def test_bad_request_with_details(ask: Callable[..., Any]) -> None:
    said = ask("unary", digits_pb2.ClassifyRequest(pixels=b"short"))
    assert said["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    rich = status_pb2.Status.FromString(base64.b64decode(said["details"]))
    detail = error_details_pb2.BadRequest()
    assert rich.details[0].Unpack(detail)
    assert detail.field_violations[0].field == "pixels"


def test_gzip(
    go_caller: list[str], server: RunningServer, sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = tmp_path / "message"
    file.write_bytes(classify(sample["images"][:64]).SerializeToString())
    command = [*go_caller, server.address, "gzip", str(file)]
    said = json.loads(subprocess.check_output(command, timeout=RUN_S))
    assert len(digits_of(said["answers"][0])) == 64


def test_no_call_fails_while_one_of_two_servers_stops(
    caller: Any,
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """GOAWAY tells what was not taken: clients try that elsewhere by themselves."""
    first, second = start_server("--drain-delay-s=1"), start_server()
    addresses = [server.address.split(":") for server in (first, second)]
    target = "ipv4:" + ",".join(":".join(address) for address in addresses)
    if (
        "main.js" not in caller[-1]
    ):  # grpc-go and grpc-java know no lists of addresses without a resolver
        target = first.address
        first, second = second, first
    file = tmp_path / "message"
    file.write_bytes(classify(sample["images"][:1]).SerializeToString())
    with subprocess.Popen(
        [*caller, target, "calls", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout.readline() == b"started\n"
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(RUN_S) == 0
        said = json.loads(running.communicate(timeout=RUN_S)[0].splitlines()[-1])
    assert said["code"] == 0, said["message"]


# Tools


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(command, capture_output=True, check=False, timeout=RUN_S, **options)


def go_tool(name: str, module: Any) -> Any:
    """A tool that Go's module proxy has, built once."""
    found = shutil.which(name) or shutil.which(name, path=str(Path.home() / "go/bin"))
    if found is None and shutil.which("go"):
        subprocess.run(["go", "install", module], check=False, timeout=BUILD_S, capture_output=True)
    return need(name)


def framed(images: np.ndarray) -> Any:
    message = classify(images).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")
PATH = "/digits.v1.DigitClassifierService/Classify"


def test_curl(server: RunningServer, sample: dict[str, np.ndarray], tmp_path: Path) -> None:
    curl, body = need("curl"), tmp_path / "body"
    if b"HTTP2" not in run(curl, "--version").stdout:
        pytest.skip("curl was built without HTTP/2")
    body.write_bytes(framed(sample["images"][:1]))
    said = run(
        curl, "-s", "--http2-prior-knowledge", *GRPC, "--data-binary", f"@{body}",
        f"http://{server.address}{PATH}",
    )  # fmt: skip
    response = digits_pb2.ClassifyResponse.FromString(said.stdout[5:])
    assert response.predictions[0].digit == sample["labels"][0]


def test_curl_without_grpc_is_told_what_the_port_is_for(
    start_server: Callable[..., RunningServer],
) -> None:
    curl = need("curl")
    server = start_server()
    said = run(curl, "-s", "-i", "--http2-prior-knowledge", f"http://{server.address}/").stdout
    assert b"405" in said
    assert b"this port is for gRPC" in said


def test_nghttp(server: RunningServer, sample: dict[str, np.ndarray], tmp_path: Path) -> None:
    nghttp, body = need("nghttp"), tmp_path / "body"
    body.write_bytes(framed(sample["images"][:1]))
    said = run(nghttp, "-v", *GRPC, "-d", str(body), f"http://{server.address}{PATH}")
    assert b"grpc-status: 0" in said.stdout


def test_grpcurl_by_reflection(server: RunningServer) -> None:
    grpcurl = go_tool("grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl@latest")
    listed = run(grpcurl, "-plaintext", server.address, "list").stdout.decode()
    assert "digits.v1.DigitClassifierService" in listed
    said = run(
        grpcurl, "-plaintext", "-d", "{}", server.address,
        "digits.v1.DigitClassifierService/GetModel",
    )  # fmt: skip
    assert b'"sha256"' in said.stdout, said.stderr


def test_ghz(server: RunningServer, sample: dict[str, np.ndarray], tmp_path: Path) -> None:
    ghz = go_tool("ghz", "github.com/bojand/ghz/cmd/ghz@latest")
    pixels = base64.b64encode(sample["images"][:1].tobytes()).decode()
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"pixels": pixels}))
    # Its own parser, and so its reflection, takes no optional fields of proto3.
    file = descriptor_pb2.FileDescriptorProto()
    digits_pb2.DESCRIPTOR.CopyToProto(file)
    schema = tmp_path / "schema"
    schema.write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())
    said = run(
        ghz, "--insecure", "--protoset", str(schema),
        "--call", "digits.v1.DigitClassifierService.Classify", "-n", "2000",
        "-c", "20", "--connections", "4", "-D", str(data), "-O", "json", server.address,
    )  # fmt: skip
    assert json.loads(said.stdout)["statusCodeDistribution"] == {"OK": 2000}, said.stderr


def test_kubernetes_probe(start_server: Callable[..., RunningServer]) -> None:
    module = "github.com/grpc-ecosystem/grpc-health-probe@latest"
    probe = go_tool("grpc-health-probe", module)
    server = start_server("--drain-delay-s=5")
    assert run(probe, f"-addr={server.address}").returncode == 0
    server.process.send_signal(signal.SIGTERM)
    service = "-service=digits.v1.DigitClassifierService"
    wait_until(lambda: run(probe, f"-addr={server.address}", service).returncode == 4)


NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  client_max_body_size 8m;
  server {{ listen unix:{folder}/nginx.sock http2; location / {{ grpc_pass grpc://{address}; }} }}
}}
"""


def test_nginx_in_front(
    server: RunningServer, sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    nginx = shutil.which("nginx") or need("/usr/sbin/nginx")
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, address=server.address))
    process = subprocess.Popen([nginx, "-c", str(config), "-e", str(tmp_path / "error.log")])
    try:
        wait_until((tmp_path / "nginx.sock").exists)
        options = [("grpc.default_authority", "localhost")]
        with grpc.insecure_channel(f"unix:{tmp_path}/nginx.sock", options) as channel:
            call = channel.unary_unary(PATH)
            for count in (1, 64, LARGE):
                images = np.resize(sample["images"], (count, 28, 28))
                answer = call(classify(images).SerializeToString(), timeout=RUN_S)
                assert len(digits_pb2.ClassifyResponse.FromString(answer).predictions) == count
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff", timeout=RUN_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        process.terminate()
        process.wait(RUN_S)
