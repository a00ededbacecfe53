"""From a repository of releases to a model that is proven ready to serve.

Three kinds of things go wrong. A release is invalid: it is rejected, and not tried again until one
of its files changes. The environment fails (no file descriptor, no memory, a network volume that is
away): that says nothing about the release, which is tried again at the next poll. The device or a
key can not be used: no release can serve, and the caller gets the error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from service.artifact.errors import ArtifactError
from service.artifact.format import (
    INPUT,
    MANIFEST,
    OUTPUTS,
    Artifact,
    Variant,
    load_artifact,
    model_file,
)
from service.artifact.repository import in_serving_order, name_of, promoted
from service.serving.cost import warm_up_sizes
from service.serving.engine import DeviceError, Engine, TimeLimit, cuda_problem, is_exhausted
from service.serving.model import ServedModel

logger = logging.getLogger(__name__)

# Results of a load: it serves, it is invalid, or the environment failed.
LOADED, REFUSED, FAILED = "loaded", "refused", "failed"
# Which variant serves, the preferred one first: int8 is made for the CPU, and slower on CUDA.
ON_CPU, ON_CUDA = ("int8", "fp32"), ("fp32",)
# To try out a variant, which takes about a tenth of a second.
LOAD_TIMEOUT_S = 60.0

# Name, time of change and size of every file.
Fingerprint = tuple[tuple[str, int, int], ...]


class ModelLoader:
    """Decides which release of a repository serves, at every poll.

    Args:
        repository: Folder of releases.
        wanted: The numbers of the releases to consider; where it is one, ``PROMOTED`` is not read.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, or the only one that may serve.
        intra_op_threads: Threads inside one inference.
        max_batch_size: Largest batch to warm up with.
        public_key: Key that must have signed releases and notes; None asks for no signature.
        on_load: Gets ``LOADED``, ``REFUSED`` or ``FAILED`` for every release that is tried.
    """

    def __init__(
        self,
        repository: Path,
        *,
        wanted: range,
        device: str,
        precision: str,
        intra_op_threads: int,
        max_batch_size: int,
        public_key: Path | None,
        on_load: Callable[[str], None],
    ) -> None:
        self._repository = repository
        self._wanted = wanted
        self._public_key = public_key
        self._load = partial(
            load_model,
            name=name_of(repository),
            device=device,
            precision=precision,
            intra_op_threads=intra_op_threads,
            max_batch_size=max_batch_size,
            public_key=public_key,
        )
        self._on_load = on_load
        # With the note at that time: it may ask for a release that was not published.
        self._refused: dict[Path, tuple[Fingerprint, int | None]] = {}
        # Why a release could not be loaded at the last poll; logged once, not at every poll.
        self._failed: dict[Path, str] = {}

    def load(self) -> ServedModel:
        """The first valid release in serving order.

        Raises:
            ArtifactError: If none is valid; the reason has been logged for each.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        model = self.load_other_than(None)
        if model is None:
            wanted = "a valid release"
            if self._wanted.start > 1:
                wanted += f" from {self._wanted.start} on"
            if self._is_pinned:
                wanted = f"release {self._wanted.start}"
            failed = "".join(f"; release {at.name}: {why}" for at, why in self._failed.items())
            raise ArtifactError(f"{self._repository}: expected {wanted}, found none{failed}")
        return model

    @property
    def _is_pinned(self) -> bool:
        return len(self._wanted) == 1

    def forget_refusals(self) -> None:
        """Lets rejected releases be tried again."""
        self._refused.clear()

    def load_other_than(self, current: ServedModel | None) -> ServedModel | None:
        """What should serve in place of ``current``; None when that is what should.

        A release that was rejected is not tried again until one of its files changes. One that
        could not be loaded is tried at every poll: until then ``current`` goes on serving, and
        without one the next release serves.

        Raises:
            ArtifactError: If the repository can not be read.
            DeviceError: If the device can not serve.
            KeyFileError: If the key can not be used.
        """
        note = None if self._is_pinned else promoted(self._repository, self._public_key)
        for folder in in_serving_order(self._repository, self._wanted, note):
            if current is not None and folder.name == current.version:
                return None
            state = _fingerprint(folder), note
            if self._refused.get(folder) == state:
                continue
            try:
                model = self._load(folder)
                _check_labels(model, current)
                if not (self._is_pinned or int(folder.name) == note):
                    _check_published(model)
            except ArtifactError as error:
                self._refused[folder] = state
                self._failed.pop(folder, None)
                self._on_load(REFUSED)
                logger.error("release %s rejected: %s", folder.name, error)
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
            logger.error("release %s not loaded, will be retried: %s", folder.name, why)
        self._failed[folder] = why


