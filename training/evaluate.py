"""What a classifier is worth on a whole split: accuracy, calibration, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.corruptions import CORRUPTIONS
from training.data import Split
from training.model import NUM_CLASSES, Classifier
from training.not_digits import held_out

CALIBRATION_BINS = 15

# Share of the digits that the threshold of the score lets pass, and images of each kind that is no
# digit with which it is tried.
KEPT_DIGITS, NOT_DIGITS = 0.99, 1000

Predict = Callable[[Tensor], Tensor]
Answer = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.inference_mode()
def predict(model: Classifier, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """What a model says of images, on the CPU, in evaluation mode.

    Returns:
        Logits, [N, 10], and the probability of being a digit, [N]; 1 of a classifier that is not
        scored.
    """
    model.eval()
    device = next(model.parameters()).device
    answers = [model.answer(chunk.to(device)) for chunk in torch.split(images, batch_size)]
    logits, is_digit = (torch.cat(each).cpu() for each in zip(*answers, strict=True))
    return logits, is_digit.sigmoid()[:, 0] if model.scored else torch.ones(len(images))


def predict_logits(model: Classifier, images: Tensor) -> Tensor:
    """The logits of ``predict``."""
    return predict(model, images)[0]


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion. Source: Wilson 1927, JASA 22(158)."""
    share = correct / total
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    denominator = 1 + z * z / total
    return (centre - margin) / denominator, (centre + margin) / denominator


def calibration_bins(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Confidence, accuracy and number of images in equal bins of confidence; empty ones left out.

    Args:
        probabilities: float[N, 10].
        labels: int64[N].
    """
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    rows = []
    for number in range(CALIBRATION_BINS):
        inside = bins == number
        if inside.any():
            rows.append(
                {
                    "images": int(inside.sum()),
                    "confidence": float(confidence[inside].double().mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    return rows


def expected_calibration_error(rows: list[dict[str, float]]) -> float:
    """Mean gap between confidence and accuracy. Source: Guo et al. 2017, equation 3."""
    total = sum(row["images"] for row in rows)
    gaps = (row["images"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return sum(gaps) / total


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the negative log likelihood of held-out images.

    The likelihood has one minimum in the logarithm of the temperature: golden-section search.

    Args:
        logits: float[N, 10] at temperature 1.
        labels: int64[N].
    """
    exact = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(exact / math.exp(log_temperature), labels))

    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def confusion_matrix(predicted: Tensor, labels: Tensor) -> Tensor:
    """Counts int64[10, 10] of predictions int64[N] (columns) for each true label (rows)."""
    cells = torch.bincount(labels * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
    return cells.reshape(NUM_CLASSES, NUM_CLASSES)


def evaluate(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy, its 95 % interval, calibration, and the confusion matrix (rows: truth).

    Args:
        logits: float[N, 10].
        labels: int64[N].
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = logits.argmax(dim=1)
    correct = int((predicted == labels).sum())
    confusion = confusion_matrix(predicted, labels)
    rows = calibration_bins(probabilities, labels)
    one_hot = F.one_hot(labels, NUM_CLASSES)
    return {
        "images": len(labels),
        "correct": correct,
        "accuracy": correct / len(labels),
        "accuracy_ci95": list(wilson_interval(correct, len(labels))),
        "class_accuracy": (confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)).tolist(),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "brier": float((probabilities - one_hot).square().sum(dim=1).mean()),
        "ece": expected_calibration_error(rows),
        "calibration": rows,
        "confusion": confusion.tolist(),
    }


def evaluate_not_digits(answer: Answer, split: Split, seed: int = 0) -> dict[str, float]:
    """How many images that are no digit pass the threshold of the score that most digits pass.

    The score is the confidence times the probability of being a digit.

    Args:
        answer: Logits float[N, 10] and probabilities float[N] for images uint8[N, 28, 28].
        split: Digits that the threshold is taken from.
        seed: Seeds the images, of which none is like those of training.

    Returns:
        The ``threshold``, and the share of each kind that passes it.
    """

    def scores(images: Tensor) -> Tensor:
        logits, is_digit = answer(images)
        return logits.softmax(dim=1).amax(dim=1) * is_digit

    threshold = float(torch.quantile(scores(split.images), 1 - KEPT_DIGITS))
    kinds = held_out(NOT_DIGITS, split.images.numpy(), np.random.default_rng(seed))
    passing = {
        name: float((scores(torch.from_numpy(images)) >= threshold).double().mean())
        for name, images in kinds.items()
    }
    return {"threshold": threshold, **passing}


def evaluate_corruptions(predict: Predict, split: Split, seed: int = 0) -> dict[str, float]:
    """Accuracy on the split under each corruption.

    Args:
        predict: Logits float[N, 10] for images uint8[N, 28, 28].
        split: What is corrupted.
        seed: Seeds each corruption.
    """
    accuracy = {}
    for name, corrupt in CORRUPTIONS.items():
        images = corrupt(split.images, torch.Generator().manual_seed(seed))
        predicted = predict(images).argmax(dim=1)
        accuracy[name] = float((predicted == split.labels).double().mean())
    return accuracy
