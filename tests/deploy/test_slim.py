"""deploy/slim.py takes away symbols and unused files, and nothing that a program runs on."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import struct
import sys
from pathlib import Path

import pytest

from tests.deploy.conftest import DEPLOY

SPEC = importlib.util.spec_from_file_location("slim", DEPLOY / "slim.py")
slim = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(slim)
LOAD = 1  # the kind of segment that is mapped


@pytest.fixture
def library(tmp_path):
    """aiohttp's parser, most of which is debugging data."""
    if sys.platform != "linux":
        pytest.skip("ELF is Linux's")
    parser = pytest.importorskip("aiohttp._http_parser")
    return shutil.copy(parser.__file__, tmp_path / "parser.so")


def loaded(path):
    """The bytes of every segment that the dynamic loader maps."""
    content = path.read_bytes()
    (table,) = struct.unpack_from("<Q", content, 32)
    size, entries = struct.unpack_from("<HH", content, 54)
    headers = struct.iter_unpack("<IIQQQQQQ", content[table : table + size * entries])
    # Without the file's header, which is in the first one, and in which sections are counted.
    return [content[max(h[2], 64) : h[2] + h[5]] for h in headers if h[0] == LOAD]


def test_cut_library_is_smaller_and_its_segments_are_the_same(library):
    size, before = library.stat().st_size, loaded(library)
    slim.cut(library)
    assert library.stat().st_size < size / 2
    assert loaded(library) == before
    assert ctypes.CDLL(str(library)).PyInit__http_parser


def test_second_cut_changes_nothing(library):
    slim.cut(library)
    once = library.read_bytes()
    slim.cut(library)
    assert library.read_bytes() == once


def test_what_is_no_library_is_left_alone(tmp_path):
    script = tmp_path / "linker.so"
    script.write_text("INPUT(libm.so.6)")
    slim.cut(script)
    assert script.read_text() == "INPUT(libm.so.6)"


@pytest.fixture
def packages(tmp_path):
    """A folder in which every pattern matches a file."""
    for pattern in slim.UNUSED:
        path = tmp_path / pattern.replace("**", "package").replace("*", "any")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "package/kept.py").write_text("")
    return tmp_path


def test_unused_files_and_folders_go_and_others_stay(packages):
    (packages / "numpy/f2py").unlink()
    (packages / "numpy/f2py/tests").mkdir(parents=True)
    slim.slim(packages)
    assert [path for path in packages.rglob("*") if path.is_file()] == [
        packages / "package/kept.py"
    ]


def test_pattern_that_matches_nothing_ends_the_build(packages):
    """A newer version of a package has moved what it meant."""
    (gone,) = Path(packages, "onnxruntime/capi").iterdir()
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="libonnxruntime"):
        slim.slim(packages)
