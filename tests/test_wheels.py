"""Both distributions as wheels: what they hold, and that they serve from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SAMPLES, run_outside, serving_entry

SEVEN = SAMPLES / "7.png"


def test_distributions_have_one_version() -> None:
    server, client = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        for folder in (".", "proto")
    )
    assert server["version"] == client["version"]
    assert server["dependencies"] == [f"digits-client=={client['version']}"]


def top_level(wheel: Any) -> set[Any]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition("/")[0] for name in archive.namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


@pytest.mark.full
def test_each_wheel_holds_its_packages_and_nothing_else(wheels: Path) -> None:
    [client], [server] = wheels.glob("digits_client-*.whl"), wheels.glob("digits_serving-*.whl")
    assert top_level(client) == {"digits"}
    assert top_level(server) == {"service", "training", "export"}
    with zipfile.ZipFile(server) as archive:
        held = set(archive.namelist())
        metadata = archive.read(next(n for n in held if n.endswith("/METADATA"))).decode()
    model = {str(p.relative_to(ROOT)) for p in (ROOT / "models/digits").rglob("*") if p.is_file()}
    assert {f"service/{name}" for name in model} <= held
    assert any(name.endswith("/licenses/NOTICE") for name in held)
    assert "License-Expression: Apache-2.0 AND CC-BY-SA-3.0\n" in metadata


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with this one's packages, but for the project's own."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if "digits" not in each.name:
            (packages / each.name).symlink_to(each)
    venv.create(tmp_path / "venv", with_pip=False)
    [own] = (tmp_path / "venv/lib").glob("python3*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    return tmp_path / "venv/bin"


def install(environment: Any, wheels: Any, requirement: Any) -> None:
    pip = [sys.executable, "-m", "pip", "--python", environment / "python", "install"]
    done = run_outside([*pip, "--no-index", "--find-links", wheels, requirement])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_wheels_serve_and_call_from_any_folder(
    wheels: Path, environment: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    digits = environment / "digits"
    install(environment, wheels, "digits-client")
    for command in ("serve", "top"):
        lacking = run_outside([digits, command], cwd=empty)
        assert lacking.returncode == 1
        assert lacking.stderr.startswith(f"digits {command}: it comes with digits-serving, which ")
        assert lacking.stderr.count("\n") == 1

    install(environment, wheels, "digits-serving[cpu,top]")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DIGITS_"))}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [digits, "serve", "--grpc-port=0", "--http-port=0", "--log-format=json"],
            stdout=file, stderr=file, cwd=empty, env=outside,
        )  # fmt: skip
    try:
        entry = serving_entry(log, process)
        address = ["--address", entry["grpc"]]
        answer = run_outside([digits, "classify", *address, SEVEN], cwd=empty)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.splitlines()[1].split()[1] == "7"
        view = [digits, "top", "--once", "--interval-s=0.1", "--metrics", entry["http"], *address]
        assert "SERVING" in run_outside(view, cwd=empty).stdout
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
