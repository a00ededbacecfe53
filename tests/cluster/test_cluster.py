"""deploy/ applied to a real control plane: admitted, rolled out and back, drained and scaled."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.cluster.control_plane import APPLY, PROGRAMS, ControlPlane, Object
from tests.conftest import wait_until
from tests.deploy.conftest import COMPONENTS, DEPLOY, combinations, combined, rendered

# Where overlays/cpu is.
HERE = ("-n", "digits")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    programs = Path(os.environ.get("CLUSTER_PROGRAMS", "/nowhere"))
    if not all((programs / name).exists() for name in PROGRAMS):
        pytest.skip("CLUSTER_PROGRAMS names no folder with Kubernetes' programs: make cluster-test")
    with ControlPlane(tmp_path_factory.mktemp("cluster"), programs) as plane:
        yield plane


@pytest.fixture(scope="module")
def cluster(bare_cluster: ControlPlane) -> ControlPlane:
    """With overlays/cpu, two pods of which are ready."""
    bare_cluster.kubectl(*APPLY, "-k", str(DEPLOY / "overlays/cpu"))
    wait_until(lambda: deployment(bare_cluster)["status"].get("readyReplicas") == 2, timeout_s=120)
    bare_cluster.roll_out("digits")
    return bare_cluster


@pytest.fixture(scope="module")
def extended_cluster(bare_cluster: ControlPlane) -> ControlPlane:
    """Knows the custom resources of every component, by the definitions of those who make them."""
    definitions = ("-f", str(bare_cluster.programs / "definitions.yaml"))
    bare_cluster.kubectl("apply", "--server-side", *definitions)
    bare_cluster.kubectl("wait", "--for=condition=Established", "--timeout=120s", *definitions)
    return bare_cluster


def deployment(cluster: ControlPlane) -> Object:
    return cluster.get("deployment/digits-serving", *HERE)[0]


def pods(cluster: ControlPlane) -> list[Object]:
    """Those that nobody has deleted."""
    found = cluster.get("pods", *HERE, "-l=app.kubernetes.io/name=digits-serving")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def lacking(wanted: Any, has: Any, path: str = "") -> list[str]:
    """Fields of ``wanted`` that ``has`` lacks or has otherwise."""
    if isinstance(wanted, dict) and isinstance(has, dict):
        found = (lacking(value, has.get(key), f"{path}.{key}") for key, value in wanted.items())
    elif isinstance(wanted, list) and isinstance(has, list) and len(wanted) == len(has):
        pairs = enumerate(zip(wanted, has, strict=True))
        found = (lacking(ours, theirs, f"{path}[{number}]") for number, (ours, theirs) in pairs)
    else:
        return [] if wanted == has else [f"{path}: expected {wanted!r}, got {has!r}"]
    return list(itertools.chain(*found))


def test_every_combination_is_taken_as_it_is_written_and_its_pods_come_up(
    extended_cluster: ControlPlane, tmp_path: Path
) -> None:
    """Each in a namespace of its own, under Pod Security "restricted"."""
    namespaces = []
    for names in combinations():
        namespace = "-".join(("with", *names))
        written = combined(tmp_path / namespace, names, namespace=namespace)
        (enforced,) = written.all("Namespace")
        assert enforced["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        extended_cluster.kubectl(*APPLY, "-k", str(tmp_path / namespace))
        live = {
            (each["kind"], each["metadata"]["name"]): each
            for each in extended_cluster.get("-k", str(tmp_path / namespace))
        }
        for wanted in written.objects:
            has = live[wanted["kind"], wanted["metadata"]["name"]]
            if "hpa" in names and wanted["kind"] == "Deployment":
                has["spec"]["replicas"] = None  # the autoscaler's
            assert not lacking(wanted, has), (namespace, wanted["kind"])
        namespaces.append(namespace)
    assert len(namespaces) == 2 ** len(COMPONENTS)
    for namespace in namespaces:
        extended_cluster.roll_out(namespace)
    extended_cluster.kubectl("delete", "namespace", "--wait=false", *namespaces)


def test_what_is_unknown_or_has_rights_is_refused(cluster: ControlPlane) -> None:
    """Or the test above could not fail."""
    wrong = json.loads(json.dumps(rendered("overlays/cpu").one("Deployment")))
    (container,) = wrong["spec"]["template"]["spec"]["containers"]
    container["readynessProbe"] = container.pop("readinessProbe")
    refused = cluster.apply(wrong, check=False)
    assert refused.returncode != 0
    assert "readynessProbe" in refused.stderr
    refused = cluster.kubectl("run", *HERE, "bad", "--image=x", check=False)
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted' in refused.stderr


def test_pods_are_on_different_nodes_and_have_no_token(cluster: ControlPlane) -> None:
    found = pods(cluster)
    assert len({pod["spec"]["nodeName"] for pod in found}) == len(found) == 2
    for pod in found:
        assert {volume["name"] for volume in pod["spec"]["volumes"]} == {"tmp"}


def test_account_of_the_pods_may_do_nothing(cluster: ControlPlane) -> None:
    """It may ask who it is and what it may do, and read the API's addresses, as anybody may."""
    review = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "digits"},
    }  # fmt: skip
    answer = cluster.kubectl(
        "create", "--raw=/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", "-f", "-",
        "--as=system:serviceaccount:digits:digits-serving", stdin=json.dumps(review),
    )  # fmt: skip
    status = json.loads(answer.stdout)["status"]
    assert not status.get("incomplete")
    allowed = {resource for rule in status["resourceRules"] for resource in rule["resources"]}
    assert allowed == {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"}
    verbs = {verb for rule in status["nonResourceRules"] for verb in rule["verbs"]}
    assert verbs == {"get"}


def test_rollout_completes_and_so_does_a_rollback(cluster: ControlPlane, tmp_path: Path) -> None:
    def settings() -> set[str]:
        containers = [pod["spec"]["containers"][0] for pod in pods(cluster)]
        return {container["envFrom"][0]["configMapRef"]["name"] for container in containers}

    before = settings()
    change = {"name": "digits-serving", "behavior": "merge", "literals": ["DIGITS_GRACE_S=19"]}
    combined(
        tmp_path, [], base="overlays/cpu", namespace="digits",
        configMapGenerator=[change | {"namespace": "digits"}],
    )  # fmt: skip
    cluster.kubectl(*APPLY, "-k", str(tmp_path))
    cluster.roll_out("digits")
    wait_until(lambda: len(settings()) == 1, timeout_s=60)
    assert settings() != before
    cluster.kubectl("rollout", "undo", *HERE, "deployment/digits-serving")
    cluster.roll_out("digits")
    wait_until(lambda: settings() == before, timeout_s=60)


def test_budget_lets_one_pod_go_at_a_time(cluster: ControlPlane) -> None:
    """No node takes a pod for a while, so the first one can not be replaced."""

    def allowed() -> int:
        return int(cluster.get("pdb/digits-serving", *HERE)[0]["status"]["disruptionsAllowed"])

    def evict(name: str) -> CompletedProcess[str]:
        eviction = {
            "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": {"name": name, "namespace": "digits"},
        }  # fmt: skip
        path = f"--raw=/api/v1/namespaces/digits/pods/{name}/eviction"
        return cluster.kubectl("create", path, "-f", "-", stdin=json.dumps(eviction), check=False)

    wait_until(lambda: allowed() == 1, timeout_s=60)
    first, second = (pod["metadata"]["name"] for pod in pods(cluster))
    nodes = [node["metadata"]["name"] for node in cluster.get("nodes")]
    cluster.kubectl("cordon", *nodes)
    assert evict(first).returncode == 0
    held = evict(second)
    assert held.returncode != 0
    assert "disruption budget" in held.stderr
    cluster.kubectl("uncordon", *nodes)
    wait_until(lambda: evict(second).returncode == 0, timeout_s=120)
    cluster.roll_out("digits")


def autoscaler(cluster: ControlPlane) -> tuple[int, dict[str, str]]:
    """The pods that it wants, and the reasons of its conditions."""
    status = cluster.get("hpa/digits-serving", *HERE)[0]["status"]
    return status["desiredReplicas"], {c["type"]: c["reason"] for c in status["conditions"]}


def test_autoscaler_owns_the_number_of_pods(cluster: ControlPlane) -> None:
    """It made two of the one that a Deployment has by default; to apply again sets nothing back."""
    wanted, reasons = autoscaler(cluster)
    assert wanted == 2
    assert reasons["ScalingActive"] == "FailedGetResourceMetric"  # nobody measures yet
    cluster.kubectl("scale", *HERE, "deployment/digits-serving", "--replicas=5")
    cluster.kubectl(*APPLY, "-k", str(DEPLOY / "overlays/cpu"))
    assert deployment(cluster)["spec"]["replicas"] == 5
    cluster.roll_out("digits")
    cluster.kubectl("scale", *HERE, "deployment/digits-serving", "--replicas=2")
    cluster.roll_out("digits")


@pytest.fixture
def measured_cluster(cluster: ControlPlane) -> Iterator[ControlPlane]:
    """Has the API of metrics-server, with the values that a test writes."""
    metrics = {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "pods.metrics.k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in for tests"},
        },
        "spec": {
            "group": "metrics.k8s.io", "scope": "Namespaced",
            "names": {"kind": "PodMetrics", "plural": "pods", "singular": "pod"},
            "versions": [{
                "name": "v1beta1", "served": True, "storage": True,
                "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": True,
                }},
            }],
        },
    }  # fmt: skip
    cluster.apply(metrics)
    name = "crd/pods.metrics.k8s.io"
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=120s", name)
    yield cluster
    cluster.kubectl("delete", name)


