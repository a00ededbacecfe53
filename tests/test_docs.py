"""Tests, files, links and anchors that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *(ROOT / f"{folder}/README.md" for folder in ("deploy", "proto", "tests/samples/hand")),
]
# A test with what -k picks of it; SECURITY.md and others may leave out the first folder.
TEST = re.compile(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)(?: -k (\"[^\"]+\"|\w+))?")
FILE = re.compile(
    r"`((?:service|export|training|proto|benchmarks|deploy|tests|docs)/[\w./-]+\.\w+)[`: ]"
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    titles = HEADING.findall(document.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_files_and_links_in_a_document_exist(document: Any) -> None:
    text = document.read_text()
    missing = []
    for name, chosen in TEST.findall(text):
        path = ROOT / "tests" / name
        source = path.read_text() if path.exists() else ""
        words = re.sub(r'"|\bor\b', " ", chosen).split()
        if not source or any(word not in source for word in words):
            missing.append(f"{name} {chosen}")
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    for target, anchor in LINK.findall(text):
        page = document.parent / target if target else document
        if not page.exists() or (anchor and anchor not in anchors(page)):
            missing.append(f"{target}#{anchor}")
    assert not missing
