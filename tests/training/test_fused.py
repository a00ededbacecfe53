"""The same function with less to do, whatever the weights are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from training.config import TrainingConfig
from training.fused import ColumnConvolution, fused, plain_first, plain_kernel
from training.model import ARCHITECTURES, Classifier


def trained(arch: str) -> Any:
    """A classifier whose batch norms do something."""
    torch.manual_seed(0)
    model = Classifier(arch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


@pytest.fixture(scope="module")
def pixels() -> Any:
    return torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, TrainingConfig.arch])
def test_network_without_batch_norms_answers_the_same(arch: Any, pixels: Any) -> None:
    model = trained(arch)
    network = fused(model.network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(pixels), model.network(pixels))
    assert set(dict(network.named_parameters())) <= {
        *dict(model.network.named_parameters()),
        *(f"{name}.bias" for name, _ in network.named_modules()),
    }


def test_convolution_on_four_columns_makes_the_same_features(pixels: Any) -> None:
    network = fused(trained(TrainingConfig.arch).network)
    first = plain_first(list(network))
    assert first is not None
    expected = torch.relu(first(pixels.unsqueeze(1)))
    columns = ColumnConvolution(first)
    torch.testing.assert_close(columns(pixels), expected)
    assert torch.equal(plain_kernel(columns.convolution.weight), first.weight)


@pytest.mark.parametrize("arch", ["mlp", "conv16", "conv32-64-128"])
def test_another_first_layer_is_left_as_it_is(arch: Any) -> None:
    assert plain_first(list(fused(trained(arch).network))) is None
