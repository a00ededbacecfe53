"""The tables of the documents are made of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.figures import Figure

RESULT = results.Result(
    date="2026-01-31",
    source="abc1234",
    model="digits version 6, int8",
    machine={"cpu": "a CPU", "cores": 2, "vnni": False, "versions": {"python": "3.11.2"}},
    rounds=3,
    scale=1.0,
    figures=[
        Figure("rate", "rate, of the limit", [0.5, 0.6, 0.7], 0.65, details={"calls_per_s": 1234}),
        Figure("start", "start", [0.25], at_least=False, unit="s"),
    ],
)


def test_documents_are_what_the_committed_results_say() -> None:
    assert tables.main(["--check"]) == 0


def test_table_tells_the_cpu_the_range_of_rounds_and_what_was_missed() -> None:
    text = tables.table("2-cores-no-vnni", RESULT)
    assert "2 cores of a CPU, without VNNI" in text
    row = "| rate, of the limit | ≥ 0.65 | 0.6 (0.5 to 0.7), missed | calls per s 1,234 |"
    assert row in text
    assert "| start |  | 0.25 s |  |" in text


def test_headlines_have_a_column_for_each_run() -> None:
    text = tables.headlines({"2-cores-vnni": RESULT, "2-cores-no-vnni": RESULT})
    head, _, *rows = text.splitlines()
    assert head == "| figure | 2-cores-vnni | 2-cores-no-vnni |"
    assert rows == ["| start | 0.25 s | 0.25 s |"]


def test_document_that_is_behind_is_renewed_and_the_check_fails_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    blocks = {"results": tables.table("2-cores-no-vnni", RESULT)}
    monkeypatch.setattr(tables, "pages", lambda: {document: blocks})
    assert tables.main(["--check"]) == 1
    assert "run: python -m benchmarks.tables" in capsys.readouterr().err
    assert "old" in document.read_text()
    assert tables.main([]) == tables.main(["--check"]) == 0
    assert document.read_text().startswith("before\n<!-- results -->\n### 2-cores-no-vnni")
    assert document.read_text().endswith("<!-- end of results -->\nafter\n")


def test_document_without_a_place_for_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="expected <!-- results -->"):
        tables.filled_in("no comments", {"results": ""})
