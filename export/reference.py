"""What drift is measured against: how the model answers the images it was validated with."""

from __future__ import annotations

from typing import Any

from export.sessions import run_session, serving_session
from service.artifact.reference import observe, write_reference
from training.data import Split


def make_reference(model: bytes, train: Split, held_out: Split) -> dict[str, Any]:
    """The ``reference`` of a variant in the manifest.

    Of the images held out from training, since a model is surer of those it was trained on; of all
    where none were held out.

    Args:
        model: The exported model.
        train: What it was trained on.
        held_out: The validation images.
    """
    used, name = (held_out, "validation") if len(held_out) else (train, "train")
    images = used.images.numpy()
    answers = run_session(serving_session(model), images)
    return write_reference(observe(images, answers.probabilities, answers.is_digit).counts(), name)
