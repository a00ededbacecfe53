"""The facts on the status page. None of them is a secret: GetModel and /metrics tell the same."""

from __future__ import annotations

import importlib.metadata
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.classify import Classify

STARTED = time.monotonic()


def describe(classify: Classify, transport: str) -> dict[str, str]:
    """What runs here and which model serves, by name, in the order of the page."""
    facts = {
        "version": importlib.metadata.version("digits-serving"),
        "uptime": str(timedelta(seconds=int(time.monotonic() - STARTED))),
        "transport": transport,
    }
    if classify.model is None:
        return {**facts, "model": "loading"}
    ref = classify.model.ref
    return {
        **facts,
        "model": f"{ref.name}, version {ref.version}",
        "precision": ref.precision,
        "runs on": ref.execution_provider,
        "sha256": ref.sha256,
    }
