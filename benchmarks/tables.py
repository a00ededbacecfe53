"""``python -m benchmarks.tables``: tables of the documents, from committed results.

``--check`` writes nothing and fails if one of them is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
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


def presentations_table(result: dict[str, Any]) -> str:
    """Digits as files of all kinds."""
    raw = f"{result['raw']:.2%}"
    rows = [
        f"The first {result['limit']:,} test digits; of the raw pixels {raw} are right.",
        "",
        "| presentation | right | points to raw pixels |",
        "|---|---|---|",
    ]
    for name, share in result["right"].items():
        rows.append(f"| {name} | {share:.2%} | {100 * (share - result['raw']):+.2f} |")
    rows += ["", "| digits from elsewhere | number | right |", "|---|---|---|"]
    for name, (number, share) in result["other_digits"].items():
        rows.append(f"| {name} | {number:,} | {share:.2%} |")
    return "\n".join(rows) + "\n"


def others_table(result: dict[str, Any]) -> str:
    """What is no digit, by thresholds that keep most digits."""
    pairs = zip(result["kept"], result["thresholds"], strict=True)
    limits = [f"{share:.1%} of digits kept, from {limit:.3f}" for share, limit in pairs]
    rows = [f"| pictures | AUROC | {' | '.join(limits)} |", "|---|---|" + "---|" * len(limits)]
    for name, shares in result["passing"].items():
        auroc = f"{result['auroc'][name]:.3f}" if name in result["auroc"] else ""
        rows.append(f"| {name} | {auroc} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(rows) + "\n"


def scenes_table(result: dict[str, Any]) -> str:
    """Pictures as people take them."""
    empty = f"{result['empty']} scenes without a digit {result['passed']:.1%}"
    rows = [
        f"{result['count']} pictures of each. Of {empty} have a score of {result['sure']} or more.",
        "",
        "| scene | thick | thin |",
        "|---|---|---|",
        *(
            f"| {name} | {thick:.0%} | {thin:.0%} |"
            for name, (thick, thin) in result["right"].items()
        ),
    ]
    return "\n".join(rows) + "\n"


def networks_table(result: dict[str, Any]) -> str:
    """Networks that were compared."""
    from training.compare import markdown  # noqa: PLC0415 - PyTorch is slow to load

    return markdown(result["rows"]) + "\n"


def pages() -> dict[Path, dict[str, str]]:
    """What stands between which comments of which document."""
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
