"""Loads from repositories, as the server does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.artifact.repository import ANY
from service.serving.loader import ModelLoader, load_model
from tests.conftest import REPOSITORY

DEFAULT = REPOSITORY / "1"


def only(number: int) -> Any:
    """What ``--model-version`` with a number allows."""
    return range(number, number + 1)


def load(repository: Any, wanted: Any = ANY, public_key: Any = None) -> tuple[Any, list[Any]]:
    """The model that serves, and what became of each version that was tried."""
    results: list[Any] = []
    return loader(repository, results, wanted=wanted, public_key=public_key).load(), results


def loader(
    repository: Any,
    results: Any,
    wanted: Any = ANY,
    public_key: Any = None,
    precision: str = "auto",
) -> ModelLoader:
    return ModelLoader(
        repository, wanted=wanted, device="cpu", precision=precision, intra_op_threads=1,
        max_batch_size=4, public_key=public_key, on_load=results.append,
    )  # fmt: skip


def load_one(
    folder: Path, device: str = "cpu", public_key: Any = None, precision: str = "auto"
) -> Any:
    return load_model(
        folder, "digits", device=device, intra_op_threads=1, max_batch_size=4,
        public_key=public_key, precision=precision,
    )  # fmt: skip
