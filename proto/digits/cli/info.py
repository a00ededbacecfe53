"""``digits info``: what a server serves."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from digits.cli.flags import CALL_ERRORS, add_connection_flags, connect, explained, printable
from digits.client import Model

EPILOG = """\
exit status:
  0  the server answered
  1  it could not be asked
  2  misused
"""


def info(argv: list[str]) -> int:
    """Prints the model in service and where it came from; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="digits info",
        description="Tells which model a server serves, and where it came from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the whole manifest")
    add_connection_flags(parser)
    arguments = parser.parse_args(argv)
    try:
        with connect(arguments) as client:
            model, manifest = client.get_model()
    except ValueError as error:
        parser.error(str(error))
    except CALL_ERRORS as error:
        print(f"digits info: {explained(error)}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"model": vars(model), "manifest": manifest}, indent=2))
    else:
        rows = _essentials(model, manifest)
        width = max(len(title) for title, _ in rows)
        print("\n".join(f"{title:<{width}}  {printable(text)}" for title, text in rows))
    return 0


def _essentials(model: Model, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    variant, training = manifest["variants"][model.precision], manifest["training"]
    accuracy = variant["accuracy"]
    low, high = accuracy["accuracy_ci95"]
    measured = f"{accuracy['accuracy']:.2%} of {accuracy['images']:,} test images"
    return [
        ("model", f"{model.name}/{model.version}"),
        ("labels", " ".join(manifest["labels"])),
        ("precision", model.precision),
        ("provider", model.execution_provider),
        ("sha256", model.sha256),
        ("accuracy", f"{measured}, 95 % interval {low:.2%} to {high:.2%}"),
        ("network", f"{training['architecture']}, {training['parameters']:,} parameters"),
        ("trained on", manifest["dataset"]["name"]),
        ("parity", f"{len(variant['parity'])} checks passed"),
        ("created", manifest["created"]),
        ("commit", manifest["source_commit"]),
    ]
