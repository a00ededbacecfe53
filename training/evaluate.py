"""Accuracy of a classifier on a whole split, with its uncertainty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from training.data import Split
from training.model import NUM_CLASSES, Classifier


@torch.inference_mode()
def predict_logits(model: Classifier, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Logits for every image, [N, 10] on the CPU, with the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(chunk.to(device)).cpu() for chunk in torch.split(images, batch_size)])


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion. Source: Wilson 1927, JASA 22(158)."""
    share = correct / total
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    denominator = 1 + z * z / total
    return (centre - margin) / denominator, (centre + margin) / denominator


def evaluate(model: Classifier, split: Split) -> dict[str, Any]:
    """Accuracy, its 95 % interval, negative log likelihood and confusion matrix (rows: truth)."""
    logits = predict_logits(model, split.images)
    predicted = logits.argmax(dim=1)
    correct = int((predicted == split.labels).sum())
    cells = torch.bincount(split.labels * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
    return {
        "images": len(split),
        "correct": correct,
        "accuracy": correct / len(split),
        "accuracy_ci95": list(wilson_interval(correct, len(split))),
        "nll": float(torch.nn.functional.cross_entropy(logits, split.labels)),
        "confusion": cells.reshape(NUM_CLASSES, NUM_CLASSES).tolist(),
    }