def test_autoscaler_adds_pods_at_once_and_takes_them_away_late(
    measured_cluster: ControlPlane,
) -> None:
    """Controller, target and policies are real; what the pods use of their CPU is told to it."""

    def ready_under(load: int) -> int:
        """Divides a load, in thousandths of a CPU, among the pods; how many are ready."""
        found = pods(measured_cluster)
        usage = {"cpu": f"{min(1000, load // len(found))}m", "memory": "100Mi"}
        used = [
            {
                "apiVersion": "metrics.k8s.io/v1beta1", "kind": "PodMetrics",
                "metadata": {k: pod["metadata"][k] for k in ("name", "namespace", "labels")},
                "timestamp": datetime.now(UTC).isoformat(), "window": "1s",
                "containers": [{"name": "digits-serving", "usage": usage}],
            }
            for pod in found
        ]  # fmt: skip
        measured_cluster.apply(*used)
        return int(deployment(measured_cluster)["status"].get("readyReplicas", 0))

    def held() -> bool:
        ready_under(1000)
        return autoscaler(measured_cluster)[1]["AbleToScale"] == "ScaleDownStabilized"

    # Four at the target of 60 %; the two of now are full.
    wait_until(lambda: ready_under(2400) == 4, timeout_s=120)
    wait_until(held, timeout_s=120)
    assert deployment(measured_cluster)["spec"]["replicas"] == 4
    patience = {"spec": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}}}
    measured_cluster.kubectl(
        "patch", *HERE, "hpa/digits-serving", "--type=merge", f"--patch={json.dumps(patience)}"
    )
    wait_until(lambda: ready_under(1000) == 2, timeout_s=300)
