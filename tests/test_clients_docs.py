"""The examples of README.md and docs/clients.md, run as they stand, but for the address."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, RunningServer

DEFAULT = "127.0.0.1:50051"
INSTALL_TIMEOUT_S = 120
GO_TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
DEBIAN_GO = Path("/usr/share/gocode/src/google.golang.org/grpc")
# It compiles grpc-go as well: 45 s of a processor.
GO_BUILD_S = 500
# What is newer in the example than Debian's grpc-go.
GRPC_GO_1_33 = {
    "grpc.NewClient(": "grpc.Dial(",
    "grpc.WithTransportCredentials(insecure.NewCredentials())": "grpc.WithInsecure()",
    '\t"google.golang.org/grpc/credentials/insecure"\n': "",
}


def blocks(language: Any, document: str = "docs/clients.md") -> Any:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_block(program: Any) -> Any:
    [block] = [block for block in blocks("sh") if block.startswith(f"{program} ")]
    return block


def output_of(command: Any, *, timeout_s: Any = 120, **options: Any) -> Any:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_example_of_the_readme_runs_from_any_folder(server: RunningServer, tmp_path: Path) -> None:
    [code] = blocks("python", "README.md")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace(DEFAULT, server.address)],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith("[1, 7] ")


def test_python_examples(server: RunningServer) -> None:
    classified, asked = (
        output_of([sys.executable, "-W", "error::DeprecationWarning", "-c", code]).splitlines()
        for code in (block.replace(DEFAULT, server.address) for block in blocks("python"))
    )
    assert classified[1] == "[7]"
    assert [line.split()[0] for line in classified[2:4]] == ["1", "2"]
    assert classified[-2].split()[0].isdecimal()
    assert asked[0] == str(list(range(10)))
    assert asked[1].startswith("INVALID_ARGUMENT {'encoded.files[0]'")


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the example needs, or a skip."""
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    [install] = [block for block in blocks("sh") if block.startswith("npm install ")]
    quiet = ["--no-audit", "--no-fund", "--fetch-retries=0"]
    try:
        done = subprocess.run(
            [*install.split(), *quiet],
            cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("npm reaches no registry")
    if done.returncode:
        pytest.skip(f"npm reaches no registry: {done.stderr.strip()[-200:]}")
    return folder / "node_modules"


@pytest.mark.full
def test_node_example(server: RunningServer, node_modules: Path) -> None:
    [code] = blocks("js")
    environment = {"NODE_PATH": str(node_modules), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    lines = output_of(["node", "-e", code.replace(DEFAULT, server.address)], env=environment)
    assert [line.split()[0] for line in lines.splitlines()] == ["7", "3"]


def test_buf_curl_example(server: RunningServer) -> None:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if shutil.which("buf", path=tools) is None:
        pytest.skip("buf is not installed")
    script = shell_block("buf").replace(DEFAULT, server.address)
    printed = output_of(["bash", "-e"], input=script, env={**os.environ, "PATH": tools})
    assert '"digit":7' in printed.replace(" ", "")
    assert '"manifestJson"' in printed


@pytest.mark.full
def test_grpcurl_example(server: RunningServer) -> None:
    if shutil.which("grpcurl") is None:
        pytest.skip("grpcurl is not installed")
    script = shell_block("grpcurl").replace(DEFAULT, server.address)
    answer = json.loads(output_of(["bash", "-e"], input=script))
    assert [prediction["digit"] for prediction in answer["predictions"]] == [7]


@pytest.fixture(scope="module")
def go_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GOPATH with the generated code of the example, or a skip."""
    missing = [tool for tool in GO_TOOLS if shutil.which(tool) is None]
    if missing or not DEBIAN_GO.is_dir():
        pytest.skip(f"Go, or its packages of Debian, are not installed: {missing}")
    workspace = tmp_path_factory.mktemp("go")
    package = workspace / "src/trial"
    package.mkdir(parents=True)
    [generate] = re.findall(r"^protoc .*\\\n.*", shell_block("go mod init"), re.MULTILINE)
    output_of(["bash", "-e"], input=generate.replace("_out=.", f"_out={package}"))
    return workspace


@pytest.mark.full
def test_go_example(server: RunningServer, go_workspace: Path) -> None:
    [code] = blocks("go")
    for new, old in GRPC_GO_1_33.items():
        assert new in code
        code = code.replace(new, old)
    (go_workspace / "src/trial/main.go").write_text(code.replace(DEFAULT, server.address))
    environment = {
        **os.environ, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "",
        "GOPATH": f"{go_workspace}:{DEBIAN_GO.parents[2]}", "GOCACHE": str(go_workspace / "cache"),
    }  # fmt: skip
    program = go_workspace / "trial"
    output_of(["go", "build", "-o", program, "trial"], env=environment, timeout_s=GO_BUILD_S)
    assert output_of([program]).split()[0] == "7"


def test_command_line_examples(server: RunningServer) -> None:
    ours = rf"{sys.executable} -m digits \1 --address {server.address}"
    script = re.sub(r"^digits (\w+)", ours, shell_block("digits"), flags=re.MULTILINE)
    printed = output_of(["bash", "-e"], input=script)
    assert "tests/samples/7.png      7" in printed
    assert printed.count("tests/samples/3.png      3") == 2
    assert '"digit": 4' in printed
    assert printed.endswith("SERVING\n")
