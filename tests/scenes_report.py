"""Makes the table of scenes in docs/images.md: ``python -m tests.scenes_report --count 25``."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np

from digits.images import examine_grey, grey_of
from tests import scenes
from tests.judge import judge
from training.data import data_dir, load_split

# See docs/images.md: a score for callers who must not take anything else for a digit.
SURE = 0.87


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="as for training (or DIGITS_DATA)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    split = load_split("mnist", "test", data_dir(arguments.data_dir))
    print("| scene | thick | thin |\n|---|---|---|")
    for name, scene in scenes.SCENES.items():
        shares = []
        for thin in (False, True):
            rng = np.random.default_rng([arguments.seed, zlib.crc32(name.encode()), thin])
            places = rng.choice(len(split.labels), arguments.count, replace=False).tolist()
            right = 0
            for number, place in enumerate(places):
                label = number % 10 if thin else int(split.labels[place])
                ink = scenes.thin(label, rng) if thin else None
                ink = scenes.thick(split.images[place].numpy(), rng) if ink is None else ink
                grey = grey_of(scenes.photo(scene, ink, rng))
                right += judge(examine_grey(grey, judge))[0] == label
            shares.append(f"{right / arguments.count:.0%}")
        print(f"| {name} | {' | '.join(shares)} |", flush=True)
    rng = np.random.default_rng(arguments.seed)
    files = [scenes.without_digit(rng) for _ in range(4 * arguments.count)]
    scores = [judge(examine_grey(grey_of(file), judge))[1] for file in files]
    passed = np.mean([score >= SURE for score in scores])
    print(f"\n{passed:.0%} of {len(files)} scenes without a digit have a score of {SURE} or more")


if __name__ == "__main__":
    main()
