"""Weights that training goes on from: a checkpoint's, or those of a release."""

from __future__ import annotations

import hashlib
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
from training.model import Classifier

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
        config = TrainingConfig(
            arch=release.manifest["training"]["architecture"],
            normalise=release.manifest["training"]["config"]["normalise"],
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

    graph = onnx.load_from_string(exported).graph
    stored = {
        tensor.name.removeprefix("classifier."): torch.from_numpy(
            np.array(numpy_helper.to_array(tensor))
        )
        for tensor in graph.initializer
    }
    state: dict[str, Tensor] = model.state_dict()
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                convolution = f"{name.rpartition('.')[0]}.0"
                state[f"{name}.bias"] = stored[f"{convolution}.weight_bias"]
        state.update({name: stored[name] for name in state if name in stored})
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its weights do not fit {model.arch}: {error}") from error
    model.temperature.fill_(1.0)  # fitted again after training


@torch.no_grad()
def _match_statistics(model: Classifier, train: Split) -> None:
    """Gives each batch norm the statistics of its inputs, and weights that undo them.

    The export folded the norms away, so that what they normalised by is lost. Training normalises
    by each batch: with these weights it begins at the function that was exported.
    """
    values: Any = model.eval().normalise(train.images[:STATISTICS_IMAGES])
    for module in model.network:
        if isinstance(module, nn.Sequential) and isinstance(module[1], nn.BatchNorm2d):
            convolution, norm = module[0], module[1]
            inputs = convolution(values)
            norm.running_mean = inputs.mean(dim=(0, 2, 3))
            norm.running_var = inputs.var(dim=(0, 2, 3), unbiased=False)
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.add_(norm.running_mean)
        values = module(values)
