"""The clients under fault: outages, permanent errors, proxies, forks, other loops, closing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from dataclasses import fields

import grpc
import numpy as np
import pytest

from digits.channel import MAX_ANSWER_BYTES
from digits.client import AsyncDigitClient, ClientStateError, DigitClient, DigitError
from digits.target import is_loopback, proxy_of
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.config import ServerConfig
from service.top.scrape import scrape
from tests.conftest import wait_until

IMAGE = np.zeros((28, 28), np.uint8)
NEVER = (("grpc-retry-pushback-ms", "-1"),)
EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


def blocking(address, images=IMAGE, **options):
    with DigitClient(address, **options) as client:
        return client.classify(images)


def asynchronous(address, images=IMAGE, **options):
    answers = []  # asyncio.run makes a text of what its task returns

    async def ask():
        async with AsyncDigitClient(address, **options) as client:
            answers.append(await client.classify(images))

    asyncio.run(ask())
    return answers[0]


CLIENTS = pytest.mark.parametrize("classify", [blocking, asynchronous])


class Servicer(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Answers, refuses or waits as it is told to."""

    def __init__(self, *, error=None, metadata=(), answers=1, waits=False):
        self.error, self.metadata, self.answers, self.waits = error, metadata, answers, waits
        self.calls = 0
        self.called, self.go_on = threading.Event(), threading.Event()

    def Classify(self, request, context):
        self._begin(context)
        prediction = digits_pb2.Prediction(
            digit=5, confidence=0.5, probabilities=[0.1] * 10, digit_score=0.5
        )
        return digits_pb2.ClassifyResponse(predictions=[prediction] * self.answers)

    def ClassifyStream(self, requests, context):
        self._begin(context)
        for _ in requests:
            error = digits_pb2.StreamError(code=EXHAUSTED.value[0], message="never")
            yield digits_pb2.ClassifyStreamResponse(error=error)

    def _begin(self, context):
        self.calls += 1
        if self.waits:
            context.add_callback(self.go_on.set)
            self.called.set()
            self.go_on.wait(60)
        if self.error:
            context.set_trailing_metadata(self.metadata)
            context.abort(self.error, "not now")


# --- The server is gone -------------------------------------------------------------------------


