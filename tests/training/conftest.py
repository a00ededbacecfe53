from __future__ import annotations

import pytest
import torch

from training.data import Split


@pytest.fixture(scope="module")
def split(sample):
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))
