"""Makes the image's environment smaller: takes away what the server never opens.

Run by the environment's own Python while the image is built, after the last install. It uses the
standard library alone: the base image has no ``strip``, and the build takes only locked wheels.
"""

from __future__ import annotations

import shutil
import struct
import sysconfig
from pathlib import Path

# Paths in site-packages. One that matches nothing ends the build: what it stood for may be in the
# image again, in another place.
UNUSED = (
    # The engine once more, for programs in other languages. Python's extension links all of it in.
    "onnxruntime/capi/libonnxruntime.so.*",
    # What prepares models; the server only runs them.
    *("onnxruntime/backend", "onnxruntime/datasets", "onnxruntime/quantization"),
    *("onnxruntime/tools", "onnxruntime/transformers", "numpy/f2py"),
    # Pillow's AVIF, and its fonts: the server reads PNG, JPEG, WebP and BMP, and writes no text.
    *("PIL/_avif.*", "PIL/_imagingft.*", "pillow.libs/libavif-*", "pillow.libs/libbrotli*"),
    *("pillow.libs/libfreetype-*", "pillow.libs/libharfbuzz-*", "pillow.libs/libpng16-*"),
    # Packages' own tests, and what only compilers and type checkers read.
    *("**/tests", "**/*.pyi", "**/*.pyx", "**/*.pxd", "**/*.c", "**/*.h"),
)
ELF_64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"


def slim(folder: Path) -> None:
    """Removes what is unused and cuts every shared library.

    Args:
        folder: The environment's site-packages.

    Raises:
        FileNotFoundError: If one of the patterns matches nothing.
    """
    for pattern in UNUSED:
        found = list(folder.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{folder}: nothing matches {pattern}")
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for library in folder.rglob("*.so*"):
        cut(library)


def cut(library: Path) -> None:
    """Cuts off what follows the last segment of a shared library: symbols and debugging data.

    The dynamic loader goes by segments alone, and what it maps stays as it is, byte for byte.

    Source: System V ABI, ELF header and program header.
    """
    with library.open("r+b") as file:
        header = file.read(64)
        if not header.startswith(ELF_64_LITTLE_ENDIAN):
            return
        (table,) = struct.unpack_from("<Q", header, 32)
        entry_size, entries = struct.unpack_from("<HH", header, 54)
        end = table + entry_size * entries
        for number in range(entries):
            file.seek(table + entry_size * number)
            offset, _, _, size = struct.unpack("<8x4Q", file.read(40))
            end = max(end, offset + size)
        file.truncate(end)
        # The table of sections was behind it: its place, the size of an entry, how many there are,
        # and which of them holds their names.
        file.seek(40)
        file.write(bytes(8))
        file.seek(58)
        file.write(bytes(6))


if __name__ == "__main__":
    slim(Path(sysconfig.get_path("platlib")))
