"""``digits classify``: asks a server about pictures."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from digits.client import DigitClient, DigitError, Progress, progress_bar
from service.connection import CALL_ERRORS, add_connection_flags, connect, explained
from service.outcomes import Failure, Outcome, outcomes
from service.pictures import STDIN, Item, PicturesError, Watched, items_of
from service.printing import Printer, printer

# More pictures than this are drawn only when asked for.
FEW = 4
EPILOG = """\
exit status:
  0  every picture was classified
  1  a picture could not be read or was refused, or the server could not be asked
  2  misused
"""


def classify_files(argv: list[str]) -> int:
    """Prints a prediction for each picture; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if bool(arguments.files) == bool(arguments.watch):
        got = "both" if arguments.files else "neither"
        parser.error(f"expected FILE ... or --watch DIR, got {got}")
    if arguments.files.count(STDIN) > 1:
        parser.error("-: expected once, got it again")
    try:
        with connect(arguments) as client:
            if arguments.watch:
                return _watch(client, arguments)
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
        description="Classifies pictures of one digit each, and images of MNIST's idx files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="PNG, JPEG, WebP, BMP, idx or idx.gz; a folder of pictures; a pattern such as "
        "'scans/**/*.png'; or - for standard input",
    )
    parser.add_argument(
        "--watch", metavar="DIR", help="classify pictures that appear in DIR until Ctrl-C"
    )
    parser.add_argument(
        "--interval-s", type=float, default=0.5, metavar="S", help="between looks (default 0.5)"
    )
    form = parser.add_mutually_exclusive_group()
    for name, text in (
        ("json", "print JSON; with --watch an object a line"),
        ("csv", "print CSV"),
    ):
        form.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, default="table", help=text
        )
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help=f"draw in the table what the network saw (default: of {FEW} pictures at most)",
    )
    add_connection_flags(parser)
    return parser


def _classify(client: DigitClient, arguments: argparse.Namespace) -> int:
    items = items_of(arguments.files)
    output = printer(arguments.form, items, pictures=_drawn(arguments, len(items)), endless=False)
    failures = 0
    with _progress(arguments.form, len(items)) as progress:
        for outcome in outcomes(client, items):
            failures += _print(outcome, output)
            progress(1)
    output.end()
    return 1 if failures else 0


def _watch(client: DigitClient, arguments: argparse.Namespace) -> int:
    """Until Ctrl-C, which is how it ends well."""
    if not 0.05 <= arguments.interval_s <= 3600:
        raise ValueError(f"--interval-s: expected 0.05 to 3600, got {arguments.interval_s:g}")
    watched = Watched(Path(arguments.watch))
    output = printer(arguments.form, [], pictures=_drawn(arguments, 0), endless=True)
    print(f"digits classify: watching {arguments.watch}, Ctrl-C ends it", file=sys.stderr)
    try:
        while True:
            time.sleep(arguments.interval_s)
            for path in watched.ready():
                try:
                    for outcome in outcomes(client, [Item(str(path), path)]):
                        _print(outcome, output)
                except DigitError as error:  # not about this file: the next look tries again
                    _failed(error)
                    break
                watched.done(path)
    except KeyboardInterrupt:
        output.end()
        return 0


def _progress(form: str, pictures: int) -> AbstractContextManager[Progress]:
    """A bar, unless there is little to wait for, or the rows on the terminal tell as much."""
    if pictures <= FEW or (sys.stdout.isatty() and form != "json"):
        return nullcontext(lambda _: None)
    return progress_bar(pictures, what="pictures")


def _drawn(arguments: argparse.Namespace, pictures: int) -> bool:
    """Whether a table of so many pictures shows them."""
    has_pillow = find_spec("PIL") is not None
    if arguments.pictures and not has_pillow:
        raise PicturesError("--pictures: Pillow is not installed: pip install pillow")
    if arguments.pictures is None:
        return has_pillow and pictures <= FEW
    return bool(arguments.pictures)


def _print(outcome: Outcome, output: Printer) -> bool:
    """Prints one outcome; whether it is a failure."""
    if isinstance(outcome, Failure):
        print(f"digits classify: {outcome.item.name}: {outcome.reason}", file=sys.stderr)
        return True
    output.row(outcome.item, outcome.prediction, outcome.model)
    return False


def _failed(error: Exception) -> int:
    print(f"digits classify: {explained(error)}", file=sys.stderr)
    return 1
