"""``python -m benchmarks.tables``: tables of the documents, from committed results.

``--check`` writes nothing and fails if one of them is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
# What tests.presentations_report, tests.scenes_report and python -m training compare wrote.
RESULTS = ROOT / "docs/results"
PRESENTATIONS, SCENES = RESULTS / "presentations.json", RESULTS / "scenes.json"
NETWORKS = RESULTS / "comparison.json"
RENEW = "python -m benchmarks.tables"


def filled_in(document: str, blocks: dict[str, str]) -> str:
    """The document with each text between its pair of comments.

    Raises:
        ValueError: If one has no such pair.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = document.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"expected {begin.strip()} and {end} in the document")
        document = f"{before}{begin}{content}{end}{after}"
    return document


def tables(committed: dict[str, Result]) -> str:
    """Every figure of every run."""
    return "".join(table(name, result) for name, result in committed.items())


def headlines(committed: dict[str, Result]) -> str:
    """Some figures, a column for each run."""
    columns = [{figure.key: figure for figure in result.figures} for result in committed.values()]
    rows = []
    for key in HEADLINES:
        found = [column[key] for column in columns if key in column]
        if found:
            values = [_value(column[key]) if key in column else "" for column in columns]
            rows.append([found[0].name, *values])
    return _table(["figure", *committed], rows)


def table(name: str, result: Result) -> str:
    """One run."""
    rows = _table(["figure", "to reach", "measured", "made of"], map(_row, result.figures))
    return f"### {name}\n\n{caption(result)}\n\n{rows}\n"


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


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [" | ".join(cells) for cells in (columns, *rows)]
    return f"| {lines[0]} |\n|{'---|' * len(columns)}\n" + "".join(f"| {r} |\n" for r in lines[1:])


def _row(figure: Figure) -> list[str]:
    sign = "≥" if figure.at_least else "≤"
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    value = _value(figure)
    if len(figure.rounds) > 1:
        value += f" ({_number(min(figure.rounds))} to {_number(max(figure.rounds))})"
    missed = "" if figure.met else ", missed"
    details = ", ".join(f"{key} {_number(each)}" for key, each in figure.details.items())
    return [figure.name, target, value + missed, details.replace("_", " ")]


def _value(figure: Figure) -> str:
    return f"{_number(figure.value)} {figure.unit}".rstrip()


def _number(value: float) -> str:
    """Three digits, and no exponent for large ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def presentations_table(result: dict[str, Any]) -> str:
    """Accuracy of digits as files of all kinds."""
    raw = result["raw"]
    rows = [[n, f"{r:.2%}", f"{100 * (r - raw):+.2f}"] for n, r in result["right"].items()]
    others = [[n, f"{count:,}", f"{r:.2%}"] for n, (count, r) in result["other_digits"].items()]
    return (
        f"The first {result['limit']:,} test digits; of the raw pixels {raw:.2%} are right.\n\n"
        + _table(["presentation", "right", "points to raw pixels"], rows)
        + "\n"
        + _table(["digits from elsewhere", "number", "right"], others)
    )


def others_table(result: dict[str, Any]) -> str:
    """Pictures without a digit, by thresholds of the score that keep most digits."""
    pairs = zip(result["kept"], result["thresholds"], strict=True)
    limits = [f"{share:.1%} of digits kept, from {limit:.3f}" for share, limit in pairs]
    rows = []
    for name, shares in result["passing"].items():
        auroc = f"{result['auroc'][name]:.3f}" if name in result["auroc"] else ""
        rows.append([name, auroc, *(f"{share:.1%}" for share in shares)])
    return _table(["pictures", "AUROC", *limits], rows)


def scenes_table(result: dict[str, Any]) -> str:
    """Accuracy of pictures as people take them."""
    passed = ", ".join(f"{r:.1%} have a score of {t} or more" for t, r in result["passed"].items())
    rows = [[n, f"{thick:.0%}", f"{thin:.0%}"] for n, (thick, thin) in result["right"].items()]
    return (
        f"{result['count']} pictures of each. Of {result['empty']} scenes without a digit "
        f"{passed}.\n\n{_table(['scene', 'thick', 'thin'], rows)}"
    )


def networks_table(result: dict[str, Any]) -> str:
    """Accuracy and cost of networks."""
    from training.compare import markdown  # noqa: PLC0415 - PyTorch is slow to load

    return markdown(result["rows"]) + "\n"


def pages() -> dict[Path, dict[str, str]]:
    """Each document's generated text, by the name of the comments around it."""
    presentations, scenes, networks = (
        json.loads(path.read_text()) for path in (PRESENTATIONS, SCENES, NETWORKS)
    )
    committed = results.all_committed()
    return {
        ROOT / "docs/performance.md": {"results": tables(committed)},
        ROOT / "README.md": {"results": headlines(committed)},
        ROOT / "docs/training.md": {"networks": networks_table(networks)},
        ROOT / "docs/images.md": {
            "presentations": presentations_table(presentations),
            "scenes": scenes_table(scenes),
            "others": others_table(presentations),
        },
    }


def main(argv: list[str]) -> int:
    """Renews or checks the documents."""
    parser = argparse.ArgumentParser(prog=RENEW, description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a document would change")
    check = parser.parse_args(argv).check
    behind = 0
    for page, blocks in pages().items():
        document = page.read_text()
        renewed = filled_in(document, blocks)
        if check and document != renewed:
            print(f"{page.name} is not what the results say; run: {RENEW}", file=sys.stderr)
            behind = 1
        if not check:
            page.write_text(renewed)
    return behind


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
