"""What drift is measured against: how the model answers the images it was validated with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.artifact import replace_manifest
from export.sessions import run_session, serving_session
from service.artifact.format import ArtifactError, load_artifact, write_reference
from service.artifact.reference import observe
from training.data import Split, hold_out


def make_reference(model: bytes, train: Split, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest's ``reference``.

    Of the images held out from training, since a model is surer of those it was trained on; of all
    where none were held out.

    Args:
        model: The exported model.
        train: The training split.
        config: The manifest's ``training.config``.
    """
    _, held_out = hold_out(train, config["validation"], config["seed"])
    used, name = (held_out, "validation") if len(held_out) else (train, "train")
    images = used.images.numpy()
    answers = run_session(serving_session(model), images)
    return write_reference(observe(images, answers.probabilities).counts(), name)


def add_reference(folder: Path, train: Split, signing_key: Path | None) -> dict[str, Any]:
    """Adds the reference to a written version, whose model stays as it is; returns it.

    Args:
        folder: The version.
        train: The training split.
        signing_key: PEM file of the Ed25519 key that signs it again.

    Raises:
        ArtifactError: If the version does not hold, or was made with other data.
        KeyFileError: If the version is signed and no key can sign it again.
    """
    found = load_artifact(folder)
    manifest = found.manifest
    expected, got = manifest["dataset"]["sha256"]["train"], train.digest()
    if got != expected:
        raise ArtifactError(f"train split: {folder} was made with {expected}, this is {got}")
    reference = make_reference(found.model, train, manifest["training"]["config"])
    replace_manifest(folder, manifest | {"reference": reference}, signing_key)
    return reference
