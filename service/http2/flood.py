"""Tells a peer that makes work for nothing from one that works."""

from __future__ import annotations

from service.http2.frames import ErrorCode, Http2Error

# Frames that ask for nothing: the largest burst, and how many more each second.
BURST = 1_000.0
PER_SECOND = 50.0
# What an answer, or a message of one, makes up for: callers measure round-trip times with PING,
# open windows and cancel calls in proportion to what they are sent.
PER_ANSWER = 4.0


class FloodGauge:
    """A bucket of allowance: nuisances take from it, time and useful work give back.

    Rapid resets, PING, SETTINGS, PRIORITY, empty and tiny DATA, tiny WINDOW_UPDATE, frames of
    unknown type and refused requests are all one kind of nuisance: each costs this side about as
    much as its sender, and asks for nothing. Source: RFC 9113, section 10.5; CVE-2023-44487.
    """

    def __init__(self) -> None:
        self._left = BURST
        self._refilled = 0.0

    @property
    def is_spent(self) -> bool:
        """Whether the allowance is used up."""
        return self._left <= 0

    def refill(self, now: float) -> None:
        """Gives back for the time that passed; ``now`` in monotonic seconds."""
        self._left = min(BURST, self._left + (now - self._refilled) * PER_SECOND)
        self._refilled = now

    def nuisance(self, cost: float = 1.0) -> None:
        """A frame that asks for nothing."""
        self._left -= cost

    def useful(self) -> None:
        """An answer, or a message of one."""
        self._left += PER_ANSWER

    def check(self) -> None:
        """Ends the connection of a peer that floods it.

        Raises:
            Http2Error: If the allowance is used up.
        """
        if self._left <= 0:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that ask for nothing")
