"""What drift is measured against: written by the export, or added to a version without."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from export import __main__ as command
from export.reference import make_reference
from export.sessions import run_session, serving_session
from service.artifact.format import MANIFEST, load_artifact
from service.artifact.reference import observe
from service.artifact.repository import in_serving_order
from tests.conftest import REPOSITORY
from training import data


def test_export_counts_what_drift_is_measured_against(repository, variants, split):
    for folder, variant in zip(sorted(repository.iterdir()), variants, strict=True):
        found = load_artifact(folder)
        answered = run_session(serving_session(variant.model), split.images.numpy())
        expected = observe(split.images.numpy(), answered.probabilities).counts()
        assert found.manifest["reference"]["images"] == "train"  # none were held out
        assert found.reference.counts["digit"].sum() == len(split)
        for name, counts in expected.items():
            assert np.array_equal(found.reference.counts[name], counts)


def without_reference(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["reference"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_reference_is_added_to_a_version_that_has_none(repository, split, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_split", lambda *_: split)
    folder = repository / "1"
    before = json.loads((folder / MANIFEST).read_text())
    without_reference(folder)
    assert load_artifact(folder).reference is None
    assert command.main(["reference", str(folder)]) == 0
    assert json.loads((folder / MANIFEST).read_text()) == before
    assert "500 train images" in capsys.readouterr().out
    assert command.main(["show", str(folder)]) == 0
    assert "500 train images" in capsys.readouterr().out


def test_reference_of_other_data_is_refused(repository, split, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_split", lambda *_: replace(split, labels=split.labels + 1))
    before = (repository / "1" / MANIFEST).read_text()
    assert command.main(["reference", str(repository / "1")]) == 1
    assert "train split" in capsys.readouterr().err
    assert (repository / "1" / MANIFEST).read_text() == before


def test_reference_of_a_signed_version_needs_the_key(repository, split, keys, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_split", lambda *_: split)
    folder, key = repository / "1", f"--signing-key={keys / 'private.pem'}"
    without_reference(folder)
    assert command.main(["sign", str(folder), key]) == 0
    before = (folder / MANIFEST).read_text()
    assert command.main(["reference", str(folder)]) == 1
    assert "is signed: expected the key" in capsys.readouterr().err
    assert (folder / MANIFEST).read_text() == before
    assert command.main(["reference", str(folder), key]) == 0
    assert load_artifact(folder, keys / "public.pem").reference


def test_reference_of_the_default_versions_is_of_their_validation_images(full_data):
    train = data.load_split("mnist", "train", full_data)
    for folder in in_serving_order(REPOSITORY)[:2]:
        found = load_artifact(folder)
        config = found.manifest["training"]["config"]
        counted = make_reference(found.model, train, config)
        assert counted["images"] == found.manifest["reference"]["images"] == "validation"
        for name, counts in found.reference.counts.items():
            # An image on a bound may fall to the other side on another CPU.
            moved = np.abs(np.cumsum(counts) - np.cumsum(counted[name]["counts"])).max()
            assert moved <= 5, name
