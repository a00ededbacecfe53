"""The parity gate: an artifact is written only if every check here passes.

``torch.onnx.export(verify=True)`` can not fail a build: it compares one example and logs what it
finds. This gate compares every test image, in the session options that serve, and raises.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from service.artifact import INPUT, OPSET, OUTPUTS, sha256
from service.engine import session_options
from training.data import Split
from training.evaluate import predict_logits
from training.model import Classifier

BATCH_SIZES = (1, 7, 64, 1000)
# float32 kernels that add in another order differ by a few ulp of the largest partial sum; a
# wrong weight or normalisation differs by far more.
MAX_LOGIT_DIFFERENCE = 1e-4
MAX_PROBABILITY_ERROR = 1e-6
TRAINING_OPS = frozenset({"BatchNormalization", "Dropout"})
MAX_MODEL_BYTES = 16 * 2**20
_PATH_OR_TRACE = re.compile(rb"/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|\.py\b|Traceback")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: What was checked.
        figure: What was found.
        bound: What had to hold.
        passed: The verdict.
    """

    name: str
    figure: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class GateReport:
    """All checks of one model."""

    model_sha256: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json."""
        return {
            "model_sha256": self.model_sha256,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "machine": {"processor": platform.machine(), "threads": 1},
            "tools": {
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": ort.__version__,
            },
        }


def run_gate(
    model: bytes,
    *,
    export_again: Callable[[], bytes],
    classifier: Classifier,
    split: Split,
    recorded_correct: int,
    on_check: Callable[[Check], None],
) -> GateReport:
    """Runs every check of structure and, when those pass, every check of values.

    Args:
        model: The exported model.
        export_again: Exports the same checkpoint a second time.
        classifier: The model as trained.
        split: The whole test split.
        recorded_correct: Correct predictions that training recorded for it.
        on_check: Called with each check as it is decided.
    """
    report = GateReport(sha256(model), [])
    for check in _structure(model, export_again()):
        report.checks.append(check)
        on_check(check)
    if report.passed:  # a malformed graph can not be run
        for check in _parity(model, classifier, split, recorded_correct):
            report.checks.append(check)
            on_check(check)
    return report


def _structure(model: bytes, again: bytes) -> Iterator[Check]:
    try:
        proto = onnx.load_from_string(model)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except Exception as error:  # the checker raises several types
        yield Check("onnx checker", str(error).splitlines()[0], "valid", False)
        return
    yield Check("onnx checker and strict shape inference", "valid", "valid", True)
    yield _equal("opsets", {o.domain or "ai.onnx": o.version for o in proto.opset_import},
                 {"ai.onnx": OPSET})  # fmt: skip
    yield _equal(
        "input", [_signature(v) for v in proto.graph.input], ["image uint8[batch, 28, 28]"]
    )
    wanted = [f"{name} float32[batch, 10]" for name in OUTPUTS]
    yield _equal("outputs", [_signature(v) for v in proto.graph.output], wanted)
    external = [t.name for t in proto.graph.initializer if t.external_data]
    yield _equal("tensors stored outside the file", external, [])
    training = sorted({n.op_type for n in proto.graph.node} & TRAINING_OPS)
    yield _equal("training operators", training, [])
    text = onnx.ModelProto.FromString(model)
    for tensor in text.graph.initializer:
        tensor.raw_data = b""  # weights may look like anything
    found = _PATH_OR_TRACE.findall(text.SerializeToString())
    leaks = sorted({match.decode() for match in found})
    yield _equal("paths or stack traces", leaks, [])
    size = len(model)
    yield Check("size", f"{size:,} bytes", f"<= {MAX_MODEL_BYTES:,}", size <= MAX_MODEL_BYTES)
    yield _equal("second export, sha256", sha256(again), sha256(model))


def _equal(name: str, got: object, wanted: object) -> Check:
    return Check(name, str(got), f"== {wanted}", got == wanted)


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{value.name} {dtype}[{shape}]"


def _parity(
    model: bytes, classifier: Classifier, split: Split, recorded_correct: int
) -> Iterator[Check]:
    session = serving_session(model)
    total = len(split)
    expected_labels = split.labels.numpy()
    for size in BATCH_SIZES:
        torch_logits = predict_logits(classifier, split.images, size).numpy()
        logits, probabilities = run_session(session, split.images, size)
        finite = bool(np.isfinite(logits).all() and np.isfinite(probabilities).all())
        yield Check(f"finite outputs, batch {size}", str(finite), "== True", finite)
        difference = float(np.abs(logits - torch_logits).max())
        yield Check(
            f"max |logit difference|, batch {size}",
            f"{difference:.3g}",
            f"<= {MAX_LOGIT_DIFFERENCE:g}",
            difference <= MAX_LOGIT_DIFFERENCE,
        )
        agree = int((logits.argmax(axis=1) == torch_logits.argmax(axis=1)).sum())
        yield _equal(f"same decision, batch {size}", agree, total)
        yield _equal(
            f"probabilities pick the same digit, batch {size}",
            int((probabilities.argmax(axis=1) == logits.argmax(axis=1)).sum()),
            total,
        )
        softmax = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
        error = float(np.abs(probabilities - softmax).max())
        yield Check(
            f"probabilities are the softmax of the logits, batch {size}",
            f"{error:.3g}",
            f"<= {MAX_PROBABILITY_ERROR:g}",
            error <= MAX_PROBABILITY_ERROR,
        )
        sums = float(np.abs(probabilities.astype(np.float64).sum(axis=1) - 1).max())
        yield Check(
            f"probabilities sum to 1, batch {size}",
            f"{sums:.3g}",
            f"<= {MAX_PROBABILITY_ERROR:g}",
            sums <= MAX_PROBABILITY_ERROR,
        )
        correct = int((probabilities.argmax(axis=1) == expected_labels).sum())
        yield _equal(f"correct digits as trained, batch {size}", correct, recorded_correct)


def serving_session(model: bytes) -> ort.InferenceSession:
    """A session with the options that the server uses on the CPU by default."""
    return ort.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])


def run_session(
    session: ort.InferenceSession, images: Tensor, batch_size: int
) -> tuple[Floats, Floats]:
    """Logits and probabilities, float32[N, 10] each, of images uint8[N, 28, 28] in batches."""
    chunks = [
        session.run(list(OUTPUTS), {INPUT["name"]: chunk.numpy()})
        for chunk in torch.split(images, batch_size)
    ]
    logits, probabilities = zip(*chunks, strict=True)
    return np.concatenate(logits), np.concatenate(probabilities)
