"""The image's recipe: what it takes in, as whom it runs, and what it says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.deploy.conftest import DEPLOY, checkov, dockerfile, tool


def test_dockerfile_passes_hadolint() -> None:
    command = [tool("hadolint"), "--no-color", str(DEPLOY / "Dockerfile")]
    linted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_dockerfile_passes_checkov() -> None:
    # CKV_DOCKER_7 takes the argument BASE_IMAGE for an image without a tag: its default has one.
    command = [checkov(), "-f", str(DEPLOY / "Dockerfile"), "--framework", "dockerfile"]
    command += ["--quiet", "--compact", "--skip-download", "--skip-check", "CKV_DOCKER_7"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_base_image_is_pinned_and_has_the_python_that_runs_the_tests() -> None:
    (argument,) = [a for name, a in dockerfile() if name == "ARG" and a.startswith("BASE_IMAGE=")]
    pinned = re.fullmatch(r"BASE_IMAGE=python:(3\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", argument)
    assert pinned
    if os.environ.get("CI"):
        assert pinned[1] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_image_takes_in_what_serves_and_no_training() -> None:
    """No COPY can bring in files that the build context leaves out."""
    allowed = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {"service", "proto", "models"} <= set(allowed)
    assert not {"training", "export"} & set(allowed)


def test_copied_files_are_in_the_build_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copies = [arguments.split() for name, arguments in dockerfile() if name == "COPY"]
    sources = [s for c in copies if not c[0].startswith("--from") for s in c[:-1]]
    by_device = "deploy/requirements-${DEVICE}.lock"
    assert by_device in sources
    sources.remove(by_device)
    sources += [by_device.replace("${DEVICE}", device) for device in ("cpu", "cuda")]
    sources[sources.index("${MODELS}")] = "models/digits"
    assert "*" in lines
    for source in sources:
        assert (ROOT / source).exists()
        assert any(source == each or source.startswith(f"{each}/") for each in allowed)
    for each in allowed:
        assert any(source == each or source.startswith(f"{each}/") for source in sources)


def test_build_script_takes_the_engine_that_works(tmp_path: Path) -> None:
    """docker without its daemon does not; of the others the first one builds."""
    called = tmp_path / "called"
    for name, body in {
        "docker": "exit 1",
        "podman": f'printf "%s\\n" "$@" > {called}',
        "buildah": "exit 1",
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    script = DEPLOY / "build-image.sh"
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SOURCE_DATE_EPOCH": "5"}
    environ.pop("ENGINE", None)
    subprocess.run([script, "cuda", "--no-cache"], env=environ, check=True, capture_output=True)
    arguments = called.read_text().splitlines()
    assert arguments[0] == "build"
    assert any(re.fullmatch(r"digits-serving:[\d.]+-cuda", each) for each in arguments)
    assert {"DEVICE=cuda", "SOURCE_DATE_EPOCH=5", "--no-cache"} <= set(arguments)
    assert arguments[arguments.index("--timestamp") + 1] == "5"


def test_build_script_without_an_engine_says_what_it_wants(tmp_path: Path) -> None:
    for name in ("bash", "sed", "dirname", "git"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/usr/bin/bash", DEPLOY / "build-image.sh"],
        env={"PATH": str(tmp_path)}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "expected docker (with its daemon running), podman or buildah" in done.stderr
