"""The same network with less to do: for the export.

Batch norms become part of the convolutions before them. A first convolution on one channel becomes
one on four: ONNX Runtime copies what lies under the kernel channel by channel, so that one channel
took a quarter of a network's time. Four columns that lie together are four channels without a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

COLUMNS = 4
# Of the first convolution that can be rewritten; each place of the new one makes two columns.
KERNEL, STRIDE, PADDING, HALVES = 4, 2, 1, 2


def fused(network: nn.Sequential) -> nn.Sequential:
    """A copy for evaluation without batch norms.

    Parameters keep their paths; each convolution before a batch norm gets a bias.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        for index, (first, second) in enumerate(zip(module, list(module)[1:], strict=False)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(first, second)
                module[index + 1] = nn.Identity()
    return network


class ColumnConvolution(nn.Module):
    """A convolution of 4x4 with a stride of 2 on one channel, and ReLU, on four columns at once.

    Args:
        convolution: What it does the same as.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.channels = convolution.out_channels
        wide = nn.Conv2d(
            COLUMNS, HALVES * self.channels, (KERNEL, 3), (STRIDE, 1), padding=(PADDING, 1),
            dtype=convolution.weight.dtype,
        )  # fmt: skip
        assert convolution.bias is not None
        assert wide.bias is not None
        with torch.no_grad():
            wide.weight.zero_()
            for half, offset, part, column in _places():
                rows = slice(half * self.channels, (half + 1) * self.channels)
                wide.weight[rows, part, :, column] = convolution.weight[:, 0, :, offset]
            wide.bias.copy_(convolution.bias.repeat(HALVES))
        self.convolution = wide

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float[N, 28, 28] to features float[N, channels, 14, 14]."""
        columns = pixels.reshape(-1, 28, 28 // COLUMNS, COLUMNS).permute(0, 3, 1, 2)
        features = torch.relu(self.convolution(columns)).permute(0, 2, 3, 1)
        return features.reshape(-1, 14, 14, self.channels).permute(0, 3, 1, 2)


def plain_kernel(weight: Tensor) -> Tensor:
    """The kernel float[channels, 1, 4, 4] that a ``ColumnConvolution`` has in its weight."""
    kernel = weight.new_empty(len(weight) // HALVES, 1, KERNEL, KERNEL)
    for half, offset, part, column in _places():
        if half == 0:
            kernel[:, 0, :, offset] = weight[: len(kernel), part, :, column]
    return kernel


def _places() -> list[tuple[int, int, int, int]]:
    """Half, column of the old kernel; channel and column of the new kernel that it goes to."""
    places = []
    for half in range(HALVES):
        for offset in range(KERNEL):
            group, part = divmod(STRIDE * half - PADDING + offset, COLUMNS)
            places.append((half, offset, part, group + 1))
    return places


def plain_first(layers: Sequence[nn.Module]) -> nn.Conv2d | None:
    """The first convolution of a fused network, if it can be rewritten: the second layer's."""
    first = next(iter(layers[1].children()), None)
    if not isinstance(first, nn.Conv2d):
        return None
    found = first.in_channels, first.kernel_size, first.stride, first.padding
    expected = 1, (KERNEL, KERNEL), (STRIDE, STRIDE), (PADDING, PADDING)
    return first if found == expected else None
