"""Lengths of headers that take more than one byte to encode."""

from __future__ import annotations

import hpack
import pytest

from service.http2.headers import encode_field


@pytest.mark.parametrize("length", [126, 127, 128, 254, 255, 256, 20_000])
def test_value_of_any_length_is_what_another_implementation_reads(length: int) -> None:
    block = encode_field(b"x-long", b"v" * length) + encode_field(b"x-next", b"1")
    decoded = hpack.Decoder(2**20).decode(block, raw=True)
    found = [(bytes(name), bytes(value)) for name, value in decoded]
    assert found == [(b"x-long", b"v" * length), (b"x-next", b"1")]
