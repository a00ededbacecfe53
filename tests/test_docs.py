"""Tests, files and links that the documents name exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

DOCUMENTS = [
    ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "deploy/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
# Tests are named with or without their first folder; files of the tree from its root.
TEST = re.compile(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)")
FILE = re.compile(
    r"`((?:service|export|training|proto|benchmarks|deploy|tests|docs)/[\w./-]+\.\w+)[`: ]"
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_files_and_links_in_a_document_exist(document):
    text = document.read_text()
    tests = [ROOT / "tests" / name for name in TEST.findall(text)]
    files = [ROOT / name for name in FILE.findall(text) if "/test_" not in name]
    links = [document.parent / target for target in LINK.findall(text)]
    missing = [str(path) for path in (*tests, *files, *links) if not path.exists()]
    assert not missing
