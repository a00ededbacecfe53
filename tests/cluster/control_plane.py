"""Kubernetes' control plane as processes on loopback, with nodes and pods that kwok plays.

The programs are those of ``make cluster-test``, in the folder that ``CLUSTER_PROGRAMS`` names.
Real: admission, validation, controllers and scheduling. Played: kubelets, so no container runs.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from pathlib import Path
from typing import Any, Self

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.conftest import free_ports, wait_until
from tests.deploy.conftest import tool

PROGRAMS = ("server", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
ZONES = ("a", "a", "b")


class ControlPlane:
    """Runs while the block lasts.

    Args:
        folder: Where data, keys and logs go.
        programs: The folder with ``PROGRAMS``.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self._stack = contextlib.ExitStack()
        self._processes: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        etcd, peers, self.port = free_ports(3)
        token, kubeconfig = secrets.token_hex(16), self.folder / "kubeconfig"
        (self.folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        (self.folder / "accounts.pem").write_bytes(key)
        self._run(
            "server", "--data-dir=etcd", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
        )  # fmt: skip
        self._run(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1", f"--secure-port={self.port}", "--cert-dir=certificates",
            "--endpoint-reconciler-type=none", "--token-auth-file=tokens.csv",
            "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=accounts.pem",
            "--service-account-signing-key-file=accounts.pem",
        )  # fmt: skip
        self._write_kubeconfig(kubeconfig, token)
        self._wait(lambda: self.kubectl("get", "--raw=/readyz", check=False).returncode == 0)
        client = f"--kubeconfig={kubeconfig}"
        alone = ("--leader-elect=false", "--secure-port=0", client)
        self._run(
            "kube-controller-manager", *alone, "--use-service-account-credentials",
            "--service-account-private-key-file=accounts.pem",
            "--root-ca-file=certificates/apiserver.crt",
            "--horizontal-pod-autoscaler-sync-period=1s",
        )  # fmt: skip
        self._run("kube-scheduler", *alone)
        self._run(
            "kwok", client, "--manage-all-nodes=true", f"--config={self.programs}/stages.yaml"
        )
        self.apply(*(_node(f"node-{number}", zone) for number, zone in enumerate(ZONES)))
        self._wait(self._nodes_are_ready)

    def _write_kubeconfig(self, path: Any, token: str) -> None:
        certificate = self.folder / "certificates/apiserver.crt"
        self._wait(certificate.exists)
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(certificate),
        }
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": {"token": token}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }
        path.write_text(yaml.safe_dump(content))

    def _run(self, program: Any, *flags: str) -> None:
        log = self._stack.enter_context((self.folder / f"{program}.log").open("wb"))
        process = subprocess.Popen(
            [self.programs / program, *flags], cwd=self.folder, stdout=log, stderr=log
        )
        self._processes[program] = process
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)

    def _wait(self, condition: Any) -> None:
        def met() -> Any:
            for program, process in self._processes.items():
                log = (self.folder / f"{program}.log").read_text(errors="replace")
                assert process.poll() is None, f"{program} ended: {log[-3000:]}"
            return condition()

        wait_until(met, timeout_s=120)

    def _nodes_are_ready(self) -> Any:
        conditions = [node["status"].get("conditions", []) for node in self.get("nodes")]
        return len(conditions) == len(ZONES) and all(
            any(c["type"] == "Ready" and c["status"] == "True" for c in each) for each in conditions
        )

    def kubectl(
        self, *arguments: Any, stdin: Any = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl; with ``check`` an exit code other than 0 fails the test."""
        command = [tool("kubectl"), f"--kubeconfig={self.folder}/kubeconfig", *arguments]
        command.append(f"--cache-dir={self.folder}/kubectl")
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}"
        return done

    def apply(self, *documents: Any, check: bool = True) -> Any:
        """Server-side, with unknown fields and warnings taken for errors."""
        text = yaml.safe_dump_all(documents)
        return self.kubectl(*APPLY, "-f", "-", stdin=text, check=check)

    def get(self, *what: Any) -> Any:
        """Objects, as the API server has them."""
        answer = json.loads(self.kubectl("get", *what, "--output=json").stdout)
        return answer["items"] if answer["kind"] == "List" else [answer]

    def roll_out(self, namespace: Any, name: str = "digits-serving") -> None:
        """Waits until every pod is a ready one of the newest template."""
        self.kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=180s")


APPLY = ("apply", "--server-side", "--validate=strict", "--warnings-as-errors")


def _node(name: str, zone: Any) -> dict[str, Any]:
    has = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "200"}
    labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"allocatable": has, "capacity": has},
    }


def definition(schema: Any, group: Any, version: Any, kind: Any, plural: Any) -> dict[str, Any]:
    """A CustomResourceDefinition of a JSON schema."""
    served = {
        "name": version, "served": True, "storage": True,
        "schema": {"openAPIV3Schema": _structural(schema, schema.get("$defs", {}))},
    }  # fmt: skip
    approved = {"api-approved.kubernetes.io": "unapproved, a copy for tests"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}", "annotations": approved},
        "spec": {
            "group": group, "scope": "Namespaced", "versions": [served],
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
        },
    }  # fmt: skip


def _structural(schema: Any, named: Any) -> Any:
    """The form that the API server takes: no references, no null, no constants."""
    if "$ref" in schema:
        return _structural(named[schema["$ref"].rpartition("/")[2]], named)
    choices = [c for c in schema.get("anyOf", []) if c.get("type") != "null"]
    if len(choices) == 1:
        return _structural(choices[0], named)
    if {c.get("type") for c in choices} == {"integer", "string"}:
        return {"x-kubernetes-int-or-string": True}
    if not schema:
        return {"x-kubernetes-preserve-unknown-fields": True}
    made = {k: v for k, v in schema.items() if k not in ("$defs", "const", "additionalProperties")}
    if "const" in schema:
        made["enum"] = [schema["const"]]
    if "properties" in made:
        made["properties"] = {k: _structural(v, named) for k, v in made["properties"].items()}
    if "items" in made:
        made["items"] = _structural(made["items"], named)
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _structural(schema["additionalProperties"], named)
    return made
