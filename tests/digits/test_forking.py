"""Clients in processes that fork."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.digits.faults import (
    Servicer,
)

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


def test_forked_process_works_or_says_at_once_why_not(serve: Callable[..., Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, serve(Servicer())],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    forked = "this process was forked from one that used a client, and gRPC does not survive"
    expected = ["[5]"] * 2 + [forked] * 6
    lines = done.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
