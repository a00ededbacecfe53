"""``digits top``: a live view of a running server in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from digits.cli.flags import CALL_ERRORS, add_connection_flags, connect, explained
from digits.client import DigitClient, DigitError
from service.top.scrape import Change, Scrape, ScrapeError, scrape

# Methods whose calls each are one request.
INFERENCE_METHODS = ("Classify", "ModelInfer")
DEFAULT_URL = "http://127.0.0.1:8080/metrics"
SPARKS = "▁▂▃▄▅▆▇█"
HISTORY = 24
# Rows for sizes of batches, and columns of the longest bar.
BATCH_ROWS, BAR_COLUMNS = 8, 24
GOOD, BAD, DIM = "green", "bold red", "dim"


def top(argv: list[str]) -> int:
    """Shows a server until q or Ctrl-C; returns 0, 1 if it could not be read, 2 if misused."""
    parser = argparse.ArgumentParser(
        prog="digits top",
        description="Shows what a running server does: rates, latency, batches. q quits.",
    )
    parser.add_argument(
        "--metrics", default=DEFAULT_URL, help=f"URL of /metrics (default {DEFAULT_URL})"
    )
    parser.add_argument(
        "--interval-s", type=float, default=1.0, help="seconds between updates (default 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one view and exit")
    add_connection_flags(parser, timeout_s=2.0)
    arguments = parser.parse_args(argv)
    if not 0.1 <= arguments.interval_s <= 3600:
        parser.error(f"--interval-s: expected 0.1 to 3600, got {arguments.interval_s:g}")
    try:
        with connect(arguments) as client:
            _run(View(arguments.metrics, client), arguments)
    except BrokenPipeError:  # of standard output, not of a call
        raise
    except ValueError as error:
        parser.error(str(error))
    except (ScrapeError, *CALL_ERRORS) as error:
        print(f"digits top: {explained(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _run(view: View, arguments: argparse.Namespace) -> None:
    console = Console()
    if arguments.once or not (console.is_terminal and sys.stdin.isatty()):
        view.read()
        time.sleep(arguments.interval_s)
        view.read()
        with console.capture() as captured:
            console.print(view.render())
        print(captured.get(), end="")  # rich has its own way of ending where nobody reads
    else:
        _show(view, console, arguments.interval_s)


def _show(view: View, console: Console, interval_s: float) -> None:
    view.read()  # a wrong URL is reported before the screen is cleared
    with _keys(), Live(view.render(), console=console, screen=True, auto_refresh=False) as live:
        while not _quit_pressed(interval_s):
            with contextlib.suppress(ScrapeError):  # the view says so, and may recover
                view.read()
            live.update(view.render(), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Lets single keys be read without echo."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quit_pressed(wait_s: float) -> bool:
    give_up = time.monotonic() + wait_s
    while select.select([sys.stdin], [], [], max(0.0, give_up - time.monotonic()))[0]:
        if sys.stdin.read(1) in ("q", "Q", ""):
            return True
    return False


class View:
    """What is known of a server, drawn for a terminal.

    Args:
        url: Its /metrics.
        client: For GetModel.
    """

    def __init__(self, url: str, client: DigitClient) -> None:
        self._url = url
        self._client = client
        self._scrapes: deque[Scrape] = deque(maxlen=2)
        self._calls: deque[float] = deque(maxlen=HISTORY)
        self._model = ""
        self._asked_about = ""
        self._problem = ""

    def read(self) -> None:
        """Takes one more reading.

        Raises:
            ScrapeError: If the server can not be read.
        """
        try:
            reading = scrape(self._url)
        except ScrapeError as error:
            self._problem = str(error)
            raise
        self._problem = ""
        self._scrapes.append(reading)
        if len(self._scrapes) == 2:
            self._calls.append(Change(*self._scrapes).rate("grpc_server_handled_total"))
        sha256 = reading.labels("digits_model_info").get("sha256", "")
        if sha256 != self._asked_about:
            self._asked_about, self._model = sha256, _described_model(self._client)

    def render(self) -> RenderableType:
        """The whole view, for 80 columns and 24 rows."""
        after = self._scrapes[-1]
        change = Change(self._scrapes[0], after)
        parts: list[RenderableType] = [self._head(after)]
        beside = Table.grid(expand=True)
        beside.add_column(ratio=1)
        beside.add_column(ratio=1)
        beside.add_row(self._rates(change, after), _latencies(change))
        beside.add_row(_batches(change), _process(change, after))
        parts.append(beside)
        return Group(*parts)

    def _head(self, after: Scrape) -> RenderableType:
        info = after.labels("digits_model_info")
        transport = after.labels("digits_transport_info").get("transport", "?")
        uptime = time.time() - after.value("process_start_time_seconds")
        if self._problem:
            state = Text(f"UNREACHABLE  {self._problem}", BAD)
        elif not info:
            state = Text("NOT SERVING", BAD)
        elif after.value("digits_engine_stalled"):
            state = Text("ENGINE STALLED", BAD)
        else:
            state = Text("SERVING", GOOD)
        up = f"  up {_duration(uptime)}  "
        first = Text.assemble(("digits top  ", "bold"), state, up, (self._url, DIM))
        precision, provider = info.get("precision", ""), info.get("provider", "?")
        second = Text(f"{self._model} {precision} on {provider}, {transport}", DIM)
        for line in (first, second):
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(first, second)

    def _rates(self, change: Change, after: Scrape) -> Panel:
        table = _table("", "")
        methods = change.rates("grpc_server_handled_total", "grpc_method", grpc_type="unary")
        for method in INFERENCE_METHODS:
            table.add_row(f"{method}/s", _number(methods.pop(method, 0.0)))
        table.add_row("other calls/s", _number(sum(methods.values())))
        table.add_row("images/s", _number(change.rate("digits_images_total")))
        table.add_row("images waiting", _number(after.value("digits_queue_images")))
        for title, kind in (("calls in flight", "unary"), ("streams open", "bidi_stream")):
            begun = after.value("grpc_server_started_total", grpc_type=kind)
            ended = after.value("grpc_server_handled_total", grpc_type=kind)
            table.add_row(title, _number(begun - ended))
        table.add_row("calls/s", Text(_sparkline(self._calls), "cyan"))
        return Panel(table, title="rates", height=10)


def _latencies(change: Change) -> Panel:
    table = _table("", "p50", "p99", "mean")
    for title, name, labels in (
        *(
            (method, "grpc_server_handling_seconds", {"grpc_method": method})
            for method in INFERENCE_METHODS
        ),
        ("queue", "digits_queue_seconds", {}),
        ("inference", "digits_inference_seconds", {}),
    ):
        values = (
            change.quantile(0.5, name, **labels),
            change.quantile(0.99, name, **labels),
            change.mean(name, **labels),
        )
        table.add_row(title, *map(_seconds, values))
    codes = change.rates("grpc_server_handled_total", "grpc_code")
    failed = {code: rate for code, rate in codes.items() if rate and code != "OK"}
    said = "  ".join(
        f"{code} {_number(rate)}/s" for code, rate in sorted(failed.items(), key=lambda x: -x[1])
    )
    line = Text(said or "every call ended with OK", BAD if said else GOOD)
    return Panel(Group(table, Text(), line), title="latency and failures", height=10)


def _batches(change: Change) -> Panel:
    mean = change.mean("digits_batch_size")
    buckets = [(bound, count) for bound, count in change.buckets("digits_batch_size") if count]
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    most = max((count for _, count in buckets), default=1.0)
    for bound, count in _fitted(buckets):
        bar = "█" * max(1, round(count / most * BAR_COLUMNS))
        table.add_row(f"to {bound:g}", Text(bar, "cyan"), _number(count / change.seconds))
    title = "no batches" if mean is None else f"images per batch: {mean:.1f} on average"
    return Panel(table, title=title, height=BATCH_ROWS + 2)


def _fitted(buckets: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """As many buckets as there are rows: the smallest ones become one."""
    spare = len(buckets) - BATCH_ROWS
    if spare <= 0:
        return list(buckets)
    merged = sum(count for _, count in buckets[: spare + 1])
    return [(buckets[spare][0], merged), *buckets[spare + 1 :]]


def _process(change: Change, after: Scrape) -> Panel:
    cpu = change.rate("process_cpu_seconds_total")
    images = change.rate("digits_images_total")
    table = _table("", "")
    table.add_row("CPU", f"{cpu:.2f} cores")
    table.add_row("CPU per image", _seconds(cpu / images if images else None))
    table.add_row("memory", f"{after.value('process_resident_memory_bytes') / 2**20:.0f} MiB")
    table.add_row("open files", _number(after.value("process_open_fds")))
    checks = after.by_label("digits_golden_checks_total", "result")
    loads = after.by_label("digits_model_loads_total", "result")
    for title, failed, total in (
        ("golden checks failed", checks.get("failed", 0), sum(checks.values())),
        ("releases rejected", loads.get("refused", 0), sum(loads.values())),
    ):
        table.add_row(title, Text(f"{failed:.0f} of {total:.0f}", BAD if failed else ""))
    return Panel(table, title="process", height=BATCH_ROWS + 2)


def _described_model(client: DigitClient) -> str:
    """Name, version and accuracy; what is wrong if the server can not be asked."""
    try:
        model, manifest = client.get_model()
    except DigitError as error:
        return f"GetModel at {error.address}: {error.code.name},"
    accuracy = manifest["variants"][model.precision]["accuracy"]["accuracy"]
    return f"{model.name}/{model.version} (accuracy {accuracy:.2%})"


def _table(first: str, *rest: str) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        collapse_padding=True,  # room for the longest name beside three times
        expand=True,
        header_style=DIM,
        show_header=any(rest),
    )
    table.add_column(first)
    for title in rest:
        table.add_column(title, justify="right")
    return table


def _sparkline(values: Sequence[float]) -> str:
    most = max(values, default=0.0) or 1.0
    return "".join(SPARKS[round(value / most * (len(SPARKS) - 1))] for value in values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _duration(seconds: float) -> str:
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
