"""Every picture of a run or of a digit, as PNG bytes, drawn off screen with matplotlib."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import Split
from training.evaluate import predict_logits
from training.model import Classifier, trace_layers

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_MISCLASSIFIED = 48
MAX_MAPS = 16
# Hand-made kernels beside the learned ones.
CLASSIC_KERNELS = {
    "vertical edges": [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]],
    "horizontal edges": [[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]],
    "blur": [[1 / 9] * 3] * 3,
}


def png(figure: Figure) -> bytes:
    """The figure as PNG, closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def curves(history: list[dict[str, float]]) -> bytes:
    """Loss and accuracy of each epoch, training and validation."""
    epochs = range(1, len(history) + 1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
        axis.plot(epochs, [entry[key] for entry in history], marker=".", label="training")
        held = [entry.get(f"validation_{key}") for entry in history]
        if None not in held:
            axis.plot(epochs, held, marker=".", label="validation")
        axis.set(xlabel="epoch", title=key)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    return png(figure)


def confusion(matrix: list[list[int]]) -> bytes:
    """Counts of truth against prediction; the diagonal is left pale so that errors show."""
    counts = torch.tensor(matrix)
    errors = counts - torch.diag(counts.diagonal())
    figure, axis = plt.subplots(figsize=(5, 4.5))
    axis.imshow(errors.numpy(), cmap="Reds")
    for row in range(10):
        for column in range(10):
            count = int(counts[row, column])
            if count:
                dark = errors[row, column] > 0.6 * errors.max()
                axis.text(
                    column, row, str(count), ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
    axis.set(xlabel="predicted", ylabel="truth", xticks=range(10), yticks=range(10))
    return png(figure)


def misclassified(model: Classifier, split: Split) -> bytes:
    """The digits that were read wrong, the most confident first."""
    probabilities = torch.softmax(predict_logits(model, split.images), dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = torch.nonzero(predicted != split.labels).squeeze(1)
    wrong = wrong[confidence[wrong].argsort(descending=True)][:MAX_MISCLASSIFIED]
    columns = 8
    rows = max(1, -(-len(wrong) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.2, rows * 1.45), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
        axis.imshow(split.images[index].numpy(), cmap="gray_r")
        title = f"{split.labels[index]} read as {predicted[index]}\n{confidence[index]:.0%}"
        axis.set_title(title, fontsize=7)
    return png(figure)


def filters(model: Classifier) -> bytes | None:
    """Kernels of the first convolution, or None without one."""
    convolution = next((m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d)), None)
    if convolution is None:
        return None
    kernels = convolution.weight.detach()[:, 0]
    limit = float(kernels.abs().max())
    rows = -(-len(kernels) // 8)
    figure, axes = plt.subplots(rows, 8, figsize=(8, rows * 1.05), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, kernel in zip(axes.flat, kernels, strict=False):
        axis.imshow(kernel.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    return png(figure)


def feature_maps(model: Classifier, image: Tensor) -> bytes:
    """What each layer makes of one image uint8[28, 28]; up to 16 maps a layer."""
    layers = [layer for layer in trace_layers(model, image[None]) if len(layer.shape) in {2, 4}]
    figure, axes = plt.subplots(
        len(layers), MAX_MAPS, figsize=(MAX_MAPS * 0.75, len(layers) * 0.85), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, layer in zip(axes, layers, strict=True):
        maps = layer.output[0]
        shape = "x".join(str(size) for size in layer.shape[1:])
        row[0].text(-0.2, 0.5, f"{layer.name}\n{shape}", ha="right", va="center",
                    transform=row[0].transAxes, fontsize=8)  # fmt: skip
        if maps.dim() == 1:
            row[0].imshow(maps[None, :64].numpy(), cmap="viridis", aspect="auto")
            continue
        for axis, values in zip(row, maps, strict=False):
            axis.imshow(values.numpy(), cmap="viridis")
    return png(figure)


def reliability(rows: list[dict[str, float]]) -> bytes:
    """Accuracy against confidence; on the diagonal, confidence means what it says."""
    figure, axis = plt.subplots(figsize=(4.5, 4.2))
    axis.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    sizes = [8 + 40 * min(1.0, row["images"] / 500) for row in rows]
    confidences = [row["confidence"] for row in rows]
    axis.scatter(confidences, [row["accuracy"] for row in rows], s=sizes)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    return png(figure)


def corruption_bars(accuracy: dict[str, float]) -> bytes:
    """Accuracy under each corruption."""
    figure, axis = plt.subplots(figsize=(6, 0.32 * len(accuracy) + 0.8))
    names = list(accuracy)[::-1]
    bars = axis.barh(names, [accuracy[name] for name in names])
    axis.bar_label(bars, [f"{accuracy[name]:.2%}" for name in names], padding=3, fontsize=8)
    axis.set(xlabel="accuracy", xlim=(0, 1.12))
    return png(figure)


def comparison(rows: list[dict[str, Any]]) -> bytes:
    """Accuracy against the cost of an image alone and in a batch, with deviations over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, batch in zip(axes, ("1", "16"), strict=True):
        for row in rows:
            axis.errorbar(
                row["cost"][batch], 100 * row["accuracy"], 100 * (row["sd"] or 0), fmt="o",
                capsize=3, label=row["arch"],
            )  # fmt: skip
        axis.set(xlabel=f"µs an image in batches of {batch}, one thread")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    axes[0].set_ylabel("validation accuracy, %")
    return png(figure)


def explanation(model: Classifier, image: Tensor) -> bytes:
    """What a convolution, a ReLU and a pooling step do to one image uint8[28, 28].

    Rows are kernels: hand-made ones that find edges or blur, then learned ones of the model's
    first convolution. Columns follow the image through the three steps.

    Raises:
        ValueError: If the model has no convolution.
    """
    convolution = next((m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d)), None)
    if convolution is None:
        raise ValueError(f"arch: {model.arch} has no convolution to explain")
    pixels = image.float()[None, None] / 255
    kernels = {name: torch.tensor(kernel) for name, kernel in CLASSIC_KERNELS.items()}
    weights = convolution.weight.detach()[:, 0]
    strongest = weights.flatten(1).norm(dim=1).argsort(descending=True)[:3]
    for number, index in enumerate(strongest.tolist(), start=1):
        kernels[f"learned {number}"] = weights[index]
    figure, axes = plt.subplots(len(kernels), 5, figsize=(10, 2 * len(kernels)))
    for row, (name, kernel) in zip(axes, kernels.items(), strict=True):
        pad = kernel.shape[-1] // 2
        convolved = F.conv2d(pixels, kernel[None, None], padding=pad)
        activated = F.relu(convolved)
        pooled = F.max_pool2d(activated, 2)
        steps = [
            ("image", pixels, "gray_r"), (name, kernel[None, None], "RdBu"),
            ("convolution", convolved, "RdBu"), ("ReLU", activated, "viridis"),
            ("max pooling", pooled, "viridis"),
        ]  # fmt: skip
        for axis, (title, values, colours) in zip(row, steps, strict=True):
            shape = "x".join(str(size) for size in values.shape[-2:])
            limit = float(values.abs().max()) or 1.0
            low = -limit if colours == "RdBu" else 0.0
            axis.imshow(values[0, 0].numpy(), cmap=colours, vmin=low, vmax=limit)
            axis.set_title(f"{title}\n{shape}", fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    return png(figure)
