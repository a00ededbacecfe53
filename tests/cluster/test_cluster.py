"""deploy/ applied to a real control plane: admitted, rolled out and back, drained and scaled."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from tests.cluster.control_plane import APPLY, PROGRAMS, ControlPlane, definition
from tests.conftest import wait_until
from tests.deploy.conftest import COMPONENTS, DEPLOY, combinations, combined, rendered
from tests.deploy.validators import schema_of

CUSTOM = (
    ("gateway.networking.k8s.io", "v1", "GRPCRoute", "grpcroutes"),
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
    ("cert-manager.io", "v1", "Certificate", "certificates"),
    ("cert-manager.io", "v1", "Issuer", "issuers"),
)
# Where overlays/cpu is.
HERE = ("-n", "digits")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    programs = Path(os.environ.get("CLUSTER_PROGRAMS", "/nowhere"))
    if not all((programs / name).exists() for name in PROGRAMS):
        pytest.skip("CLUSTER_PROGRAMS names no folder with Kubernetes' programs: make cluster-test")
    with ControlPlane(tmp_path_factory.mktemp("cluster"), programs) as plane:
        yield plane


@pytest.fixture(scope="module")
def cluster(bare_cluster: Any) -> Any:
    """With overlays/cpu, two pods of which are ready."""
    bare_cluster.kubectl(*APPLY, "-k", str(DEPLOY / "overlays/cpu"))
    wait_until(lambda: deployment(bare_cluster)["status"].get("readyReplicas") == 2, timeout_s=120)
    bare_cluster.roll_out("digits")
    return bare_cluster


@pytest.fixture(scope="module")
def extended_cluster(bare_cluster: Any) -> Any:
    """Knows the custom resources of every component."""
    for group, version, kind, plural in CUSTOM:
        bare_cluster.apply(definition(schema_of(kind), group, version, kind, plural))
    names = [f"crd/{plural}.{group}" for group, _, _, plural in CUSTOM]
    bare_cluster.kubectl("wait", "--for=condition=Established", "--timeout=120s", *names)
    return bare_cluster


def deployment(cluster: Any) -> Any:
    return cluster.get("deployment/digits-serving", *HERE)[0]


def pods(cluster: Any) -> list[Any]:
    """Those that nobody has deleted."""
    found = cluster.get("pods", *HERE, "-l=app.kubernetes.io/name=digits-serving")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def lacking(wanted: Any, has: Any, path: str = "") -> list[Any] | list[str]:
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
    extended_cluster: Any, tmp_path: Path
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


def test_what_is_unknown_or_has_rights_is_refused(cluster: Any) -> None:
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


def test_pods_are_on_different_nodes_and_have_no_token(cluster: Any) -> None:
    found = pods(cluster)
    assert len({pod["spec"]["nodeName"] for pod in found}) == len(found) == 2
    for pod in found:
        assert {volume["name"] for volume in pod["spec"]["volumes"]} == {"tmp"}


def test_account_of_the_pods_may_do_nothing(cluster: Any) -> None:
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


def test_rollout_completes_and_so_does_a_rollback(cluster: Any, tmp_path: Path) -> None:
    def settings() -> set[Any]:
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


def test_budget_lets_one_pod_go_at_a_time(cluster: Any) -> None:
    """No node takes a pod for a while, so the first one can not be replaced."""

    def allowed() -> Any:
        return cluster.get("pdb/digits-serving", *HERE)[0]["status"]["disruptionsAllowed"]

    def evict(name: str) -> Any:
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


def test_autoscaler_owns_the_number_of_pods(cluster: Any) -> None:
    """It made two of the one that a Deployment has by default; to apply again sets nothing back."""
    (autoscaler,) = cluster.get("hpa/digits-serving", *HERE)
    reasons = {c["type"]: c["reason"] for c in autoscaler["status"]["conditions"]}
    assert autoscaler["status"]["desiredReplicas"] == 2
    assert reasons["ScalingActive"] == "FailedGetResourceMetric"  # no metrics-server here
    cluster.kubectl("scale", *HERE, "deployment/digits-serving", "--replicas=5")
    cluster.kubectl(*APPLY, "-k", str(DEPLOY / "overlays/cpu"))
    assert deployment(cluster)["spec"]["replicas"] == 5
    cluster.roll_out("digits")
