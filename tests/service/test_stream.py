"""What one stream may hold."""

from __future__ import annotations

import asyncio
import threading

import grpc
import psutil

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.stream import STREAM_WINDOW, StreamItem, Window
from service.transports.grpcio import Mailbox
from tests.conftest import wait_until


def items(*sizes):
    mailbox = Mailbox(asyncio.get_running_loop())
    return [StreamItem(mailbox, bytes(size), received=0.0, deadline=None) for size in sizes]


async def is_put(window, item):
    """Whether there is room for it now."""
    putting = asyncio.create_task(window.put(item))
    done, _ = await asyncio.wait({putting}, timeout=0.05)
    putting.cancel()
    return bool(done)


def test_items_come_out_in_order_and_wait_for_room_in_number_and_in_bytes():
    async def scenario():
        window = Window(100)
        small = items(*[1] * (STREAM_WINDOW + 1))
        for item in small[:-1]:
            await window.put(item)
        assert not await is_put(window, small[-1])
        assert await window.oldest() is small[0]
        window.sent()
        assert await is_put(window, small[-1])
        while window.items:
            window.sent()
        large, other = items(1000, 1)
        await window.put(large)  # alone, whatever its size
        assert not await is_put(window, other)
        window.sent()
        assert await is_put(window, other)
        window.sent()
        window.end()
        assert await window.oldest() is None

    asyncio.run(scenario())


def test_an_item_that_was_sent_is_let_go_whatever_its_size():
    async def scenario():
        window = Window(100)
        for item in items(*[0] * 1000):
            await window.put(item)
            window.sent()
        assert len(window.items) == 0

    asyncio.run(scenario())


def test_streams_that_nobody_reads_hold_little(start_server):
    """Each may hold one request of the largest size beside what waits at the door."""
    server = start_server("--transport=grpcio")
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    largest = digits_pb2.ClassifyStreamRequest(request={"pixels": bytes(784 * 4096)})
    left, sent = threading.Event(), []

    def requests():
        for _ in range(14):
            sent.append(1)
            yield largest
        left.wait(60)

    with grpc.insecure_channel(server.address) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        streams = [stub.ClassifyStream(requests(), timeout=60) for _ in range(6)]

        looks = []

        def stands_still():
            looks.append(len(sent))
            return len(looks) > 100 and looks[-1] == looks[-100]

        wait_until(stands_still)
        grown = process.memory_info().rss - before
        for stream in streams:
            stream.cancel()
        left.set()
    assert grown < 150 * 2**20, f"{grown / 2**20:.0f} MiB"
