"""What says whether an object is valid: Kubernetes' own schemas, and those of custom resources."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

OLDEST = "1.33"
NEWEST = kubernetes_validate.utils.major_minor(kubernetes_validate.latest_version())
# Every Kubernetes version that the README says is supported.
KUBERNETES = [f"1.{minor}" for minor in range(33, int(NEWEST.split(".")[1]) + 1)]
CUSTOM = {
    "gateway.networking.k8s.io/v1": {"GRPCRoute"},
    "monitoring.coreos.com/v1": {"PodMonitor", "PrometheusRule"},
    "keda.sh/v1alpha1": {"ScaledObject"},
    "cert-manager.io/v1": {"Certificate", "Issuer"},
    "serving.kserve.io/v1alpha1": {"ServingRuntime"},
    "serving.kserve.io/v1beta1": {"InferenceService"},
}


# Schemas that others publish: $CRD_SCHEMAS names a folder of them, as KIND-VERSION.json.
COMMITTED = Path(__file__).with_name("schemas")


@functools.cache
def _schema_file(kind: Any) -> Any:
    elsewhere = os.environ.get("CRD_SCHEMAS")
    found = [*COMMITTED.glob(f"{kind}.json")]
    found += Path(elsewhere).glob(f"{kind}-*.json") if elsewhere else []
    return found[0] if found else None


def schema_of(kind: Any) -> Any:
    """A custom resource's schema, or a skip."""
    path = _schema_file(kind)
    if path is None:
        pytest.skip(f"the schema of {kind} is not here: CRD_SCHEMAS names no folder that holds it")
    return json.loads(path.read_text())


def validate(document: Any, version: Any) -> None:
    """Raises the validator's error if the object is not valid."""
    kind = document["kind"]
    if kind in CUSTOM.get(document["apiVersion"], ()):
        jsonschema.Draft202012Validator(schema_of(kind)).validate(document)
    else:
        used = kubernetes_validate.validate(document, version, strict=True)
        assert used == version, f"{kind}: checked against {used}, asked for {version}"


ERRORS = (jsonschema.ValidationError, kubernetes_validate.ValidationError)
