"""``digits serve`` whose hot path counts nothing: what the metrics cost is the difference."""

from __future__ import annotations

import sys

from service import cli
from service.metrics import Metrics


def _nothing(*_: object) -> None:
    """Counts nothing."""


if __name__ == "__main__":
    Metrics.started = Metrics.batch = _nothing  # type: ignore[method-assign,assignment]
    sys.exit(cli.main())
