"""The inference graph: raw pixels in, logits and probabilities out, as self-contained ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.structure import metadata
from service.artifact.format import INPUT, OPSET, OUTPUTS
from training.model import Classifier

# torch.export may specialise on a batch of 1; any larger example keeps the axis symbolic.
EXAMPLE_BATCH = 2


class InferenceGraph(nn.Module):
    """A classifier with the softmax inside, so that no client or server can skew either end."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8[N, 28, 28] to logits float32[N, 10] and probabilities float32[N, 10]."""
        logits = self.classifier(image)
        return logits, torch.softmax(logits, dim=1)


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
                output_names=list(OUTPUTS),
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
