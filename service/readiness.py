"""Liveness and readiness: decided here, reported by health, the HTTP port and the gate."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from service.rpc.classify import SERVICE
from service.rpc.health import NOT_SERVING, SERVING

if TYPE_CHECKING:
    from service.rpc.health import Health
    from service.serving.gate import Gate

logger = logging.getLogger(__name__)

LIVENESS, READINESS = "", SERVICE


class Readiness:
    """Loading, serving, in trouble, draining. Everything but ``block`` belongs to the event loop.

    Args:
        gate: Takes requests, or refuses them.
        health: Tells callers and watchers.
    """

    def __init__(self, gate: Gate, health: Health) -> None:
        self._gate = gate
        self._health = health
        self._alive = True
        self._leaving = False
        self._draining = False

    def is_ready(self) -> bool:
        """Readiness: a load balancer should send calls."""
        return self._gate.is_open and not self._leaving

    def is_alive(self) -> bool:
        """Liveness: a restart is not needed."""
        return self._alive

    def is_draining(self) -> bool:
        """True once the drain delay is over."""
        return self._draining

    def load(self) -> None:
        """The ports are open; the model is not there yet."""
        self._health.set(LIVENESS, SERVING)
        self._health.set(READINESS, NOT_SERVING)

    def serve(self) -> None:
        """A model answers. What comes after ``leave`` is answered too, and health says nothing."""
        self._gate.open()
        if not self._leaving:
            self._health.set(READINESS, SERVING)

    def block(self, trouble: str) -> None:
        """Refuses calls while there is trouble, which is empty at its end. From any thread."""
        if not trouble:
            logger.info("serving again")
            self._gate.open()
            return
        logger.error("not serving: %s", trouble)
        self._gate.close("the server is in trouble; its log says why")

    def tell(self, *, healthy: bool) -> None:
        """Health says whether there is trouble; not after ``leave``."""
        if self._leaving:
            return
        self._alive = healthy
        for service in (LIVENESS, READINESS):
            self._health.set(service, SERVING if healthy else NOT_SERVING)

    def leave(self) -> None:
        """Balancers should send no more calls; those that come are still answered."""
        self._leaving = True
        self._health.set(READINESS, NOT_SERVING)

    def drain(self) -> None:
        """The drain delay is over."""
        self._draining = True
