"""``digits tune``: which slots, threads and batch size serve best on this machine's quota."""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.artifact import ArtifactError, load_artifact
from service.batcher import Batcher
from service.config import ServerConfig
from service.cpu import cpu_quota
from service.engine import Engine
from service.job import Batch, Job
from service.repository import in_serving_order
from service.wire import IMAGE_BYTES, encode_predictions

BATCH_SIZES = (16, 32, 64, 128, 256)
# Images in a job and jobs in flight: the two loads that a setting has to serve alike.
LOADS = {"single images": (1, 64), "64 images": (64, 8)}
# Of settings this close to the best, the one with the smallest batches answers soonest.
AS_GOOD = 0.97


@dataclass(frozen=True)
class Row:
    """One setting and what it reached.

    Attributes:
        instances: Inferences at the same time.
        threads: Threads inside one.
        batch: Images in a batch at most.
        rates: Images per second under each load.
    """

    instances: int
    threads: int
    batch: int
    rates: dict[str, float]

    @property
    def score(self) -> float:
        """Geometric mean of the rates."""
        return math.prod(self.rates.values()) ** (1 / len(self.rates))


def tune(argv: list[str]) -> int:
    """Measures every setting, prints the table, writes the best as an env file."""
    defaults = ServerConfig()
    parser = argparse.ArgumentParser(prog="digits tune", description=__doc__)
    parser.add_argument("--model-repository", type=Path, default=Path(defaults.model_repository))
    parser.add_argument("--seconds", type=float, default=0.3, help="per setting, load and round")
    parser.add_argument("--rounds", type=int, default=3, help="each setting's median counts")
    parser.add_argument("--out", type=Path, default=Path("digits.env"))
    arguments = parser.parse_args(argv)
    try:
        folder = next(iter(in_serving_order(arguments.model_repository)), None)
        if folder is None:
            raise ArtifactError(f"{arguments.model_repository}: no version to tune for")
        model = load_artifact(folder).model
    except ArtifactError as error:
        print(f"digits tune: {error}", file=sys.stderr)
        return 1
    settings = [(i, t, b) for i, t in splits(cpu_quota()) for b in BATCH_SIZES]
    rows = sweep(model, settings, arguments.rounds, arguments.seconds)
    chosen = choose(rows)
    _print_table(rows, chosen)
    arguments.out.write_text(env_file(chosen))
    print(f"wrote {arguments.out}: digits serve --env-file {arguments.out}")
    return 0


def splits(quota: int) -> list[tuple[int, int]]:
    """Ways to divide a quota of CPUs into instances and threads, all of it or one CPU less."""
    ways = {(quota // threads, threads) for threads in range(1, quota + 1)}
    ways.add((max(1, quota - 1), 1))  # leaves a CPU to the transport
    return sorted(ways, key=lambda way: (way[1], -way[0]))


def sweep(
    model: bytes, settings: list[tuple[int, int, int]], rounds: int, seconds: float
) -> list[Row]:
    """Measures settings in turn, round after round, so that drift of the machine meets all."""
    engines = {t: Engine(model, intra_op_threads=t) for t in {t for _, t, _ in settings}}
    measured: dict[tuple[int, int, int], dict[str, list[float]]] = {
        setting: {load: [] for load in LOADS} for setting in settings
    }
    for _ in range(rounds):
        for (instances, threads, batch), rates in measured.items():
            for load, (images, in_flight) in LOADS.items():
                rate = measure(
                    engines[threads],
                    instances=instances,
                    batch=batch,
                    images=images,
                    in_flight=in_flight,
                    seconds=seconds,
                )
                rates[load].append(rate)
    return [
        Row(*setting, {load: float(np.median(values)) for load, values in rates.items()})
        for setting, rates in measured.items()
    ]


def measure(
    engine: Engine, *, instances: int, batch: int, images: int, in_flight: int, seconds: float
) -> float:
    """Images per second through a real batcher, with ``in_flight`` jobs that follow each other."""
    pixels = memoryview(np.random.default_rng(0).bytes(images * IMAGE_BYTES))
    answered: list[int] = []  # appended to from several threads
    ended = threading.Event()

    def run(images: bytes | memoryview, count: int) -> tuple[bytes, None]:
        stacked = np.frombuffer(images, np.uint8).reshape(count, 28, 28)
        return encode_predictions(engine.run(stacked)), None

    def complete(finished: Batch) -> None:
        answered.append(sum(job.count for job in finished.finished))
        if not ended.is_set():
            batcher.submit([Job(pixels, images, None) for _ in finished.finished])

    batcher = Batcher(
        run, complete, image_bytes=IMAGE_BYTES, slots=instances, max_batch_size=batch,
        max_queue_images=images * in_flight,
    )  # fmt: skip
    batcher.tune(engine.warm_up(batch))
    batcher.start()
    began = time.perf_counter()
    batcher.submit([Job(pixels, images, None) for _ in range(in_flight)])
    ended.wait(seconds)
    rate = sum(answered) / (time.perf_counter() - began)
    ended.set()
    batcher.stop(grace_s=10.0)
    return rate


def choose(rows: list[Row]) -> Row:
    """The smallest batch among the settings that are as good as the best."""
    best = max(row.score for row in rows)
    good = [row for row in rows if row.score >= AS_GOOD * best]
    return min(good, key=lambda row: (row.batch, -row.score))


def env_file(row: Row) -> str:
    """Variables that ``digits serve --env-file`` reads."""
    return (
        f"DIGITS_INSTANCES={row.instances}\n"
        f"DIGITS_INTRA_OP_THREADS={row.threads}\n"
        f"DIGITS_MAX_BATCH_SIZE={row.batch}\n"
    )


def _print_table(rows: list[Row], chosen: Row) -> None:
    names = "".join(f"{load + ', images/s':>26}" for load in LOADS)
    print(f"{'instances':>9}{'threads':>9}{'batch':>7}{names}{'of the best':>13}")
    best = max(row.score for row in rows)
    for row in rows:
        rates = "".join(f"{rate:>26,.0f}" for rate in row.rates.values())
        setting = f"{row.instances:>9}{row.threads:>9}{row.batch:>7}"
        mark = "  <- chosen" if row is chosen else ""
        print(f"{setting}{rates}{row.score / best:>13.2f}{mark}")
