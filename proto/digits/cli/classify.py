"""``digits classify``: asks a server about pictures."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from digits.cli.flags import CALL_ERRORS, add_connection_flags, connect, explained, printable
from digits.cli.outcomes import Answer, outcomes
from digits.cli.output import JsonPrinter, Printer, TablePrinter
from digits.cli.sources import STDIN, PicturesError, items_of, listed
from digits.client import DigitClient, Progress, progress_bar

# More pictures than this are drawn only when asked for.
FEW = 4
# What that needs: modules, and what installs them.
DRAWING = {"PIL": "pillow", "cv2": "opencv-python-headless"}
EPILOG = """\
exit status:
  0  every picture was classified
  1  a picture could not be read or was refused, such as for its size or format (the others are
     classified); or the server could not be asked
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
    items, passed_over = items_of(arguments.files)
    if passed_over:
        files = f"{passed_over.total()} passed over (by name no PNG, JPEG, WebP or BMP)"
        _complain(f"{files}: {listed(passed_over)}")
    output: Printer = JsonPrinter(passed_over)
    if not arguments.json:
        pictures = _drawn(arguments, len(items))
        output = TablePrinter(items, lambda: client.get_model()[1]["labels"], pictures=pictures)
    failures = 0
    with _progress(len(items), told=sys.stdout.isatty() and not arguments.json) as progress:
        for outcome in outcomes(client, items):
            if isinstance(outcome, Answer):
                output.row(outcome)
            else:
                failures += 1
                output.failure(outcome)
                _complain(f"{outcome.item.name}: {outcome.reason}")
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
    missing = [name for module, name in DRAWING.items() if find_spec(module) is None]
    if arguments.pictures and missing:
        names = " ".join(missing)
        raise PicturesError(f"--pictures: expected {names}, not installed: pip install {names}")
    if arguments.pictures is None:
        return not missing and pictures <= FEW
    return bool(arguments.pictures)


def _failed(error: Exception) -> int:
    _complain(explained(error))
    return 1


def _complain(text: str) -> None:
    print(printable(f"digits classify: {text}"), file=sys.stderr)
