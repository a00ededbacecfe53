"""Models that pass every check, and on images of one value loop before they answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from service.artifact.format import load_artifact
from service.artifact.golden import GOLDEN, write_golden
from tests.conftest import REPOSITORY
from tests.releases import FP32, copy_release, rewrite

# What the model makes of a batch of nothing but this value.
FOR_EVER, FOR_A_WHILE = 255, 254
ROUNDS = {FOR_EVER: 2**45, FOR_A_WHILE: 2_000_000}


def add_trap(model: Any) -> None:
    """Makes the graph loop, on an image of one of the two values, before it answers.

    Everything else is answered as ever: a model that passes every check at its load.
    """
    graph = model.graph
    [logits] = [node for node in graph.node if "probabilities" in node.output]
    logits.output[list(logits.output).index("probabilities")] = "honest"
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("s", "s2")]
    body = helper.make_graph(
        [
            helper.make_node("Cos", ["s"], ["s2"]),
            helper.make_node("Identity", ["go"], ["go2"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            state[0],
        ],
        [helper.make_tensor_value_info("go2", TensorProto.BOOL, []), state[1]],
    )
    constants = {"zero": 0.0, "small": 1e-30}
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        for name, value in constants.items()
    )
    graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    nodes = [helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.INT64)]
    nodes.append(helper.make_node("ReduceMin", ["wide"], ["least"], keepdims=0))
    for value, rounds in ROUNDS.items():
        for name, number in (("value", value), ("rounds", rounds)):
            tensor = helper.make_tensor(f"{name}{value}", TensorProto.INT64, [], [number])
            graph.initializer.append(tensor)
        nodes += [
            helper.make_node("Equal", ["least", f"value{value}"], [f"is{value}"]),
            helper.make_node("Cast", [f"is{value}"], [f"as{value}"], to=TensorProto.INT64),
            helper.make_node("Mul", [f"as{value}", f"rounds{value}"], [f"times{value}"]),
        ]
    nodes += [
        helper.make_node("Add", [f"times{value}" for value in ROUNDS], ["trips"]),
        helper.make_node("Loop", ["trips", "yes", "zero"], ["looped"], body=body),
        helper.make_node("Mul", ["looped", "small"], ["nothing"]),
        helper.make_node("Add", ["honest", "nothing"], ["probabilities"]),
    ]
    graph.node.extend(nodes)


def write_trap(folder: Path, *, at_once: bool = False) -> None:
    """A release with such a model.

    Args:
        folder: The release.
        at_once: Its golden digits have that value, too: loading it never ends.
    """
    made = copy_release(folder.parent, int(folder.name), "1").rename(folder.parent / ".trap")
    model = onnx.load(made / FP32)
    add_trap(model)
    rewrite(made, FP32, model.SerializeToString())
    if at_once:
        golden = load_artifact(REPOSITORY / "1").golden
        images = np.full_like(golden.images, FOR_EVER)
        rewrite(made, GOLDEN, write_golden(replace(golden, images=images)))
    made.rename(folder)