@contextlib.contextmanager
def hanging_up(connections, greeting=b""):
    """An address at which every connection is greeted and closed; the list gets one item each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with contextlib.suppress(OSError):  # closed
                while True:
                    with listener.accept()[0] as connection:
                        connection.sendall(greeting)
                    connections.append(1)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_reconnecting_does_not_slow_down_with_the_length_of_an_outage():
    """gRPC itself would need a minute for as many attempts, and two for each one later on."""
    connections = []
    with hanging_up(connections) as address, DigitClient(address) as client:

        def reconnected():
            with pytest.raises(DigitError):
                client.classify(IMAGE)
            return len(connections) >= 9

        wait_until(reconnected, timeout_s=30)


def test_asynchronous_client_reconnects_as_often():
    async def ask(address):
        async with AsyncDigitClient(address) as client:
            while len(connections) < 9:
                with pytest.raises(DigitError):
                    await client.classify(IMAGE)

    connections = []
    with hanging_up(connections) as address:
        asyncio.run(asyncio.wait_for(ask(address), 30))


def test_error_says_since_when_the_server_is_not_reachable(serve, tmp_path):
    address = f"unix:{tmp_path}/socket"
    with DigitClient(address) as client:
        errors = []
        for _ in range(2):
            with pytest.raises(
                DigitError, match=r"not reachable since 20\d\d-\d\d-\d\d "
            ) as caught:
                client.classify(IMAGE)
            errors.append(caught.value)
        assert errors[0].unreachable_since == errors[1].unreachable_since
        server = serve(Servicer(), address)
        wait_until(lambda: answers(client))
        server.stop(None).wait()
        with pytest.raises(DigitError) as caught:
            wait_until(lambda: client.classify(IMAGE) is None)
        assert caught.value.unreachable_since > errors[0].unreachable_since


def answers(client):
    with contextlib.suppress(DigitError):
        return client.classify(IMAGE).digits == [5]
    return False


@CLIENTS
def test_server_that_refuses_is_reachable(serve, classify):
    with pytest.raises(DigitError, match=r"UNAVAILABLE: not now$") as caught:
        classify(serve(Servicer(error=UNAVAILABLE)))
    assert caught.value.unreachable_since is None


@CLIENTS
def test_error_says_that_no_http2_is_spoken(classify):
    greeting = b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(64)
    with (
        hanging_up([], greeting) as address,
        pytest.raises(DigitError, match="what listens there does not speak HTTP/2"),
    ):
        classify(address)


# --- Permanent errors ---------------------------------------------------------------------------


@CLIENTS
@pytest.mark.parametrize(
    ("error", "metadata"),
    [
        (EXHAUSTED, ()),
        (EXHAUSTED, NEVER),
        (UNAVAILABLE, NEVER),
        (UNAVAILABLE, (("grpc-retry-pushback-ms", "soon"),)),
        (UNAVAILABLE, (("grpc-retry-pushback-ms", "9" * 5000),)),
    ],
)
def test_permanent_error_is_not_retried(serve, classify, error, metadata):
    servicer = Servicer(error=error, metadata=metadata)
    with pytest.raises(DigitError, match="not now") as caught:
        classify(serve(servicer))
    assert servicer.calls == 1
    assert not caught.value.transient


@CLIENTS
def test_message_over_the_servers_limit_is_sent_once(server, classify):
    many = np.zeros((20_000, 28, 28), np.uint8)
    with pytest.raises(DigitError, match="larger than the server takes: lower req") as caught:
        classify(server.address, many, request_images=20_000)
    assert caught.value.code is EXHAUSTED
    assert not caught.value.transient


@pytest.mark.parametrize("metadata", [(), [("x-note", "x" * 20_000)]], ids=["pixels", "metadata"])
def test_retry_policy_of_grpc_sends_what_is_too_large_once(start_server, metadata):
    """The one of docs/clients.md for other languages; the pushback tells it what is permanent."""
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    name = {"service": "digits.v1.DigitClassifierService"}
    config = json.dumps({"methodConfig": [{"name": [name], "retryPolicy": policy}]})
    server = start_server("--transport=http2", "--max-images-per-request=1")
    images = 1 if metadata else 2000
    # gRPC keeps longer messages than 256 KiB for a retry only if it is told to.
    options = [("grpc.service_config", config), ("grpc.per_rpc_retry_buffer_size", 2**22)]
    with grpc.insecure_channel(server.address, options) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(digits_pb2.ClassifyRequest(pixels=bytes(784 * images)), metadata=metadata)
    assert caught.value.code() is EXHAUSTED

    def handled():
        seen = scrape(f"{server.http}/metrics")
        return seen.value("grpc_server_handled_total", grpc_code="RESOURCE_EXHAUSTED")

    assert wait_until(handled) == 1


def test_item_that_is_refused_for_good_is_answered_in_its_place(serve):
    servicer = Servicer()
    with DigitClient(serve(servicer)) as client:
        refused = list(client.classify_stream([IMAGE] * 3))
    assert [str(error) for error in refused] == ["RESOURCE_EXHAUSTED: never"] * 3
    assert servicer.calls == 1


@CLIENTS
def test_largest_answer_that_a_server_can_be_told_to_give_is_taken(serve, classify):
    settings = {field.name: field.metadata["bounds"] for field in fields(ServerConfig)}
    _, most = settings["max_images_per_request"]
    assert len(classify(serve(Servicer(answers=most))).predictions) == most


@CLIENTS
def test_answer_over_the_clients_limit_is_said_to_be_that(serve, classify):
    servicer = Servicer(answers=MAX_ANSWER_BYTES // 50)
    with pytest.raises(DigitError, match="the answer is larger than a client takes") as caught:
        classify(serve(servicer))
    assert caught.value.code is EXHAUSTED
    assert servicer.calls == 1


# --- Proxies ------------------------------------------------------------------------------------


@pytest.fixture
def proxy(monkeypatch):
    """The environment of a machine with a proxy, which is down."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://anna:secret@127.0.0.1:1")


@CLIENTS
@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}"])
def test_loopback_is_not_proxied(serve, classify, form):
    address = form.format(serve(Servicer()).rpartition(":")[2])
    assert classify(address).digits == [5]


