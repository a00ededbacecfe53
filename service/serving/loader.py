"""From a repository of versions to a model that is proven ready to serve.

Three kinds of things go wrong. The content of a version does not hold: it is refused, and not tried
again until one of its files changes. The environment fails (no file descriptor, no memory, a
network volume that is away): that says nothing about the version, which is tried again at the next
look. The device or a key can not be used: no version can serve, and the caller is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from service.artifact.format import INPUT, MANIFEST, MODEL, OUTPUTS, ArtifactError, load_artifact
from service.artifact.repository import in_serving_order, name_of
from service.serving.cost import warm_up_sizes
from service.serving.engine import DeviceError, Engine, cuda_problem, is_exhausted
from service.serving.model import ServedModel

logger = logging.getLogger(__name__)

# Results of a load: it serves, its content is invalid, or the environment failed.
LOADED, REFUSED, FAILED = "loaded", "refused", "failed"

# Name, time of change and size of every file.
Fingerprint = tuple[tuple[str, int, int], ...]


class ModelLoader:
    """Decides which version of a repository serves, again and again.

    Args:
        repository: Folder of versions.
        pinned: The only version to consider, or 0 for any.
        device: ``auto``, ``cpu`` or ``cuda``.
        intra_op_threads: Threads inside one inference.
        max_batch_size: Largest batch to warm up with.
        public_key: Key that must have signed a version; None asks for no signature.
        on_load: Told ``LOADED``, ``REFUSED`` or ``FAILED`` for every version that is tried.
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
        on_load: Callable[[str], None],
    ) -> None:
        self._repository = repository
        self._pinned = pinned
        self._load = partial(
            load_model,
            name=name_of(repository),
            device=device,
            intra_op_threads=intra_op_threads,
            max_batch_size=max_batch_size,
            public_key=public_key,
        )
        self._on_load = on_load
        self._refused: dict[Path, Fingerprint] = {}
        # What kept a version from being loaded at the last look; logged once, not at every look.
        self._failed: dict[Path, str] = {}

    def load(self) -> ServedModel:
        """The first version in serving order that holds.

        Raises:
            ArtifactError: If no version holds; why not has been logged for each.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        model = self.load_other_than(None)
        if model is None:
            wanted = f"version {self._pinned}" if self._pinned else "a valid version"
            failed = "".join(f"; version {at.name}: {why}" for at, why in self._failed.items())
            raise ArtifactError(f"{self._repository}: expected {wanted}, found none{failed}")
        return model

    def forget_refusals(self) -> None:
        """Lets what was refused be tried again."""
        self._refused.clear()

    def load_other_than(self, current: ServedModel | None) -> ServedModel | None:
        """What should serve in place of ``current``; None when that is what should.

        A version that was refused is not tried again until one of its files changes. One that could
        not be loaded is tried at every look: until then ``current`` goes on serving, and without
        one the next version serves.

        Raises:
            ArtifactError: If the repository can not be read.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        for folder in in_serving_order(self._repository, self._pinned):
            if current is not None and folder.name == current.version:
                return None
            fingerprint = _fingerprint(folder)
            if self._refused.get(folder) == fingerprint:
                continue
            try:
                model = self._load(folder)
            except ArtifactError as error:
                self._refused[folder] = fingerprint
                self._failed.pop(folder, None)
                self._on_load(REFUSED)
                logger.error("model version %s rejected: %s", folder.name, error)
            except (OSError, MemoryError) as error:
                self._note_failure(folder, error)
                self._on_load(FAILED)
                if current is not None:
                    return None
            else:
                self._failed.pop(folder, None)
                self._on_load(LOADED)
                return model
        return None

    def _note_failure(self, folder: Path, error: OSError | MemoryError) -> None:
        why = str(error) or type(error).__name__
        if self._failed.get(folder) != why:
            logger.error("model version %s not loaded, will be retried: %s", folder.name, why)
        self._failed[folder] = why


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
        OSError: If a file can not be read for a reason that is not its own.
        MemoryError: If memory or threads ran out.
    """
    artifact = load_artifact(folder, public_key)
    if artifact.manifest["name"] != name:
        got = f"expected {name!r}, the name of the repository, got {artifact.manifest['name']!r}"
        raise ArtifactError(f"{MANIFEST}: name: {got}")
    if artifact.precision == "int8" and device != "cpu" and cuda_problem() is None:
        raise ArtifactError("precision: int8 runs on the CPU, and this server uses CUDA")
    try:
        engine = Engine(artifact.model, device=device, intra_op_threads=intra_op_threads)
        _check_signature(engine)
        answered = engine.run(artifact.golden.images)
        batch_seconds = engine.warm_up(warm_up_sizes(max_batch_size))
    except (ArtifactError, DeviceError, OSError):
        raise
    except Exception as error:  # onnxruntime raises many types on a bad model
        if is_exhausted(error):
            raise MemoryError(f"{MODEL}: {error}") from error
        raise ArtifactError(f"{MODEL}: onnxruntime refuses it: {error}") from error
    artifact.golden.check(answered, artifact.precision)
    return ServedModel(
        name=name,
        version=artifact.version,
        sha256=artifact.manifest["files"][MODEL],
        precision=artifact.precision,
        provider=engine.provider,
        artifact=artifact,
        engine=engine,
        batch_seconds=batch_seconds,
    )


def _check_signature(engine: Engine) -> None:
    inputs, outputs = engine.signature()
    if inputs != [INPUT["name"]]:
        raise ArtifactError(f"{MODEL}: inputs: expected {[INPUT['name']]}, got {inputs}")
    if outputs != list(OUTPUTS):
        raise ArtifactError(f"{MODEL}: outputs: expected {list(OUTPUTS)}, got {outputs}")
