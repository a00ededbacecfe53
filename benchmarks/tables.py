"""``python -m benchmarks.tables``: the table of docs/performance.md, from the committed results.

``--check`` writes nothing and fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.figures import Figure
from benchmarks.results import Result

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"
RENEW = "python -m benchmarks.tables"


def updated(document: str, committed: dict[str, Result]) -> str:
    """The document with the tables of these results between its pair of comments."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected {BEGIN.strip()} and {END} in the document")
    tables = [table(name, result) for name, result in committed.items()]
    return f"{before}{begin}{''.join(tables)}{end}{after}"


def table(name: str, result: Result) -> str:
    """One run."""
    rows = [
        f"### {name}",
        "",
        caption(result),
        "",
        "| figure | to reach | measured | made of |",
        "|---|---|---|---|",
        *(_row(figure) for figure in result.figures),
    ]
    return "\n".join(rows) + "\n\n"


def caption(result: Result) -> str:
    """What a table was measured on."""
    machine = result.machine
    vnni = "with VNNI" if machine["vnni"] else "without VNNI"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {vnni}; {versions}; model {result.model}; "
        f"{result.date}, commit {result.source}; medians of {result.rounds} rounds, "
        f"scale {result.scale:g}; the range of the rounds in brackets."
    )


def _row(figure: Figure) -> str:
    sign = "≥" if figure.at_least else "≤"
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    value = f"{_number(figure.value)} {figure.unit}".rstrip()
    if len(figure.rounds) > 1:
        value += f" ({_number(min(figure.rounds))} to {_number(max(figure.rounds))})"
    missed = "" if figure.met else ", missed"
    details = ", ".join(f"{key} {_number(each)}" for key, each in figure.details.items())
    return f"| {figure.name} | {target} | {value}{missed} | {details.replace('_', ' ')} |"


def _number(value: float) -> str:
    """Three digits, and no exponent for large ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(argv: list[str]) -> int:
    """Renews or checks the document."""
    parser = argparse.ArgumentParser(prog=RENEW, description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the document would change")
    check = parser.parse_args(argv).check
    document = DOCUMENT.read_text()
    renewed = updated(document, results.all_committed())
    if check and document != renewed:
        print(f"{DOCUMENT.name} is not what the results say; run: {RENEW}", file=sys.stderr)
        return 1
    if not check:
        DOCUMENT.write_text(renewed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
