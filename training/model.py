"""Network architectures by name, and the classifier that owns what surrounds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from training.config import check_arch

NUM_CLASSES = 10
# Brings pixels to the range from 0 to 1. There is no shift: 0, with which convolutions pad, stays
# the background, and the export can fold the factor into the first layer's weights.
SCALE = 1 / 255
# Units between the features of an image and whether it is a digit.
HIDDEN = 32


@dataclass(frozen=True)
class Knobs:
    """What can be chosen about an architecture, where it says so.

    Attributes:
        kernel_size: Kernel of every convolution.
        dropout: Probability of dropping a feature before the last layer.
    """

    kernel_size: int = 3
    dropout: float = 0.0


def conv_relu(in_channels: int, out_channels: int, kernel: int = 3) -> list[nn.Module]:
    """Convolution that keeps the size, and ReLU."""
    return [nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2), nn.ReLU()]


def block(in_channels: int, out_channels: int, kernel: int = 3) -> list[nn.Module]:
    """Convolution, ReLU, and pooling that halves the size."""
    return [*conv_relu(in_channels, out_channels, kernel), nn.MaxPool2d(2)]


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU; in this order the export folds the norm away."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def one_channel() -> nn.Module:
    """Pixels [N, 28, 28] to [N, 1, 28, 28]."""
    return nn.Unflatten(1, (1, 28))


def mlp(_: Knobs) -> list[nn.Module]:
    """784-128-10, the dense baseline."""
    return [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES)]


def conv16(_: Knobs) -> list[nn.Module]:
    """One block of 16 channels, then the classes."""
    head = [nn.Flatten(), nn.Linear(16 * 14 * 14, NUM_CLASSES)]
    return [one_channel(), *block(1, 16), *head]


def conv16_32(_: Knobs) -> list[nn.Module]:
    """Two blocks, then the classes."""
    head = [nn.Flatten(), nn.Linear(32 * 7 * 7, NUM_CLASSES)]
    return [one_channel(), *block(1, 16), *block(16, 32), *head]


def conv16_32_fc128(_: Knobs) -> list[nn.Module]:
    """Two blocks and a hidden layer of 128."""
    hidden = [nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES)]
    return [one_channel(), *block(1, 16), *block(16, 32), nn.Flatten(), *hidden]


def conv32_64_fc128(_: Knobs) -> list[nn.Module]:
    """Two wider blocks and a hidden layer of 128: the network of most tutorials."""
    hidden = [nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES)]
    return [one_channel(), *block(1, 32), *block(32, 64), nn.Flatten(), *hidden]


def conv32_64_128(knobs: Knobs) -> list[nn.Module]:
    """Three blocks, with a choice of kernel and dropout."""
    size = knobs.kernel_size
    blocks = [*block(1, 32, size), *block(32, 64, size), *block(64, 128, size)]
    head = [nn.Dropout(knobs.dropout), nn.Linear(128 * 3 * 3, NUM_CLASSES)]
    return [one_channel(), *blocks, nn.Flatten(), *head]


def from_text(text: str, _: Knobs) -> list[nn.Module]:
    """The network that a text such as ``32-p-48-48s-p`` describes.

    A number is a convolution of so many channels with batch norm and ReLU: the first of 4x4 with a
    stride of 2, which keeps every map at 14x14 or below, the others of 3x3. An ``s`` after it is
    a stride of 2, ``p`` is pooling by 2.

    Raises:
        ValueError: If nothing of the image is left.
    """
    layers, channels, side = [one_channel()], 1, 28
    for part in text.split("-"):
        if part == "p":
            layers.append(nn.MaxPool2d(2))
            side //= 2
            continue
        first = side == 28
        width, stride = int(part.removesuffix("s")), 2 if first or part.endswith("s") else 1
        layers.append(conv_bn_relu(channels, width, 4 if first else 3, stride=stride))
        channels, side = width, -(-side // stride)
    if not side:
        raise ValueError(f"arch: expected pooling that leaves at least one pixel, got {text!r}")
    return [*layers, nn.Flatten(), nn.Linear(channels * side**2, NUM_CLASSES)]


# Under the names that ``training.config.ARCHITECTURE_NAMES`` lists.
ARCHITECTURES: dict[str, Callable[[Knobs], list[nn.Module]]] = {
    "mlp": mlp,
    "conv16": conv16,
    "conv16-32": conv16_32,
    "conv16-32-fc128": conv16_32_fc128,
    "conv32-64-fc128": conv32_64_fc128,
    "conv32-64-128": conv32_64_128,
}
WITH_KNOBS = frozenset({"conv32-64-128"})


class Classifier(nn.Module):
    """Raw pixels to logits. Scaling lives here, so training, export and oracle share it.

    Args:
        arch: Name in ``ARCHITECTURES``, or a text for ``from_text``.
        knobs: What was chosen about it.
        scored: Whether it also says how likely an image is a digit at all.

    Attributes:
        network: From scaled pixels to logits; its last layer is linear.
        is_digit: From the inputs of that layer to the logit of being a digit; None if not scored.
            Fitted after training (``training.scoring``).
        temperature: Divides the logits in evaluation mode, so that probabilities mean what they
            say; fitted on validation images after training. Source: Guo et al. 2017, section 4.2.

    Raises:
        ValueError: If the architecture is unknown, or has no such knobs.
    """

    temperature: Tensor

    def __init__(self, arch: str, knobs: Knobs = Knobs(), *, scored: bool = False) -> None:
        super().__init__()
        check_arch(arch)
        if knobs != Knobs() and arch not in WITH_KNOBS:
            expected = ", ".join(sorted(WITH_KNOBS))
            raise ValueError(f"kernel_size, dropout: {arch} has no such choice, only {expected}")
        self.arch, self.scored = arch, scored
        make = ARCHITECTURES.get(arch) or partial(from_text, arch)
        self.network = nn.Sequential(*make(knobs))
        self.is_digit = None
        if scored:
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            self.is_digit = nn.Sequential(
                nn.Linear(last.in_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
            )
        self.register_buffer("temperature", torch.ones(()))

    def scale(self, images: Tensor) -> Tensor:
        """Pixels uint8 or float [N, 28, 28], 0-255, to network input [N, 28, 28], 0-1."""
        return images.to(next(self.network.parameters()).dtype) * SCALE

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classifies raw pixels, and tells whether they are a digit.

        Args:
            images: uint8 or float [N, 28, 28], 0 (background) to 255 (ink).

        Returns:
            Logits of the digits, [N, 10], and the logit of being one at all, [N, 1], or [N, 0] of a
            classifier that is not scored; in the dtype of the parameters.
        """
        features: Tensor = self.network[:-1](self.scale(images))
        logits: Tensor = self.network[-1](features)
        if not self.training:
            logits = logits / self.temperature
        return logits, logits[:, :0] if self.is_digit is None else self.is_digit(features)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of ``answer``."""
        return self.answer(images)[0]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Layer:
    """One layer of a network, as it works on a batch.

    Attributes:
        name: Type, with kernel and stride where there are any.
        shape: Shape after it.
        parameters: Trainable parameters.
        macs: Multiply-accumulates per image.
        output: What it made of the images.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    output: Tensor


@torch.inference_mode()
def trace_layers(model: Classifier, images: Tensor) -> list[Layer]:
    """Runs images uint8[N, 28, 28] and records every layer through forward hooks."""
    layers: list[Layer] = []

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        layers.append(
            Layer(
                name=_layer_name(module),
                shape=tuple(output.shape),
                parameters=parameter_count(module),
                macs=_macs(module, output),
                output=output,
            )
        )

    with _hooks(model, record):
        model.eval()(images)
    return layers


@contextmanager
def _hooks(model: Classifier, record: Callable[..., None]) -> Iterator[None]:
    leaves = [module for module in model.network.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(record) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_name(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Conv2d):
        stride = f" stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"{name} {module.kernel_size[0]}x{module.kernel_size[1]}{stride}"
    if isinstance(module, nn.MaxPool2d):
        return f"{name} {module.kernel_size}x{module.kernel_size}"
    return name


def _macs(module: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates per image; batch norm counts none, as the export folds it away."""
    if isinstance(module, nn.Conv2d):
        weights = module.weight[0].numel()
        return weights * output[0].numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return 0


def select_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, not by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
