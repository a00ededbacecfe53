"""The items of a stream that have no answer yet, to be sent again when the stream is resumed.

A server that stops ends its streams once what it took is answered; what was on its way to it is
lost unless the client sends it again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

# Requests that are sent ahead of their answers at most: enough to keep a server busy, and a bound
# on what is kept here to be sent again. gRPC's own would be megabytes for each hop.
MAX_UNANSWERED = 64

T = TypeVar("T")


class Unanswered(Generic[T]):
    """Requests that were taken from the caller's sequence and have no answer yet, by position."""

    def __init__(self) -> None:
        self._requests: dict[int, T] = {}
        self._taken = 0
        self._answered = 0
        self._ended = False
        self._failure: Exception | None = None

    def answered(self) -> None:
        """The oldest has its answer."""
        del self._requests[self._answered]
        self._answered += 1

    def finish(self) -> None:
        """Checks that nothing is left, after a stream that ended well.

        Raises:
            Exception: What the caller's sequence raised, if that ended it.
            RuntimeError: If the server left something unanswered.
        """
        if self._requests:
            left = len(self._requests)
            raise RuntimeError(f"the server left {left} requests unanswered; this is a bug")
        if self._failure is not None:
            raise self._failure

    def _take(self, request: T) -> None:
        self._requests[self._taken] = request
        self._taken += 1  # last: a position below it is there to be read, by any thread

    def _end(self, failure: Exception | None = None) -> None:
        # gRPC would log an error of the sequence and fail the stream with UNKNOWN.
        self._ended, self._failure = True, failure


class SyncUnanswered(Unanswered[T]):
    """Takes from an iterator, on the threads that gRPC sends from.

    The thread of a stream that has ended may still wait inside the caller's iterator. What it gets
    then belongs to the next stream, which meanwhile sends what has no answer.
    """

    def __init__(self, source: Iterator[T]) -> None:
        super().__init__()
        self._source = source
        self._taking = threading.Lock()
        self._room = threading.Semaphore(MAX_UNANSWERED)

    def answered(self) -> None:
        """See ``Unanswered.answered``."""
        super().answered()
        self._room.release()

    def close(self) -> None:
        """Takes nothing more, and lets go of a thread that waits for room."""
        self._ended = True
        self._room.release()

    def requests(self) -> Iterator[T]:
        """For one stream: what has no answer, then what follows."""
        position = self._answered
        while (request := self._at(position)) is not None:
            yield request
            position += 1

    def _at(self, position: int) -> T | None:
        if position >= self._taken:
            with self._taking:
                if position == self._taken and not self._ended:
                    self._room.acquire()
                    self._take_next()
        return self._requests.get(position)

    def _take_next(self) -> None:
        if self._ended:  # closed meanwhile
            return
        try:
            self._take(next(self._source))
        except StopIteration:
            self._end()
        except Exception as error:  # whatever the caller's sequence raises
            self._end(error)


class AsyncUnanswered(Unanswered[T]):
    """The same for an asynchronous iterator, on one event loop."""

    def __init__(self, source: AsyncIterator[T]) -> None:
        super().__init__()
        self._source = source
        self._taking: asyncio.Task[None] | None = None
        self._closed = False
        self._room = asyncio.Semaphore(MAX_UNANSWERED)

    def answered(self) -> None:
        """See ``Unanswered.answered``."""
        super().answered()
        self._room.release()

    async def requests(self) -> AsyncIterator[T]:
        """For one stream: what has no answer, then what follows."""
        position = self._answered
        while True:
            while position == self._taken and not self._ended:
                if self._taking is None:
                    self._taking = asyncio.create_task(self._take_next())
                # The end of a stream cancels who waits here, not the caller's sequence.
                await asyncio.shield(self._taking)
            if position not in self._requests:
                return
            yield self._requests[position]
            position += 1

    def close(self) -> None:
        """Takes nothing more."""
        self._closed = True
        if self._taking is not None:
            self._taking.cancel()

    async def _take_next(self) -> None:
        try:
            await self._room.acquire()
            self._take(await anext(self._source))
        except StopAsyncIteration:
            self._end()
        except asyncio.CancelledError as error:
            if self._closed:
                raise
            # Something that the sequence waited for was cancelled, not who waits for its items.
            failure = RuntimeError("the sequence of batches raised CancelledError")
            failure.__cause__ = error
            self._end(failure)
        except Exception as error:  # whatever the caller's sequence raises
            self._end(error)
        finally:
            self._taking = None
