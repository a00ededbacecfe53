"""The inference graph: raw pixels in, logits and probabilities out, as self-contained ONNX."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.structure import metadata
from service.artifact.format import INPUT, OPSET, OUTPUTS
from training.fused import ColumnConvolution, fused, plain_first
from training.model import HIDDEN, NUM_CLASSES, SCALE, Classifier

# torch.export may specialise on a batch of 1; any larger example keeps the axis symbolic.
EXAMPLE_BATCH = 2


class InferenceGraph(nn.Module):
    """A classifier with the softmax inside, so that no client or server can skew either end.

    Batch norms, the scale of the pixels and the temperature are folded into weights, so that the
    graph has no node that a weight can replace; ``training.fused`` tells what else is rewritten.

    Args:
        classifier: On the CPU.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        *layers, last = fused(classifier.network)
        assert isinstance(last, nn.Linear)
        first = plain_first(layers)
        if first is not None:
            layers[:2] = [nn.Identity(), ColumnConvolution(first)]
        modules = [module for layer in (*layers, last) for module in layer.modules()]
        weighted = [m for m in modules if isinstance(m, (nn.Conv2d, nn.Linear))]
        with torch.no_grad():
            weighted[0].weight.mul_(SCALE)
            last.weight.div_(classifier.temperature)
            last.bias.div_(classifier.temperature)
        self.network = nn.Sequential(*layers)
        self.head = last
        self.is_digit: nn.Module | None = None
        if classifier.is_digit is not None:
            hidden, _, self.is_digit = copy.deepcopy(classifier.is_digit)
            assert isinstance(hidden, nn.Linear)
            self.head = _beside(last, hidden)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8[N, 28, 28] to what ``service.artifact.format.OUTPUTS`` lists."""
        outputs = self.head(self.network(image.to(torch.float32)))
        if self.is_digit is None:
            return outputs, torch.softmax(outputs, dim=1)
        logits, hidden = outputs.split([NUM_CLASSES, HIDDEN], dim=1)
        is_digit = torch.sigmoid(self.is_digit(torch.relu(hidden)))
        return logits, torch.softmax(logits, dim=1), is_digit


def _beside(one: nn.Linear, other: nn.Linear) -> nn.Linear:
    """Two linear layers on the same inputs as one."""
    both = nn.Linear(one.in_features, one.out_features + other.out_features)
    with torch.no_grad():
        both.weight.copy_(torch.cat([one.weight, other.weight]))
        both.bias.copy_(torch.cat([one.bias, other.bias]))
    return both


def export_model(classifier: Classifier, *, name: str, labels: Sequence[str]) -> bytes:
    """Serialises the classifier as ONNX; the same weights give the same bytes.

    Args:
        classifier: In evaluation mode, on the CPU.
        name: Name of the model, stored in the file.
        labels: Of its classes, stored there too.

    Returns:
        A ModelProto without external data, stack traces or build paths.
    """
    example = torch.zeros((EXAMPLE_BATCH, 28, 28), dtype=torch.uint8)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Deprecations inside the exporter; what it produced is checked by the gate.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                InferenceGraph(classifier).eval(),
                (example,),
                input_names=[INPUT["name"]],
                output_names=list(OUTPUTS if classifier.scored else OUTPUTS[:2]),
                opset_version=OPSET,
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    return cleaned(program.model_proto, name, labels).SerializeToString(deterministic=True)


def cleaned(model: onnx.ModelProto, name: str, labels: Sequence[str]) -> onnx.ModelProto:
    """Without what depends on the machine, with what identifies the model."""
    del model.metadata_props[:]
    graph = model.graph
    parts: list[Any] = [model, graph, *graph.node, *graph.initializer]
    parts += [*graph.value_info, *graph.input, *graph.output]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    graph.name = name
    for key, value in metadata(labels).items():
        model.metadata_props.add(key=key, value=value)
    return model
