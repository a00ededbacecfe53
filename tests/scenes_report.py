"""Makes the table of scenes in docs/images.md: ``python -m tests.scenes_report --count 25``."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np

from digits.images import Normalised, examine_grey, grey_of
from service.artifact.format import load_artifact
from service.artifact.repository import in_serving_order
from service.serving.engine import Engine
from service.serving.loader import ON_CPU
from tests import scenes
from tests.conftest import COMMITTED
from training.data import data_dir, load_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="as for training (or DIGITS_DATA)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    split = load_split("mnist", "test", data_dir(arguments.data_dir))
    engine = Engine(load_artifact(in_serving_order(COMMITTED)[0]).first_of(ON_CPU).model)

    def judge(reading: Normalised) -> tuple[int, float]:
        probabilities, is_digit = engine.answer(reading.pixels[None])
        score = float(probabilities.max() * is_digit[0]) * reading.plausibility
        return int(probabilities.argmax()), score

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


if __name__ == "__main__":
    main()
