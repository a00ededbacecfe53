"""Network architectures by name, and the classifier that owns input normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NUM_CLASSES = 10
# Mean and standard deviation of the MNIST training pixels, on the 0-1 scale.
PIXEL_MEAN = 0.1307
PIXEL_STD = 0.3081


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU; in this order the export folds the norm away."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def strided() -> nn.Sequential:
    """The default: a strided stem keeps every map at 14x14 or below; 71k parameters.

    Widths are multiples of 16, the channel block of ONNX Runtime's NCHWc kernels on AVX-512.
    """
    return nn.Sequential(
        conv_bn_relu(1, 32, 4, stride=2),  # (N, 32, 14, 14)
        conv_bn_relu(32, 32, 3),  # (N, 32, 14, 14)
        conv_bn_relu(32, 64, 3, stride=2),  # (N, 64, 7, 7)
        conv_bn_relu(64, 64, 3),  # (N, 64, 7, 7)
        nn.MaxPool2d(2),  # (N, 64, 3, 3)
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, NUM_CLASSES),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"strided": strided}


class Classifier(nn.Module):
    """Raw pixels to logits. Normalisation lives here, so training, export and oracle share it.

    Args:
        arch: Name in ``ARCHITECTURES``.

    Raises:
        ValueError: If the architecture is unknown.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        self.arch = arch
        self.network = ARCHITECTURES[arch]()

    def forward(self, images: Tensor) -> Tensor:
        """Classifies raw pixels.

        Args:
            images: uint8 or float [N, 28, 28], 0 (background) to 255 (ink).

        Returns:
            Logits, [N, 10], in the dtype of the parameters.
        """
        pixels = images.unsqueeze(1).to(next(self.network.parameters()).dtype)
        # (pixels / 255 - mean) / std as one multiplication and one subtraction.
        normalised = pixels * (1 / (255 * PIXEL_STD)) - PIXEL_MEAN / PIXEL_STD
        logits: Tensor = self.network(normalised)
        return logits


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def select_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
