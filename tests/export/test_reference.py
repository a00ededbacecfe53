"""What drift is measured against: counted by the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.sessions import run_session, serving_session
from service.artifact.format import load_artifact
from service.artifact.reference import observe
from training.data import Split


def test_export_counts_what_drift_is_measured_against(
    repository: Path, made: Any, split: Split
) -> None:
    found = load_artifact(repository / "1")
    for variant in made.variants:
        answered = run_session(serving_session(variant.model), split.images.numpy())
        seen = observe(split.images.numpy(), answered.probabilities, answered.is_digit)
        expected = seen.counts()
        section = found.manifest["variants"][variant.precision]["reference"]
        assert section["images"] == "train"  # none were held out
        counted = found.variants[variant.precision].reference.counts
        assert counted["digit"].sum() == len(split)
        for name, counts in expected.items():
            assert np.array_equal(counted[name], counts)
