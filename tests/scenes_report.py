"""Makes the table of scenes in docs/images.md: ``python -m tests.scenes_report --count 50``."""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import SCENES, scenes_table
from digits.images import examine_grey, grey_of
from tests import scenes
from tests.judge import judge
from training.data import Split, data_dir, load_split

# See docs/images.md: scores for most uses, and for callers who take nothing but sure digits.
LIKELY, SURE = 0.37, 0.87


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="as for training (or DIGITS_DATA)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--commit", action="store_true", help=f"write {SCENES}, of the docs")
    arguments = parser.parse_args()
    split = load_split("mnist", "test", data_dir(arguments.data_dir))
    result = measure(split, arguments.count, arguments.seed)
    print(scenes_table(result), end="")
    if arguments.commit:
        SCENES.write_text(json.dumps(result, indent=1) + "\n")


def measure(split: Split, count: int, seed: int) -> dict[str, Any]:
    """The share that is right of each scene, with thick and with thin strokes, and false alarms."""
    right = {name: [_right(split, name, thin, count, seed) for thin in (False, True)]
             for name in scenes.SCENES}  # fmt: skip
    rng = np.random.default_rng(seed)
    files = [scenes.without_digit(rng) for _ in range(4 * count)]
    scores = [judge(examine_grey(grey_of(file), judge))[1] for file in files]
    passed = {str(t): float(np.mean([s >= t for s in scores])) for t in (LIKELY, SURE)}
    return {"count": count, "right": right, "empty": len(files), "passed": passed}


def _right(split: Split, name: str, thin: bool, count: int, seed: int) -> float:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), thin])
    right = 0
    for number, place in enumerate(rng.choice(len(split.labels), count, replace=False).tolist()):
        label = number % 10 if thin else int(split.labels[place])
        ink = scenes.thin(label, rng) if thin else scenes.thick(split.images[place].numpy(), rng)
        photo = scenes.photo(scenes.SCENES[name], ink, rng)
        right += judge(examine_grey(grey_of(photo), judge))[0] == label
    return right / count


if __name__ == "__main__":
    main()
