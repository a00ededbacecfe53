"""Learns whether an image is a digit at all, from the features of a network that knows the digits.

The network is left as it is, so that this costs it no accuracy: trained together, the same classes
lost a tenth of a percent. Two small layers on the features of its last one are fitted to training
digits, degraded as in training, against what is no digit.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import not_digits
from training.augment import augment
from training.checkpoint import build_classifier
from training.config import TrainingConfig
from training.data import Split
from training.drawn import Drawn
from training.model import Classifier

# Images that are no digit, each warped so many times, and at most so many digits, drawn ones
# among them.
OTHERS, TIMES, DIGITS, DRAWN = 16_000, 2, 30_000, 4_000
EPOCHS, BATCH, MAX_LR, WEIGHT_DECAY = 8, 256, 3e-3, 1e-2


def fit_is_digit(model: Classifier, config: TrainingConfig, train: Split) -> Classifier:
    """The classifier with ``is_digit`` fitted.

    Args:
        model: Trained, on the CPU.
        config: Of its training; must ask for it.
        train: What it was trained on.
    """
    torch.manual_seed(config.seed)
    scored = build_classifier(config)
    scored.load_state_dict(model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(train), generator=generator)[:DIGITS]
    share = min(1.0, len(order) / DIGITS)  # a small set of digits gets as few others
    others = not_digits.make(
        max(BATCH, round(share * OTHERS)), train.images.numpy(), np.random.default_rng(config.seed)
    )
    drawn = Drawn(config, steps=len(train)).some(
        round(share * DRAWN) * (config.drawn > 0), generator
    )
    digits = torch.cat([train.images[order], drawn.images])
    repeated = torch.from_numpy(others).repeat(TIMES, 1, 1)
    features = _features(scored, torch.cat([digits, repeated]), generator)
    truth = torch.zeros(len(features))
    truth[: len(digits)] = 1
    _fit(scored, features, truth, generator)
    return scored.eval()


@torch.no_grad()
def _features(model: Classifier, images: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs of the last layer, of warped and degraded images."""
    network = model.eval().network[:-1]
    chunks = [augment(chunk.float(), generator) for chunk in torch.split(images, 500)]
    return torch.cat([network(model.scale(chunk)) for chunk in chunks])


def _fit(model: Classifier, features: Tensor, truth: Tensor, generator: torch.Generator) -> None:
    head = model.is_digit
    assert head is not None
    first = head[0]
    assert isinstance(first, nn.Linear)
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-6
    normal = (features - mean) / deviation
    steps = len(normal) // BATCH
    optimizer = torch.optim.AdamW(head.parameters(), MAX_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(normal), generator=generator)
        for index in torch.split(order[: steps * BATCH], BATCH):
            logits = head(normal[index]).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, truth[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():  # the normalisation becomes part of the weights
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)
