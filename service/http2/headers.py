"""Header blocks: decoded by ``hpack`` and validated, or looked up where the same bytes came before.

Callers repeat themselves: nearly every request of a connection has a block whose bytes were seen.
As long as the dynamic table has not changed since, equal bytes mean equal headers.
"""

from __future__ import annotations

import re
from typing import Any

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

from service.http2.frames import ErrorCode, Http2Error

# Blocks that are remembered on one connection, and what each may expand to: a bound on memory that
# a caller takes by its headers alone, and more than callers that repeat themselves need.
MAX_KNOWN_BLOCKS = 16
MAX_KNOWN_BYTES = 2048
# The size of an entry is that of its name and value, and this. Source: RFC 7541, section 4.1.
ENTRY_BYTES = 32

PSEUDO_HEADERS = frozenset({b":method", b":scheme", b":path", b":authority"})
# Source: RFC 9113, section 8.2.2.
CONNECTION_HEADERS = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
# Source: RFC 9110, section 5.6.2, without upper case (RFC 9113, section 8.2.1).
NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
# What a value may not hold (RFC 9113, section 8.2.1).
BAD_VALUE = re.compile(rb"[\x00\r\n]|\A[ \t]|[ \t]\Z")

Fields = list[tuple[bytes, bytes]]


class Head:
    """A request's headers, shared by every request with the same block.

    Attributes:
        method: ``:method``.
        path: ``:path``.
        fields: Headers other than pseudo-headers, in order, as bytes; empty once ``info`` is there.
        content_length: As the caller said it, or None.
        size: As HTTP/2 counts a header list: 32 bytes more than name and value of each.
        malformed: Why the request is malformed; empty if it is not.
        info: Whatever the layer above derives from it once.
    """

    __slots__ = ("content_length", "fields", "info", "malformed", "method", "path", "size")

    def __init__(self, fields: Fields) -> None:
        self.fields = [field for field in fields if not field[0].startswith(b":")]
        self.size = sum([len(name) + len(value) + ENTRY_BYTES for name, value in fields])
        self.info: Any = None
        self.method = self.path = b""
        self.content_length: int | None = None
        self.malformed = _problem(fields) or self._read(fields)

    def _read(self, fields: Fields) -> str:
        """Takes what is needed from valid fields; what is missing or contradicts itself."""
        pseudo = {name: value for name, value in fields if name.startswith(b":")}
        self.method = pseudo.get(b":method", b"")
        self.path = pseudo.get(b":path", b"")
        if not self.method:
            return "no :method"
        if self.method != b"CONNECT" and not (self.path and pseudo.get(b":scheme")):
            return "no :path or no :scheme"
        lengths = {value for name, value in self.fields if name == b"content-length"}
        if lengths:
            (length,) = lengths if len(lengths) == 1 else (b"",)
            # int() would take signs, spaces and underscores, too.
            if not (length.isdigit() and len(length) < 20):
                return "content-length is not one number"
            self.content_length = int(length)
        return ""


def _problem(fields: Fields) -> str:
    """What makes a request's header list malformed; empty for nothing. Source: section 8."""
    seen: set[bytes] = set()
    regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if regular:
                return "a pseudo-header after a header"
            if name not in PSEUDO_HEADERS or name in seen:
                return "a pseudo-header that is unknown or comes twice"
            seen.add(name)
        else:
            regular = True
            if problem := field_problem(name, value):
                return problem
        if BAD_VALUE.search(value):
            return "a value with a control character, or space at one of its ends"
    return ""


def field_problem(name: bytes, value: bytes) -> str:
    """Why a field may not stand in a request or in its trailers; empty if it may."""
    if not NAME.fullmatch(name):
        return "a name that is no lower-case token"
    if name in CONNECTION_HEADERS or (name == b"te" and value.lower() != b"trailers"):
        return "a header that belongs to a connection of HTTP/1.1"
    return ""


def trailers_problem(fields: Fields) -> str:
    """What makes a trailer section malformed; empty for nothing."""
    for name, value in fields:
        if problem := field_problem(name, value):
            return problem
        if BAD_VALUE.search(value):
            return "a value with a control character, or space at one of its ends"
    return ""


class _CountingTable(HeaderTable):
    """The decoder's table, which tells when it has changed."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, newmax: int) -> None:
        self.changes += newmax != self._maxsize
        HeaderTable.maxsize.fset(self, newmax)  # type: ignore[attr-defined]


class HeaderDecoder:
    """Decodes the header blocks of one connection, all of them and in order.

    Args:
        max_list_bytes: A longer header list ends the connection: the rest of it can not be skipped
            without expanding it. Counted as HTTP/2 does.

    Attributes:
        decoded: Fields so far: each of them takes time.
    """

    def __init__(self, max_list_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=max_list_bytes)
        self._table = _CountingTable()
        self._decoder.header_table = self._table
        self._known: dict[bytes, Head] = {}
        self.decoded = 0

    def head(self, block: bytes) -> Head:
        """The request headers in a block.

        Raises:
            Http2Error: If the block can not be decoded, or expands beyond the limit.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        changes = self._table.changes
        head = Head(self.fields(block))
        if self._table.changes != changes or len(self._known) >= MAX_KNOWN_BLOCKS:
            self._known.clear()
        if self._table.changes == changes and head.size <= MAX_KNOWN_BYTES:
            self._known[block] = head
        return head

    def fields(self, block: bytes) -> Fields:
        """The fields of any block; see ``head`` for what it raises."""
        changes = self._table.changes
        try:
            fields = [(bytes(name), bytes(value)) for name, value in self._decode(block)]
        except OversizedHeaderListError as error:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, str(error)) from None
        except (HPACKError, ValueError, IndexError) as error:
            message = f"a header block that can not be decoded: {error}"
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, message) from None
        if self._table.changes != changes:
            self._known.clear()
        self.decoded += len(fields)
        return fields

    def _decode(self, block: bytes) -> Any:
        return self._decoder.decode(block, raw=True)


def encode_field(name: bytes, value: bytes) -> bytes:
    """A literal field that no table remembers: the peer's decoder needs no state for it."""
    return b"".join((b"\x00", _length(name), name, _length(value), value))


def _length(text: bytes) -> bytes:
    """The length of a string that is not Huffman-coded. Source: RFC 7541, section 5.1."""
    length = len(text)
    if length < 127:
        return bytes((length,))
    encoded, rest = bytearray((127,)), length - 127
    while rest >= 128:
        encoded.append(rest & 127 | 128)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)
