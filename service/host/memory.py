"""Memory that the C library keeps although nobody uses it any more."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# glibc's; other C libraries have neither.
_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
_info: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(None), "mallinfo2", None)

# A storm of large requests, or of calls that never come whole, leaves more than this behind.
KEPT_BYTES = 32 * 2**20
PERIOD_S = 10.0


class _Mallinfo2(ctypes.Structure):
    """Source: malloc.h of glibc 2.33."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    )


if _info is not None:
    _info.restype = _Mallinfo2


def give_back() -> None:
    """Returns to the system what the allocator holds and nobody uses.

    A model that is loaded amid traffic leaves holes between what the traffic allocated; left alone
    they add up with every change of the model. Takes milliseconds, or a tenth of a second where
    hundreds of megabytes are free, without the GIL; does nothing where the C library is not glibc.
    Source: man 3 malloc_trim.
    """
    if _trim is not None:
        _trim(0)


def free_bytes() -> int:
    """Bytes that the allocator holds and nobody uses; 0 where the C library does not tell."""
    return 0 if _info is None else int(_info().fordblks)


async def watch() -> None:
    """Gives memory back when much of it is free, until cancelled.

    What a caller made the server hold is then gone when the caller is, from the memory of the
    process, too.
    """
    while True:
        await asyncio.sleep(PERIOD_S)
        if free_bytes() > KEPT_BYTES:
            await asyncio.to_thread(give_back)
