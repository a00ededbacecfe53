"""From a repository of versions to a model that is proven ready to serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from digits.v1 import digits_pb2
from service import wire
from service.artifact import INPUT, MODEL, OUTPUTS, Artifact, ArtifactError, load_artifact
from service.engine import DeviceError, Engine

if TYPE_CHECKING:
    from service.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A verified, warmed-up model.

    Attributes:
        artifact: Where it came from.
        engine: What runs it.
        ref: What every answer says about it.
        encoded_ref: The same, as bytes of a response.
        seconds_per_image: Measured at the largest batch on one slot.
    """

    artifact: Artifact
    engine: Engine
    ref: digits_pb2.ModelRef
    encoded_ref: bytes
    seconds_per_image: float


def versions(repository: Path) -> list[Path]:
    """Folders of the repository with a number for a name, the highest first."""
    if not repository.is_dir():
        raise ArtifactError(f"model_repository: {repository} is not a folder")
    try:
        entries = list(repository.iterdir())
    except OSError as error:
        raise ArtifactError(f"model_repository: {repository}: {error.strerror}") from None
    numbered = [path for path in entries if path.name.isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def load_best(
    repository: Path,
    *,
    pinned: int,
    device: str,
    intra_op_threads: int,
    max_batch_size: int,
    metrics: Metrics,
) -> ServedModel:
    """Loads the pinned version, or else the highest one that holds.

    Args:
        repository: Folder of versions.
        pinned: The only version to consider, or 0 for any.
        device: ``auto``, ``cpu`` or ``cuda``.
        intra_op_threads: Threads inside one inference.
        max_batch_size: Largest batch to warm up with.
        metrics: Counts versions loaded and refused.

    Raises:
        ArtifactError: If no version holds; each refusal has been logged with its reason.
        DeviceError: If the device can not serve.
    """
    for folder in _candidates(repository, pinned):
        try:
            model = load_model(
                folder, repository.resolve().name, device, intra_op_threads, max_batch_size
            )
        except ArtifactError as error:
            metrics.model_load("refused")
            logger.error("model version %s refused: %s", folder.name, error)
            continue
        metrics.model_load("loaded")
        return model
    wanted = f"version {pinned}" if pinned else "a valid version"
    raise ArtifactError(f"{repository}: expected {wanted}, found none")


def _candidates(repository: Path, pinned: int) -> Iterator[Path]:
    for folder in versions(repository):
        if not pinned or int(folder.name) == pinned:
            yield folder


def load_model(
    folder: Path, name: str, device: str, intra_op_threads: int, max_batch_size: int
) -> ServedModel:
    """Verifies one version, runs its golden digits on a new engine, and warms that up.

    Raises:
        ArtifactError: If anything does not hold.
        DeviceError: If the device can not serve.
    """
    artifact = load_artifact(folder)
    try:
        engine = Engine(artifact.model, device=device, intra_op_threads=intra_op_threads)
        _check_signature(engine)
        answered = engine.run(artifact.golden.images)
        seconds_per_image = engine.warm_up(max_batch_size)
    except (ArtifactError, DeviceError):
        raise
    except Exception as error:  # onnxruntime raises many types on a bad model
        raise ArtifactError(f"{MODEL}: onnxruntime refuses it: {error}") from error
    artifact.golden.check(answered)
    manifest = artifact.manifest
    ref = digits_pb2.ModelRef(
        name=name,
        version=artifact.version,
        sha256=manifest["files"][MODEL],
        precision=manifest["precision"],
        execution_provider=engine.provider,
    )
    return ServedModel(
        artifact=artifact,
        engine=engine,
        ref=ref,
        encoded_ref=wire.encode_model_ref(ref),
        seconds_per_image=seconds_per_image,
    )


def _check_signature(engine: Engine) -> None:
    inputs, outputs = engine.signature()
    if inputs != [INPUT["name"]]:
        raise ArtifactError(f"{MODEL}: inputs: expected {[INPUT['name']]}, got {inputs}")
    if outputs != list(OUTPUTS):
        raise ArtifactError(f"{MODEL}: outputs: expected {list(OUTPUTS)}, got {outputs}")
