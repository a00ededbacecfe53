"""What one stream may hold."""

from __future__ import annotations

import asyncio
import threading

import grpc

from digits.v1 import digits_pb2, digits_pb2_grpc
from service.stream import STREAM_WINDOW, StreamItem, Window
from service.transports.grpcio import Mailbox
from tests.conftest import wait_until
from tests.service.test_rpc import scrape


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


def test_stream_of_large_requests_that_nobody_reads_is_taken_a_little_at_a_time(start_server):
    """One request beside what waits at the door, not as many as there are places in the window."""
    server = start_server("--transport=grpcio")
    # Without these the client itself would take megabytes of answers that nobody asked it for.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    largest = digits_pb2.ClassifyStreamRequest(request={"pixels": bytes(784 * 4096)})
    left, sent = threading.Event(), []

    def requests():
        for _ in range(30):
            sent.append(1)
            yield largest
        left.wait(60)

    looks = []

    def stands_still():
        looks.append(len(sent))
        return len(looks) > 200 and looks[-1] == looks[-200]

    with grpc.insecure_channel(server.address, options=narrow) as channel:
        stream = digits_pb2_grpc.DigitClassifierServiceStub(channel).ClassifyStream(
            requests(), timeout=60
        )
        wait_until(stands_still)
        # How many wait at the door depends on the kernel's buffers; how many were let in does not.
        metrics = scrape(server)
        stream.cancel()
        left.set()
    refused = metrics.get('digits_requests_dropped_total{reason="queue_full"}', 0)
    assert 1 <= metrics["digits_batch_size_sum"] / 4096 + refused < STREAM_WINDOW / 2
