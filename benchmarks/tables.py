"""``python -m benchmarks.tables``: figures in docs/performance.md and README.md, from the results.

``--check`` writes nothing and fails if one of them is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.figures import Figure
from benchmarks.results import Result

ROOT = Path(__file__).parents[1]
# What README.md shows, by key.
HEADLINES = (
    "mosec_singles",
    "mosec_bulk",
    "singles_limit",
    "bulk_limit",
    "overhead",
    "tls",
    "start",
)
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"
RENEW = "python -m benchmarks.tables"


def updated(document: str, content: str) -> str:
    """The document with this between its pair of comments."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected {BEGIN.strip()} and {END} in the document")
    return f"{before}{begin}{content}{end}{after}"


def tables(committed: dict[str, Result]) -> str:
    """Every figure of every run."""
    return "".join(table(name, result) for name, result in committed.items())


def headlines(committed: dict[str, Result]) -> str:
    """Some figures, a column for each run."""
    columns = [{figure.key: figure for figure in result.figures} for result in committed.values()]
    rows = [f"| figure | {' | '.join(committed)} |", "|---|" + "---|" * len(committed)]
    for key in HEADLINES:
        found = [column[key] for column in columns if key in column]
        if found:
            values = [_value(column[key]) if key in column else "" for column in columns]
            rows.append(f"| {found[0].name} | {' | '.join(values)} |")
    return "\n".join(rows) + "\n"


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
    value = _value(figure)
    if len(figure.rounds) > 1:
        value += f" ({_number(min(figure.rounds))} to {_number(max(figure.rounds))})"
    missed = "" if figure.met else ", missed"
    details = ", ".join(f"{key} {_number(each)}" for key, each in figure.details.items())
    return f"| {figure.name} | {target} | {value}{missed} | {details.replace('_', ' ')} |"


def _value(figure: Figure) -> str:
    return f"{_number(figure.value)} {figure.unit}".rstrip()


def _number(value: float) -> str:
    """Three digits, and no exponent for large ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


PAGES = {ROOT / "docs/performance.md": tables, ROOT / "README.md": headlines}


def main(argv: list[str]) -> int:
    """Renews or checks the documents."""
    parser = argparse.ArgumentParser(prog=RENEW, description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a document would change")
    check = parser.parse_args(argv).check
    behind = 0
    for page, made in PAGES.items():
        document = page.read_text()
        renewed = updated(document, made(results.all_committed()))
        if check and document != renewed:
            print(f"{page.name} is not what the results say; run: {RENEW}", file=sys.stderr)
            behind = 1
        if not check:
            page.write_text(renewed)
    return behind


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
