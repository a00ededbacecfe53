"""Hands requests back to those who brought them, and tells the listener; neither can stop it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from service.serving.batch import Batch, BatchListener
from service.serving.request import Refusal, Reply, Request

logger = logging.getLogger(__name__)


class Replies:
    """Ends requests. Thread-safe.

    Args:
        listener: Is told after the replies; None for nobody.
    """

    def __init__(self, listener: BatchListener | None) -> None:
        self._listener = listener

    def end(self, batch: Batch) -> None:
        """Replies to all requests that end with a batch, once for each reply there is."""
        refused = batch.refused
        deliver([*batch.finished, *refused] if refused else batch.finished)
        if self._listener is not None:
            if refused:
                _try("notified of refused requests", self._listener.refused, refused)
            if batch.images:
                _try("notified of a batch", self._listener.batch, batch)

    def refuse(self, requests: Sequence[Request]) -> None:
        """Replies to requests whose ``refusal`` is set."""
        deliver(requests)
        told = [request for request in requests if request.refusal is not Refusal.INVALID]
        if told and self._listener is not None:
            _try("notified of refused requests", self._listener.refused, told)


def deliver(requests: Sequence[Request]) -> None:
    """Calls each reply once, with all of its requests in their order."""
    if not requests:
        return
    reply = requests[0].reply
    for request in requests:
        if request.reply is not reply:
            break
    else:  # nearly always
        _try("given their requests", reply, requests)
        return
    groups: dict[Reply, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.reply, []).append(request)
    for each, its in groups.items():
        _try("given their requests", each, its)


def _try(what: str, function: Callable[[Any], None], argument: object) -> None:
    try:
        function(argument)
    except Exception:  # must not keep the others from their answers
        logger.exception("%r failed when %s; this is a bug", function, what)
