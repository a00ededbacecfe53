"""``digits classify``: asks a server about pictures."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from digits.cli.flags import CALL_ERRORS, add_connection_flags, connect, explained, printable
from digits.cli.outcomes import Failure, Outcome, outcomes
from digits.cli.output import JsonPrinter, Printer, TablePrinter
from digits.cli.sources import STDIN, PicturesError, items_of
from digits.client import DigitClient, Progress, progress_bar

# More pictures than this are drawn only when asked for.
FEW = 4
EPILOG = """\
exit status:
  0  every picture was classified
  1  a picture could not be read or was refused, or the server could not be asked
  2  misused
"""


def classify(argv: list[str]) -> int:
    """Prints a prediction for each picture; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.files.count(STDIN) > 1:
        parser.error("-: expected once, got it again")
    try:
        with connect(arguments) as client:
            return _classify(client, arguments)
    except BrokenPipeError:  # of standard output, not of a call
        raise
    except PicturesError as error:
        return _failed(error)
    except ValueError as error:
        parser.error(str(error))
    except CALL_ERRORS as error:
        return _failed(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="digits classify",
        description="Classifies pictures of one digit each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="PNG, JPEG, WebP or BMP; a folder of them; a pattern such as 'scans/**/*.png'; or - "
        "for standard input",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help=f"draw in the table what the network saw (default: of {FEW} pictures at most)",
    )
    add_connection_flags(parser)
    return parser


def _classify(client: DigitClient, arguments: argparse.Namespace) -> int:
    items = items_of(arguments.files)
    pictures = _drawn(arguments, len(items))
    output: Printer = JsonPrinter()
    if not arguments.json:
        output = TablePrinter(items, lambda: client.get_model()[1]["labels"], pictures=pictures)
    failures = 0
    with _progress(len(items), told=sys.stdout.isatty() and not arguments.json) as progress:
        for outcome in outcomes(client, items):
            failures += _print(outcome, output)
            progress(1)
    output.end()
    return 1 if failures else 0


def _progress(pictures: int, *, told: bool) -> AbstractContextManager[Progress]:
    """A bar, unless there is little to wait for, or rows on the terminal have told as much."""
    if pictures <= FEW or told:
        return nullcontext(lambda _: None)
    return progress_bar(pictures, what="pictures")


def _drawn(arguments: argparse.Namespace, pictures: int) -> bool:
    """True if a table of this many pictures draws them."""
    has_pillow = find_spec("PIL") is not None
    if arguments.pictures and not has_pillow:
        raise PicturesError("--pictures: Pillow is not installed: pip install pillow")
    if arguments.pictures is None:
        return has_pillow and pictures <= FEW
    return bool(arguments.pictures)


def _print(outcome: Outcome, output: Printer) -> bool:
    """Prints one outcome; whether it is a failure."""
    if isinstance(outcome, Failure):
        print(printable(f"digits classify: {outcome.item.name}: {outcome.reason}"), file=sys.stderr)
        return True
    output.row(outcome.item, outcome.prediction, outcome.model)
    return False


def _failed(error: Exception) -> int:
    print(f"digits classify: {explained(error)}", file=sys.stderr)
    return 1
