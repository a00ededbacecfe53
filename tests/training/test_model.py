from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from training import __main__ as command
from training.config import TrainingConfig
from training.model import ARCHITECTURES, Classifier, Knobs, parameter_count, trace_layers

# Counted by hand: weights and biases of every layer.
PARAMETERS = {
    "mlp": 784 * 128 + 128 + 1290,
    "conv16": 160 + 16 * 196 * 10 + 10,
    "conv16-32": 160 + 4640 + 32 * 49 * 10 + 10,
    "conv16-32-fc128": 160 + 4640 + 32 * 49 * 128 + 128 + 1290,
    "conv32-64-fc128": 421_642,
    "conv32-64-128": 320 + 18_496 + 73_856 + 128 * 9 * 10 + 10,
}


@pytest.mark.parametrize("arch", [*ARCHITECTURES, TrainingConfig.arch])
def test_every_architecture_maps_pixels_to_logits(arch: Any) -> None:
    model = Classifier(arch).eval()
    with torch.inference_mode():
        logits = model(torch.zeros((3, 28, 28), dtype=torch.uint8))
    assert logits.shape == (3, 10)


@pytest.mark.parametrize(("arch", "count"), PARAMETERS.items())
def test_parameters_are_as_counted_by_hand(arch: Any, count: Any) -> None:
    assert parameter_count(Classifier(arch)) == count


@pytest.mark.parametrize("arch", ["lenet", "", "32-", "p-32", "0-32", "32-48-q", "1000000"])
def test_unknown_architecture_is_refused_by_name(arch: str) -> None:
    with pytest.raises(ValueError, match=rf"arch: expected one of mlp, .*, got '{arch}'"):
        Classifier(arch)


def test_layers_can_be_given_as_a_text() -> None:
    model = Classifier("8-p-16-24s-p", scored=True).eval()
    layers = trace_layers(model, torch.zeros((1, 28, 28), dtype=torch.uint8))
    assert [(layer.name, layer.shape[1:]) for layer in layers if layer.macs] == [
        ("Conv2d 4x4 stride 2", (8, 14, 14)),
        ("Conv2d 3x3", (16, 7, 7)),
        ("Conv2d 3x3 stride 2", (24, 4, 4)),
        ("Linear", (10,)),
    ]
    with pytest.raises(ValueError, match="pooling that leaves at least one pixel"):
        Classifier("8-p-p-p-p")


def test_knobs_change_the_network_that_has_them_and_are_refused_elsewhere() -> None:
    five = Classifier("conv32-64-128", Knobs(kernel_size=5, dropout=0.5))
    assert parameter_count(five) > parameter_count(Classifier("conv32-64-128"))
    assert [m.p for m in five.modules() if isinstance(m, nn.Dropout)] == [0.5]
    with pytest.raises(ValueError, match="mlp has no such choice, only conv32-64-128"):
        Classifier("mlp", Knobs(kernel_size=5))


def test_pixels_are_scaled_and_not_shifted() -> None:
    """Background stays 0, which is what convolutions pad with."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 28, 3)
    torch.testing.assert_close(Classifier("mlp").scale(images)[0, 0], torch.tensor([0, 0.2, 1]))


def test_scored_classifier_also_says_whether_an_image_is_a_digit() -> None:
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    plain, scored = (
        Classifier(TrainingConfig.arch).eval(),
        Classifier(TrainingConfig.arch, scored=True).eval(),
    )
    assert [tuple(part.shape) for part in plain.answer(images)] == [(5, 10), (5, 0)]
    scored.temperature.fill_(2)
    logits, is_digit = scored.answer(images)
    assert (logits.shape, is_digit.shape) == ((5, 10), (5, 1))
    torch.testing.assert_close(logits, scored.network(scored.scale(images)) / 2)
    scored.temperature.fill_(1)
    assert torch.equal(is_digit, scored.answer(images)[1])  # the temperature is the digits' own


def test_layers_are_traced_with_shapes_parameters_and_macs() -> None:
    layers = trace_layers(Classifier("conv32-64-fc128"), torch.zeros((5, 28, 28)))
    convolution = next(layer for layer in layers if layer.name == "Conv2d 3x3")
    assert convolution.shape == (5, 32, 28, 28)
    assert (convolution.parameters, convolution.macs) == (320, 9 * 32 * 784)
    assert sum(layer.parameters for layer in layers) == 421_642
    assert layers[-1].shape == (5, 10)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, TrainingConfig.arch])
def test_describe_prints_every_layer(arch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["describe", f"--arch={arch}", "--batch=7"]) == 0
    printed = capsys.readouterr().out
    assert "(7, 10)" in printed
    assert f"{parameter_count(Classifier(arch)):,}" in printed


def test_dropout_and_temperature_act_in_one_mode_alone() -> None:
    model = Classifier("conv32-64-128", Knobs(dropout=0.5))
    images = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    model.eval()
    first = model(images)
    assert torch.equal(first, model(images))
    model.temperature.fill_(2.0)
    torch.testing.assert_close(model(images), first / 2)
    model.train()
    assert not torch.equal(model(images), model(images))
