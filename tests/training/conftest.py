from __future__ import annotations

import numpy as np
import pytest
import torch

from training.data import Split


@pytest.fixture(scope="module")
def split(sample: dict[str, np.ndarray]) -> Split:
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))
