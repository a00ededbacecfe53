"""Header blocks that are looked up are those that would have been decoded."""

from __future__ import annotations

from typing import Any

import hpack
from hypothesis import given, settings
from hypothesis import strategies as st

from service.http2.headers import MAX_KNOWN_BLOCKS, HeaderDecoder, encode_field

FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b"x-a", b"x-b", b"grpc-timeout", b"authorization"]),
        st.sampled_from([b"1", b"2", b"long" * 20, b""]),
    ),
    max_size=5,
)
PSEUDO = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C")]


@given(st.lists(st.tuples(FIELDS, st.sampled_from([None, 0, 64, 4096])), max_size=15))
@settings(max_examples=200, deadline=None)
def test_looked_up_block_is_what_decoding_gives(requests: Any) -> None:
    """Whatever the encoder does to the dynamic table in between."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(2**16)
    for fields, table_size in requests:
        if table_size is not None:
            encoder.header_table_size = table_size
        head = decoder.head(encoder.encode([*PSEUDO, *fields]))
        assert head.fields == fields


def test_same_block_is_the_same_object() -> None:
    decoder = HeaderDecoder(2**16)
    block = b"".join(encode_field(*field) for field in PSEUDO)
    assert decoder.head(block) is decoder.head(block)


def test_change_of_the_table_forgets_what_was_looked_up() -> None:
    """The same bytes mean another header then: index 62 is the newest entry."""
    decoder = HeaderDecoder(2**16)
    pseudo = b"".join(encode_field(*field) for field in PSEUDO)
    add = b"\x40" + encode_field(b"x-a", b"old")[1:]
    newest = b"\xbe"
    decoder.head(pseudo + add)
    assert decoder.head(pseudo + newest).fields == [(b"x-a", b"old")]
    assert decoder.head(pseudo + newest).fields == [(b"x-a", b"old")]
    decoder.head(pseudo + b"\x40" + encode_field(b"x-a", b"new")[1:])
    assert decoder.head(pseudo + newest).fields == [(b"x-a", b"new")]


def test_number_of_blocks_that_are_remembered_is_bounded() -> None:
    decoder = HeaderDecoder(2**16)
    pseudo = b"".join(encode_field(*field) for field in PSEUDO)
    for number in range(1000):
        decoder.head(pseudo + encode_field(b"x-n", str(number).encode()))
    assert len(decoder._known) <= MAX_KNOWN_BLOCKS


def test_headers_that_take_much_memory_are_not_remembered() -> None:
    """One byte of a block may stand for four kilobytes of a header."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(2**16)
    fields = [*PSEUDO, (b"x-big", b"v" * 3000)]
    decoder.head(encoder.encode(fields))
    again = encoder.encode(fields)
    assert len(again) < 100
    assert decoder.head(again).fields == decoder.head(again).fields == fields[3:]
    assert not decoder._known


@given(
    st.lists(st.tuples(st.from_regex(rb"[a-z-]{1,20}", fullmatch=True), st.binary(max_size=300)))
)
@settings(max_examples=100, deadline=None)
def test_what_is_encoded_another_implementation_reads(fields: Any) -> None:
    block = b"".join(encode_field(*field) for field in fields)
    decoded = hpack.Decoder(2**20).decode(block, raw=True)
    assert [(bytes(name), bytes(value)) for name, value in decoded] == fields
