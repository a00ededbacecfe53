"""Clients that are closed or cancelled, and clients on another event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from digits.client import AsyncDigitClient, ClientStateError, DigitClient
from tests.digits.faults import (
    IMAGE,
    Servicer,
)


def test_call_after_close_says_so() -> None:
    client = DigitClient("127.0.0.1:1")
    client.close()
    client.close()
    with pytest.raises(ClientStateError, match=r"^the client is closed$"):
        client.classify(IMAGE)
    with pytest.raises(ClientStateError, match=r"^the client is closed$"):
        next(client.classify_stream([IMAGE]))


def test_asynchronous_call_after_close_says_so() -> None:
    async def ask() -> None:
        client = AsyncDigitClient("127.0.0.1:1")
        await client.close()
        with pytest.raises(ClientStateError, match=r"^the client is closed$"):
            await client.classify(IMAGE)
        with pytest.raises(ClientStateError, match=r"^the client is closed$"):
            await anext(client.classify_stream(forever()))

    asyncio.run(ask())


async def forever() -> AsyncIterator[Any]:
    while True:
        yield IMAGE
        await asyncio.sleep(0)


@pytest.mark.parametrize("images", [IMAGE, np.zeros((10, 28, 28), np.uint8)], ids=["one", "many"])
def test_call_during_which_the_client_is_closed_says_so(
    serve: Callable[..., Any], images: Any
) -> None:
    servicer = Servicer(waits=True)
    client = DigitClient(serve(servicer), timeout_s=60, request_images=3)
    raised = []

    def call() -> None:
        # Of many requests some may not have begun.
        with pytest.raises(
            ClientStateError, match=r"the client (was closed during|is clos)"
        ) as caught:
            client.classify(images)
        raised.append(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    assert servicer.called.wait(60)
    client.close()
    thread.join(60)
    servicer.go_on.set()
    assert raised


ASYNC_CALLS = {
    "one": lambda client: client.classify(IMAGE),
    "many": lambda client: client.classify(np.zeros((10, 28, 28), np.uint8)),
    "stream": lambda client: anext(client.classify_stream(forever())),
}


@pytest.mark.parametrize("call", ASYNC_CALLS)
def test_closing_the_asynchronous_client_cancels_nobodys_task(
    serve: Callable[..., Any], call: str
) -> None:
    servicer = Servicer(waits=True)
    address = serve(servicer)

    async def ask() -> None:
        client = AsyncDigitClient(address, timeout_s=60, request_images=3)
        task = asyncio.ensure_future(ASYNC_CALLS[call](client))
        assert await asyncio.to_thread(servicer.called.wait, 60)
        await client.close()
        with pytest.raises(ClientStateError, match="closed during the call"):
            await asyncio.wait_for(task, 60)
        assert not task.cancelled()

    asyncio.run(ask())
    servicer.go_on.set()


@pytest.mark.parametrize("call", ASYNC_CALLS)
def test_task_that_is_cancelled_ends_cancelled_and_so_does_its_call(
    serve: Callable[..., Any], call: str
) -> None:
    servicer = Servicer(waits=True)
    address = serve(servicer)

    async def ask() -> None:
        async with AsyncDigitClient(address, timeout_s=60, request_images=3) as client:
            task = asyncio.ensure_future(ASYNC_CALLS[call](client))
            assert await asyncio.to_thread(servicer.called.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.go_on.wait, 60)  # the server was told
            servicer.waits = False
            assert (await client.classify(IMAGE)).digits == [5]

    asyncio.run(ask())


def test_sequence_that_waits_for_something_cancelled_cancels_not_its_reader(
    serve: Callable[..., Any],
) -> None:
    address = serve(Servicer())

    async def broken() -> AsyncIterator[Any]:
        yield IMAGE
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    async def ask() -> None:
        async with AsyncDigitClient(address) as client:
            answers = client.classify_stream(broken())
            assert (await anext(answers)).message == "never"
            with pytest.raises(RuntimeError, match="sequence of batches raised CancelledError"):
                await anext(answers)

    asyncio.run(ask())


def test_asynchronous_client_may_be_made_outside_its_loop_and_used_on_one_alone(
    serve: Callable[..., Any],
) -> None:
    address = serve(Servicer())
    client = AsyncDigitClient(address)

    async def ask() -> Any:
        return (await client.classify(IMAGE)).digits

    async def close() -> None:
        await client.close()

    async def ask_all() -> None:
        assert list(await asyncio.gather(ask(), ask())) == [[5], [5]]
        await asyncio.to_thread(fail_elsewhere)
        assert await ask() == [5]
        await client.close()

    def fail_elsewhere() -> None:
        for misuse in (ask, close):
            with pytest.raises(ClientStateError, match="used on another event loop"):
                asyncio.run(misuse())

    asyncio.run(ask_all())
    fail_elsewhere()
