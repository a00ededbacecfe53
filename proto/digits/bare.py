"""Strips a PNG or JPEG file down to its pixels, and reads its orientation.

Exif, texts, colour profiles, thumbnails and further pictures change no pixel. Read in full, a few
megabytes of them take gigabytes or minutes: each of thousands of Exif tags may claim all the bytes
of the block.
"""

from __future__ import annotations

import struct

from digits.formats import PictureError

PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# Source: PNG 1.2, section 4.1, and the transparency of 4.2.1.
PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# Every chunk is read in Python, and the smallest has 12 bytes. Encoders write a data chunk for
# 8 KiB or more, so the largest picture that is taken has fewer than this.
MAX_CHUNKS = 2**14
# Markers of JPEG: application data of Exif; all application data and comments but JFIF's and
# Adobe's, which say what the colours are; those without a length. Source: ITU-T T.81, table B.1.
EXIF = 0xE1
LEFT_OUT = {EXIF, 0xFE, *range(0xE2, 0xEE), 0xEF}
LENGTHLESS = {0x01, *range(0xD0, 0xDA)}
START_OF_SCAN = 0xDA
EXIF_HEADER = b"Exif\0\0"
# Source: Exif 2.32, tag 0x0112: how the stored picture must be turned to be upright.
ORIENTATION = 0x0112


def bare(data: bytes) -> tuple[bytes, bytes]:
    """The file without metadata, and its Exif.

    Raises:
        PictureError: If a PNG is made of too many chunks.
    """
    if data.startswith(PNG_SIGNATURE):
        return _bare_png(data)
    if data.startswith(JPEG_SIGNATURE):
        return _bare_jpeg(data)
    return data, b""


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [PNG_SIGNATURE], b""
    position = len(PNG_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in PNG_PICTURE:
            kept.append(data[position:end])
        elif kind == b"eXIf":
            exif = exif or data[position + 8 : end - 4]
        if kind == b"IEND" or end >= len(data):
            return b"".join(kept), exif
        position = end
    raise PictureError(f"a PNG of at most {MAX_CHUNKS:,} chunks", "more")


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Headers are found as Pillow finds them, which passes over what is between two."""
    kept, exif = [JPEG_SIGNATURE], b""
    position = len(JPEG_SIGNATURE)
    while (position := data.find(b"\xff", position)) >= 0:
        marker = data[position + 1 : position + 2]
        kind = marker[0] if marker else START_OF_SCAN
        if kind == START_OF_SCAN:  # whatever follows is no header
            kept.append(data[position:])
            break
        if kind == 0xFF:  # padding
            position += 1
            continue
        end = position + 2
        if kind and kind not in LENGTHLESS:
            end += max(2, int.from_bytes(data[end : end + 2], "big"))
            if kind not in LEFT_OUT:
                kept.append(data[position:end])
            elif kind == EXIF and data.startswith(EXIF_HEADER, position + 4):
                exif = exif or data[position + 4 : end]
        position = end
    return b"".join(kept), exif


def orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in the first directory of Exif; 1 if it is missing or damaged."""
    tiff = exif.removeprefix(EXIF_HEADER)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}4xI", tiff)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(f"{order}H6xH", tiff, place)
            if tag == ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1
