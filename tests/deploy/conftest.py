"""Rendered manifests: what kustomize makes of deploy/, and what the server makes of that."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
import yaml

from service.config import load_config
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml"))
# Of each group at most one: they claim the same field, and their comments say so.
ALTERNATIVES = (
    (None, "hpa-cpu", "hpa", "keda"),
    (None, "model-pvc", "model-image"),
    (None, "tls"),
    (None, "networkpolicy"),
    (None, "gateway"),
    (None, "monitoring"),
)


def combinations():
    """Every set of components that can be used together."""
    for chosen in itertools.product(*ALTERNATIVES):
        yield tuple(sorted({name for name in chosen if name}))


def tool(name):
    """A program that pip installs beside Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed beside {sys.executable}: make test installs it")
    return path


class Manifests:
    """The objects that one kustomization renders."""

    def __init__(self, text):
        self.text = text
        self.objects = list(yaml.safe_load_all(text))

    def all(self, kind):
        return [document for document in self.objects if document["kind"] == kind]

    def one(self, kind):
        (only,) = self.all(kind)
        return only

    @property
    def template(self):
        return self.one("Deployment")["spec"]["template"]

    @property
    def pod(self):
        return self.template["spec"]

    @property
    def container(self):
        (only,) = self.pod["containers"]
        return only

    @property
    def ports(self):
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def config_map(self):
        """The one that the pod takes its environment from."""
        (source,) = self.container["envFrom"]
        name = source["configMapRef"]["name"]
        (found,) = [each for each in self.all("ConfigMap") if each["metadata"]["name"] == name]
        return found

    @property
    def settings(self):
        return self.config_map["data"]

    @property
    def config(self):
        """What the server in the pod runs with."""
        return load_config([], image_variables() | self.settings)


def kustomize(folder, kubectl=None):
    """Renders a folder; an error is a failure."""
    command = [kubectl or tool("kubectl"), "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # such as a warning of a deprecated field
    return Manifests(done.stdout)


@functools.cache
def rendered(name):
    """A folder of deploy/, rendered once: treat it as read-only."""
    return kustomize(DEPLOY / name)


def combined(folder, components, base="base", **more):
    """Base, or an overlay, with components, as a user's own overlay has them."""
    folder.mkdir(parents=True, exist_ok=True)
    relative = Path(os.path.relpath(DEPLOY, folder))
    kustomization = {
        "resources": [str(relative / base)],
        "components": [str(relative / "components" / name) for name in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


@pytest.fixture(params=["base", *(f"overlays/{name}" for name in OVERLAYS)])
def manifests(request):
    """The base and every overlay in turn."""
    return rendered(request.param)


@functools.cache
def dockerfile():
    """Every instruction as (name, arguments), without comments and line breaks."""
    text = (DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(arguments.split()))
        for name, _, arguments in (line.partition(" ") for line in text.splitlines() if line)
    ]


@functools.cache
def image():
    """The instructions of the last stage: name -> arguments of each."""
    last_from = max(i for i, (name, _) in enumerate(dockerfile()) if name == "FROM")
    stage = {}
    for name, arguments in dockerfile()[last_from:]:
        stage.setdefault(name, []).append(arguments)
    return stage


def image_variables():
    """The environment that the image sets."""
    defaults = dict(a.split("=", 1) for name, a in dockerfile() if name == "ARG" and "=" in a)
    pairs = (pair.split("=", 1) for arguments in image()["ENV"] for pair in arguments.split())
    return {name: Template(value).safe_substitute(defaults) for name, value in pairs}
