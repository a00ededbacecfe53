"""Weights that training goes on from: a checkpoint's, or those of a release."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from service.artifact.errors import ArtifactError
from service.artifact.format import load_artifact
from training.checkpoint import CheckpointError, build_classifier, load_checkpoint
from training.config import TrainingConfig
from training.data import Split
from training.fused import fused, plain_kernel
from training.model import NUM_CLASSES, SCALE, Classifier

# Training images whose statistics batch norm begins with.
STATISTICS_IMAGES = 2000


def load_start(path: Path, train: Split) -> tuple[Classifier, str]:
    """Reads weights.

    Args:
        path: A checkpoint, or the folder of a release with an fp32 model.
        train: What will be trained on.

    Returns:
        A classifier that answers as the stored one, and the SHA-256 of the file.

    Raises:
        CheckpointError: If it is neither.
    """
    if not path.is_dir():
        return load_checkpoint(path).model, hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        release = load_artifact(path)
        variant = release.variants["fp32"]
        trained = release.manifest["training"]["config"]
        config = TrainingConfig(
            arch=trained["arch"], kernel_size=trained["kernel_size"], not_digits=False
        )
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        message = f"{path}: expected a release with an fp32 model: {error}"
        raise CheckpointError(message) from error
    model = build_classifier(config)
    _fill(model, variant.model, path)
    _match_statistics(model, train)
    return model, variant.sha256


def _fill(model: Classifier, exported: bytes, path: Path) -> None:
    """Sets the weights from an exported graph, in which batch norm is part of convolutions."""
    import onnx  # noqa: PLC0415 - for this alone
    from onnx import numpy_helper  # noqa: PLC0415

    stored = {
        tensor.name.removeprefix("network."): torch.from_numpy(
            np.array(numpy_helper.to_array(tensor))
        )
        for tensor in onnx.load_from_string(exported).graph.initializer
    }
    network = fused(model.network)
    last = len(network) - 1
    for part in ("weight", "bias"):
        if f"head.{part}" in stored:  # the digits come first
            stored[f"{last}.{part}"] = stored[f"head.{part}"][:NUM_CLASSES]
    wide = "1.convolution.weight"
    if wide in stored:
        stored["1.0.weight"] = plain_kernel(stored[wide])
        stored["1.0.bias"] = stored["1.convolution.bias"][: len(stored["1.0.weight"])]
    try:
        network.load_state_dict({name: stored[name] for name in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its weights do not fit {model.arch}: {error}") from error
    first = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    state = network.state_dict()
    with torch.no_grad():
        first.weight.div_(SCALE)
    for convolution, norm in _norms(model):
        state[f"{norm}.bias"] = state.pop(f"{convolution}.bias")
    model.network.load_state_dict(state, strict=False)


def _norms(model: Classifier) -> list[tuple[str, str]]:
    """Paths of each batch norm in the network, behind that of the convolution before it."""
    names = [name for name, module in model.network.named_modules() if not list(module.children())]
    kinds = dict(model.network.named_modules())
    return [
        (before, name)
        for before, name in itertools.pairwise(names)
        if isinstance(kinds[name], nn.BatchNorm2d)
    ]


@torch.no_grad()
def _match_statistics(model: Classifier, train: Split) -> None:
    """Gives each batch norm the statistics of its inputs, and weights that undo them.

    The export folded the norms away, so that what they normalised by is lost. Training normalises
    by each batch: with these weights it begins at the function that was exported.
    """
    pixels = model.eval().scale(train.images[:STATISTICS_IMAGES])
    for _, name in _norms(model):  # in their order: each sees what the ones before it make
        norm: Any = model.network.get_submodule(name)
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model.network(pixels)
        handle.remove()
        norm.running_mean = seen[0].mean(dim=(0, 2, 3))
        norm.running_var = seen[0].var(dim=(0, 2, 3), unbiased=False)
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.add_(norm.running_mean)