def _fingerprint(folder: Path) -> Fingerprint:
    """Changes when a file of the folder does."""
    try:
        entries = [(path.name, path.stat()) for path in folder.iterdir()]
    except OSError:  # it is being moved or removed
        return ()
    # The time of change covers permissions as well as content.
    return tuple(sorted((name, stat.st_ctime_ns, stat.st_size) for name, stat in entries))


def _check_published(model: ServedModel) -> None:
    """A release that was judged worse, or of another kind, serves only where it is asked for."""
    if not model.artifact.is_published:
        reasons = "; ".join(str(one) for one in model.artifact.manifest["comparison"]["reasons"])
        raise ArtifactError(f"it was not published, and is not promoted: {reasons}")


def _check_labels(model: ServedModel, current: ServedModel | None) -> None:
    """Callers have learned the labels of the model in service."""
    if current is not None and model.artifact.labels != current.artifact.labels:
        expected, got = list(current.artifact.labels), list(model.artifact.labels)
        raise ArtifactError(f"{MANIFEST}: labels: expected {expected}, as in service, got {got}")


def load_model(
    folder: Path,
    name: str,
    *,
    device: str,
    intra_op_threads: int,
    max_batch_size: int,
    precision: str = "auto",
    public_key: Path | None = None,
) -> ServedModel:
    """Verifies one release, and makes an engine of the best variant that can serve.

    A variant that onnxruntime rejects, that answers golden digits otherwise on this machine, or
    that is not ready in time, is passed over with a warning. A file that is not what the manifest
    says makes the whole release invalid: it is damaged, or still being copied.

    Raises:
        ArtifactError: If the release is invalid, or no variant can serve.
        DeviceError: If the device can not serve.
        KeyFileError: If the key can not be used.
        OSError: If a file can not be read for a reason that is not its own.
        MemoryError: If memory or threads ran out.
    """
    artifact = load_artifact(folder, public_key)
    if artifact.manifest["name"] != name:
        got = f"expected {name!r}, the name of the repository, got {artifact.manifest['name']!r}"
        raise ArtifactError(f"{MANIFEST}: name: {got}")
    errors = []
    for variant in _candidates(artifact, device, precision):
        try:
            with TimeLimit(LOAD_TIMEOUT_S) as limit:
                engine = Engine(
                    variant.model, device=device, intra_op_threads=intra_op_threads, limit=limit
                )
                batch_seconds = _try_out(engine, artifact, variant, max_batch_size)
        except ArtifactError as error:
            errors.append(f"{variant.precision}: {error}")
            continue
        except (DeviceError, OSError):
            raise
        except Exception as error:  # onnxruntime raises many types on a bad model
            file = model_file(variant.precision)
            if is_exhausted(error):
                raise MemoryError(f"{file}: {error}") from error
            errors.append(f"{file}: onnxruntime rejects it: {error}")
            continue
        if errors:
            logger.warning(
                "release %s serves %s: %s", folder.name, variant.precision, "; ".join(errors)
            )
        return ServedModel(name, artifact, variant, engine.provider, engine, batch_seconds)
    raise ArtifactError("; ".join(errors))


def _candidates(artifact: Artifact, device: str, precision: str) -> Sequence[Variant]:
    """The variants to try, the first one first; at least one."""
    on_cuda = device != "cpu" and cuda_problem() is None
    usable = ON_CUDA if on_cuda else ON_CPU
    wanted = [one for one in usable if precision in ("auto", one)]
    found = [artifact.variants[one] for one in wanted if one in artifact.variants]
    if not found:
        expected = " or ".join(wanted) or f"{' or '.join(usable)}, since CUDA runs no int8"
        raise ArtifactError(
            f"precision: expected {expected}, got a release with {', '.join(artifact.variants)}"
        )
    return found


def _try_out(
    engine: Engine, artifact: Artifact, variant: Variant, max_batch_size: int
) -> dict[int, float]:
    """Runs golden digits and warms up; returns the seconds of each size of batch."""
    file = model_file(variant.precision)
    inputs, outputs = engine.signature()
    if inputs != [INPUT["name"]]:
        raise ArtifactError(f"{file}: inputs: expected {[INPUT['name']]}, got {inputs}")
    if outputs not in (list(OUTPUTS), list(OUTPUTS[:-1])):
        raise ArtifactError(f"{file}: outputs: expected {list(OUTPUTS)}, got {outputs}")
    artifact.golden.check(*engine.answer(artifact.golden.images), variant.precision)
    return engine.warm_up(warm_up_sizes(max_batch_size))
