"""From a repository of versions to a model that is proven ready to serve."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from digits.v1 import digits_pb2
from service import wire
from service.artifact import INPUT, MODEL, OUTPUTS, Artifact, ArtifactError, load_artifact
from service.engine import DeviceError, Engine, cuda_problem
from service.repository import in_serving_order

if TYPE_CHECKING:
    from service.metrics import Metrics

logger = logging.getLogger(__name__)

# Name, time of change and size of every file.
Fingerprint = tuple[tuple[str, int, int], ...]


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


class ModelLoader:
    """Decides which version of a repository serves, again and again.

    Args:
        repository: Folder of versions.
        pinned: The only version to consider, or 0 for any.
        device: ``auto``, ``cpu`` or ``cuda``.
        intra_op_threads: Threads inside one inference.
        max_batch_size: Largest batch to warm up with.
        public_key: Key that must have signed a version; None asks for no signature.
        metrics: Counts versions loaded and refused.
    """

    def __init__(
        self,
        repository: Path,
        *,
        pinned: int,
        device: str,
        intra_op_threads: int,
        max_batch_size: int,
        public_key: Path | None,
        metrics: Metrics,
    ) -> None:
        self._repository = repository
        self._pinned = pinned
        self._load = partial(
            load_model,
            name=repository.resolve().name,
            device=device,
            intra_op_threads=intra_op_threads,
            max_batch_size=max_batch_size,
            public_key=public_key,
        )
        self._metrics = metrics
        self._refused: dict[Path, Fingerprint] = {}

    def load(self) -> ServedModel:
        """The first version in serving order that holds.

        Raises:
            ArtifactError: If no version holds; each refusal has been logged with its reason.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        model = self.load_other_than(None)
        if model is None:
            wanted = f"version {self._pinned}" if self._pinned else "a valid version"
            raise ArtifactError(f"{self._repository}: expected {wanted}, found none")
        return model

    def forget_refusals(self) -> None:
        """Lets what was refused be tried again."""
        self._refused.clear()

    def load_other_than(self, current: ServedModel | None) -> ServedModel | None:
        """What should serve in place of ``current``; None when that is what should.

        A version that was refused is not tried again until one of its files changes.

        Raises:
            ArtifactError: If the repository can not be read.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        for folder in in_serving_order(self._repository, self._pinned):
            if current is not None and folder.name == current.ref.version:
                return None
            fingerprint = _fingerprint(folder)
            if self._refused.get(folder) == fingerprint:
                continue
            try:
                model = self._load(folder)
            except ArtifactError as error:
                self._refused[folder] = fingerprint
                self._metrics.model_load("refused")
                logger.error("model version %s refused: %s", folder.name, error)
                continue
            self._metrics.model_load("loaded")
            return model
        return None


def _fingerprint(folder: Path) -> Fingerprint:
    """Changes when a file of the folder does."""
    try:
        entries = [(path.name, path.stat()) for path in folder.iterdir()]
    except OSError:  # it is being moved or removed
        return ()
    # The time of change covers permissions as well as content.
    return tuple(sorted((name, stat.st_ctime_ns, stat.st_size) for name, stat in entries))


def load_model(
    folder: Path,
    name: str,
    *,
    device: str,
    intra_op_threads: int,
    max_batch_size: int,
    public_key: Path | None = None,
) -> ServedModel:
    """Verifies one version, runs its golden digits on a new engine, and warms that up.

    Raises:
        ArtifactError: If anything does not hold.
        DeviceError: If the device can not serve.
        KeyFileError: If the key can not be used.
    """
    artifact = load_artifact(folder, public_key)
    if artifact.precision == "int8" and device != "cpu" and cuda_problem() is None:
        raise ArtifactError("precision: int8 runs on the CPU, and this server uses CUDA")
    try:
        engine = Engine(artifact.model, device=device, intra_op_threads=intra_op_threads)
        _check_signature(engine)
        answered = engine.run(artifact.golden.images)
        seconds_per_image = engine.warm_up(max_batch_size)
    except (ArtifactError, DeviceError):
        raise
    except Exception as error:  # onnxruntime raises many types on a bad model
        raise ArtifactError(f"{MODEL}: onnxruntime refuses it: {error}") from error
    artifact.golden.check(answered, artifact.precision)
    manifest = artifact.manifest
    ref = digits_pb2.ModelRef(
        name=name,
        version=artifact.version,
        sha256=manifest["files"][MODEL],
        precision=artifact.precision,
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
