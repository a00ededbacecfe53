"""``make fuzz``: a million hostile inputs, coverage-guided in-process and over real sockets.

What is found is kept under ``.fuzz/``; ``--replay TARGET FILE`` runs such an input again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.calls import ClassifyRequests
from tests.fuzz.sockets import SOCKET_TARGETS, fuzzed_server
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import FLAT_BYTES, GOLDEN_EVERY, Watch, growth, read_record

FOUND = Path(".fuzz")
RESULT = Path("runs/fuzz.json")
# Of the inputs, by what an input costs and how much there is to go wrong.
SHARES = {
    "wire": 0.1, "http2": 0.3, "classify": 0.1, "stream": 0.1, "images": 0.15, "artifact": 0.08,
    "config": 0.04, "model": 0.01,
    **{f"{name}-{transport}": share for transport in ("http2", "grpcio")
       for name, share in (("connections", 0.03), ("messages", 0.028), ("http", 0.002))},
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Fuzzes, prints a table, stores the JSON. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(SHARES))
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all targets")
    parser.add_argument("--minutes", type=float, default=60, help="at most, over all targets")
    parser.add_argument("--seed", type=int, default=1, help="of what goes over sockets")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input")
    arguments = parser.parse_args(argv)
    if arguments.replay:
        return replay(*arguments.replay)
    unknown = set(arguments.targets) - SHARES.keys()
    if unknown:
        parser.error(f"expected some of {', '.join(SHARES)}, got {', '.join(sorted(unknown))}")
    chosen = {name: SHARES[name] for name in arguments.targets or SHARES}
    rows: list[dict[str, Any]] = []
    ended = time.monotonic() + arguments.minutes * 60
    for name, share in chosen.items():
        part = share / sum(chosen.values())
        inputs = GOLDEN_EVERY * max(1, round(arguments.inputs * part / GOLDEN_EVERY))
        seconds = (ended - time.monotonic()) / (len(chosen) - len(rows))
        rows.append(fuzz(name, inputs, seconds, arguments.seed))
        print(row(rows[-1]), flush=True)
    total = sum(result["inputs"] for result in rows)
    found = [result["target"] for result in rows if result["finding"]]
    print(f"\n{total:,} inputs; found something in: {', '.join(found) or 'none'}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"inputs": total, "targets": rows}, indent=2) + "\n")
    return 1 if found else 0


def fuzz(name: str, inputs: int, seconds: float, seed: int) -> dict[str, Any]:
    """One target's run, as a row of the table."""
    began = time.monotonic()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        folder = Path(scratch)
        run = guided if name in TARGETS else over_sockets
        finding = run(name, folder, inputs, seconds, seed)
        done, rss = read_record(folder / "record.jsonl")
        for kept in folder.glob("found-*"):
            FOUND.mkdir(exist_ok=True)
            shutil.copy(kept, FOUND / f"{name}-{kept.name}")
    if growth(rss) > FLAT_BYTES:
        finding = finding or f"memory grew by {growth(rss) >> 20} MiB"
    return {
        "target": name,
        "inputs": done,
        "seconds": round(time.monotonic() - began, 1),
        "rss_mib": rss[-1] >> 20 if rss else 0,
        "growth_mib": growth(rss) / 2**20,
        "finding": finding,
    }


def guided(name: str, folder: Path, inputs: int, seconds: float, seed: int) -> str:
    """A target in a process of its own; what was found, or nothing."""
    flags = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}"]
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(folder), str(inputs), *flags]
    child = subprocess.run(command, capture_output=True, check=False)
    return child.stderr.decode(errors="replace")[-3000:] if child.returncode else ""


def over_sockets(name: str, folder: Path, inputs: int, seconds: float, seed: int) -> str:
    """A target on a server of its own; what was found, or nothing."""
    kind, _, transport = name.partition("-")
    rng, ended = random.Random(seed), time.monotonic() + seconds
    oracle = ClassifyRequests(folder)
    try:
        with fuzzed_server(transport, folder) as server:
            target = SOCKET_TARGETS[kind](server, oracle)
            watch = Watch(target.check_golden, folder / "record.jsonl", server.process.pid)
            while watch.inputs < inputs and time.monotonic() < ended:
                target.run(rng)
                watch.count(target.at_once)
            target.close()
    except Exception:  # whatever it is, it is a finding
        return traceback.format_exc()[-3000:]
    return ""


def replay(name: str, file: str) -> int:
    """Runs one input against an in-process target; what it raises tells what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        TARGETS[name](Path(folder)).run(Path(file).read_bytes())
    return 0


def row(result: dict[str, Any]) -> str:
    """One line of the table, and what was found below it."""
    rate = result["inputs"] / result["seconds"]
    line = (
        f"{result['target']:<20}{result['inputs']:>9,} inputs {rate:>7,.0f}/s  "
        f"RSS {result['rss_mib']:>4} MiB, {result['growth_mib']:+.1f}"
    )
    return f"{line}\nFOUND: {result['finding']}" if result["finding"] else line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