@CLIENTS
@pytest.mark.usefixtures("proxy")
def test_error_names_the_proxy_without_its_credentials(classify):
    with pytest.raises(DigitError) as caught:
        classify("digits.example:50051")
    assert "(digits.example:50051 through proxy http://127.0.0.1:1: " in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize(
    ("address", "no_proxy", "proxied"),
    [
        ("digits.example:1", "", True),
        ("digits.example:1", "other.example", True),
        ("digits.example:1", "other.example, example", False),
        ("digits.example:1", "DIGITS.example", False),
        ("dns:///digits.example:1", ".example", False),
        ("192.0.2.1:1", "192.0.2.0/24", False),
        ("192.0.2.1:1", "198.51.100.0/24", True),
        ("[2001:db8::1]:1", "2001:db8::/32", False),
        ("unix:/run/socket", "", False),
    ],
)
def test_no_proxy_is_read_as_grpc_reads_it(monkeypatch, address, no_proxy, proxied):
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_of(address) == ("http://127.0.0.1:1" if proxied else None)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("0.0.0.0:1", True),
        ("LocalHost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv4:127.0.0.1:1,192.0.2.1:1", False),
        ("localhost.example:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_loopback_is_told_from_the_address(address, loopback):
    assert is_loopback(address) is loopback


# --- Other processes ----------------------------------------------------------------------------

FORKING = """
import asyncio, os, sys
import numpy as np
from digits.client import AsyncDigitClient, ClientStateError, DigitClient

address, image = sys.argv[1], np.zeros((28, 28), np.uint8)


def child(work):
    '''What the work ends with in a forked process: its answer, or the message of its error.'''
    read, write = os.pipe()
    if not os.fork():
        try:
            said = work().digits
        except ClientStateError as error:
            said = error
        os.write(write, str(said).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        return pipe.read()


async def call_async(client):
    async with client:
        return await client.classify(image)


def new_async():
    return asyncio.run(call_async(AsyncDigitClient(address)))


def new():
    with DigitClient(address) as client:
        return client.classify(image)


unused = DigitClient(address)
print(child(lambda: unused.classify(image)))
print(child(new_async))
client = DigitClient(address)
client.classify(image)
print(child(lambda: client.classify(image)))
print(child(new))
client.classify(image)
client.close()
print(child(new))
print(child(new_async))
asynchronous = AsyncDigitClient(address)


async def fork_on_the_loop():
    await asynchronous.classify(image)
    return child(lambda: asyncio.run(call_async(asynchronous)))


print(asyncio.run(fork_on_the_loop()))
print(child(new))
"""


def test_forked_process_works_or_says_at_once_why_not(serve):
    done = subprocess.run(
        [sys.executable, "-c", FORKING, serve(Servicer())],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    forked = "this process was forked from one that used a client, and gRPC does not survive"
    expected = ["[5]"] * 2 + [forked] * 6
    lines = done.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


# --- Closing, loops and cancelling --------------------------------------------------------------


def test_call_after_close_says_so():
    client = DigitClient("127.0.0.1:1")
    client.close()
    client.close()
    with pytest.raises(ClientStateError, match=r"^the client is closed$"):
        client.classify(IMAGE)
    with pytest.raises(ClientStateError, match=r"^the client is closed$"):
        next(client.classify_stream([IMAGE]))


def test_asynchronous_call_after_close_says_so():
    async def ask():
        client = AsyncDigitClient("127.0.0.1:1")
        await client.close()
        with pytest.raises(ClientStateError, match=r"^the client is closed$"):
            await client.classify(IMAGE)
        with pytest.raises(ClientStateError, match=r"^the client is closed$"):
            await anext(client.classify_stream(forever()))

    asyncio.run(ask())


async def forever():
    while True:
        yield IMAGE
        await asyncio.sleep(0)


@pytest.mark.parametrize("images", [IMAGE, np.zeros((10, 28, 28), np.uint8)], ids=["one", "many"])
def test_call_during_which_the_client_is_closed_says_so(serve, images):
    servicer = Servicer(waits=True)
    client = DigitClient(serve(servicer), timeout_s=60, request_images=3)
    raised = []

    def call():
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
def test_closing_the_asynchronous_client_cancels_nobodys_task(serve, call):
    servicer = Servicer(waits=True)
    address = serve(servicer)

    async def ask():
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
def test_task_that_is_cancelled_ends_cancelled_and_so_does_its_call(serve, call):
    servicer = Servicer(waits=True)
    address = serve(servicer)

    async def ask():
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


def test_sequence_that_waits_for_something_cancelled_cancels_not_its_reader(serve):
    address = serve(Servicer())

    async def broken():
        yield IMAGE
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    async def ask():
        async with AsyncDigitClient(address) as client:
            answers = client.classify_stream(broken())
            assert (await anext(answers)).message == "never"
            with pytest.raises(RuntimeError, match="sequence of batches raised CancelledError"):
                await anext(answers)

    asyncio.run(ask())


def test_asynchronous_client_may_be_made_outside_its_loop_and_used_on_one_alone(serve):
    address = serve(Servicer())
    client = AsyncDigitClient(address)

    async def ask():
        return (await client.classify(IMAGE)).digits

    async def close():
        await client.close()

    async def ask_all():
        assert await asyncio.gather(ask(), ask()) == [[5], [5]]
        await asyncio.to_thread(fail_elsewhere)
        assert await ask() == [5]
        await client.close()

    def fail_elsewhere():
        for misuse in (ask, close):
            with pytest.raises(ClientStateError, match="used on another event loop"):
                asyncio.run(misuse())

    asyncio.run(ask_all())
    fail_elsewhere()
