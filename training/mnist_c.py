"""Test images under the fifteen corruptions of MNIST-C, none of which training applies.

Written from the paper and the strengths of its published data set: Mu and Gilmer 2019, MNIST-C: A
Robustness Benchmark for Computer Vision (arXiv 1906.02337). The random numbers are other ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import feature

# Images float64[N, 28, 28], 0 to 1; the result is clipped to that range.
Floats = npt.NDArray[np.float64]
Generator = np.random.Generator

SIDE = 28
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(float)


def shot_noise(images: Floats, rng: Generator) -> Floats:
    """Poisson noise of few photons: at most three a pixel."""
    return rng.poisson(images * 3) / 3


def impulse_noise(images: Floats, rng: Generator) -> Floats:
    """17 % of the pixels black or white."""
    dice = rng.random(images.shape)
    return np.select([dice < 0.085, dice > 0.915], [0.0, 1.0], images)


def glass_blur(images: Floats, rng: Generator) -> Floats:
    """Neighbouring pixels swapped at random, twice over, between two blurs of sigma 0.7."""
    images = _smooth(images, 0.7)
    every = np.arange(len(images))
    for _ in range(2):
        for row in range(SIDE - 1, 1, -1):
            for column in range(SIDE - 1, 1, -1):
                some = every[rng.random(len(images)) < 0.5]
                down, right = rng.integers(-1, 1, (2, len(some)))
                here, there = (some, row, column), (some, row + down, column + right)
                images[here], images[there] = images[there], images[here]
    return _smooth(images, 0.7)


def motion_blur(images: Floats, rng: Generator) -> Floats:
    """Smeared to one side along a line within 45 degrees of the rows, with a sigma of 3 pixels."""
    steps = np.arange(10)
    weights = np.exp(-(steps**2) / (2 * 3**2))
    angles = rng.uniform(-math.pi / 4, math.pi / 4, len(images))
    down, right = _each(np.sin(angles)), _each(np.cos(angles))
    moved = [
        weight * _resample(images, ROWS + step * down, COLUMNS + step * right)
        for step, weight in zip(steps, weights / weights.sum(), strict=True)
    ]
    return np.asarray(np.sum(moved, axis=0))


def shear(images: Floats, rng: Generator) -> Floats:
    """By 0.4, to either side."""
    factor = 0.4 * _signs(len(images), rng)
    zero, one = np.zeros(len(images)), np.ones(len(images))
    return _affine(images, [[one, zero], [-np.sin(factor), np.cos(factor)]])


def scale(images: Floats, _: Generator) -> Floats:
    """70 % of the size."""
    same, zero = np.full(len(images), 1 / 0.7), np.zeros(len(images))
    return _affine(images, [[same, zero], [zero, same]])


def rotate(images: Floats, rng: Generator) -> Floats:
    """By 0.4 radians, 23 degrees, either way."""
    angle = 0.4 * _signs(len(images), rng)
    return _affine(images, [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def brightness(images: Floats, _: Generator) -> Floats:
    """Half of the range added to every pixel."""
    return images + 0.5


def translate(images: Floats, rng: Generator) -> Floats:
    """3 pixels along both axes."""
    down, right = 3 * _signs(len(images), rng), 3 * _signs(len(images), rng)
    return _resample(images, ROWS + _each(down), COLUMNS + _each(right))


def stripe(images: Floats, _: Generator) -> Floats:
    """The left and the right quarter inverted."""
    return np.where((COLUMNS < 7) | (COLUMNS >= 21), 1 - images, images)


def fog(images: Floats, rng: Generator) -> Floats:
    """A cloud of up to three times the range added, and all of it brought back to the range."""
    brightest = images.max(axis=(1, 2), keepdims=True)
    clouds = [part for _ in range(-(-len(images) // 16)) for part in _parts(_plasma(rng))]
    cloud = np.stack(clouds[: len(images)])
    return np.asarray((images + 3 * cloud) * brightest / (brightest + 3))


def spatter(images: Floats, rng: Generator) -> Floats:
    """Grey drops over the digit."""
    liquid = _smooth(rng.normal(0.65, 0.3, images.shape), 1)
    drops = _smooth((liquid > 0.65).astype(float), 1.5)
    drops[drops < 0.8] = 0
    return images * (1 - drops) + drops * 63 / 255


def dotted_line(images: Floats, rng: Generator) -> Floats:
    """A line of two pixels on, two pixels off, from the left edge to the right one."""
    left, right = rng.integers(0, SIDE - 1, (2, len(images)))
    line = _lines(0, left, SIDE - 1, right)
    return images + np.where(COLUMNS % 4 < 2, line, 0)


def zigzag(images: Floats, rng: Generator) -> Floats:
    """A zigzag of an amplitude of two pixels from the left edge to the right one."""
    return np.stack([_zigzag(image, rng) for image in images])


def canny_edges(images: Floats, _: Generator) -> Floats:
    """The edges that Canny's detector finds, in place of the image."""
    edges = [feature.canny(image) for image in images]  # type: ignore[no-untyped-call]
    return np.stack(edges).astype(float)


MNIST_C: dict[str, Callable[[Floats, Generator], Floats]] = {
    each.__name__.replace("_", " "): each
    for each in (
        shot_noise, impulse_noise, glass_blur, motion_blur, shear, scale, rotate, brightness,
        translate, stripe, fog, spatter, dotted_line, zigzag, canny_edges,
    )
}  # fmt: skip


def corrupt(name: str, images: npt.NDArray[np.uint8], seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images under one corruption.

    Args:
        name: Key of ``MNIST_C``.
        images: uint8[N, 28, 28].
        seed: Seeds it.

    Returns:
        uint8[N, 28, 28].
    """
    corrupted = MNIST_C[name](images / 255, np.random.default_rng(seed))
    return np.asarray((255 * corrupted.clip(0, 1)).round().astype(np.uint8))


def _signs(count: int, rng: Generator) -> Floats:
    return rng.choice([-1.0, 1.0], count)


def _each(values: Floats) -> Floats:
    return values[:, None, None]


def _smooth(images: Floats, sigma: float) -> Floats:
    return np.asarray(ndimage.gaussian_filter(images, (0, sigma, sigma), mode="nearest"))


def _resample(images: Floats, rows: Floats, columns: Floats) -> Floats:
    """The images at other places, [N, 28, 28] each; 0 outside of them."""
    number = np.broadcast_to(np.arange(len(images))[:, None, None], images.shape)
    places = [number, np.broadcast_to(rows, images.shape), np.broadcast_to(columns, images.shape)]
    return np.asarray(ndimage.map_coordinates(images, places, order=1, mode="constant"))


def _affine(images: Floats, matrix: list[list[Floats]]) -> Floats:
    """Each image under one matrix [[y to y, x to y], [y to x, x to x]] about its centre."""
    centre = (SIDE - 1) / 2
    down, right = ROWS - centre, COLUMNS - centre
    rows, columns = (_each(by_y) * down + _each(by_x) * right + centre for by_y, by_x in matrix)
    return _resample(images, rows, columns)


def _lines(left: float, top: Floats, right: float, bottom: Floats) -> Floats:
    """Soft lines 2.3 pixels to each side from (left, top) to (right, bottom), [N, 28, 28]."""
    slope = (bottom - top) / (right - left)
    distance = np.abs(ROWS - _each(slope) * (COLUMNS - left) - _each(top))
    line = (np.log(1 - np.minimum(distance, 2.3 - 1e-10) / 2.3) + 1).clip(0, 1)
    inside = (math.floor(left) <= COLUMNS) & (math.ceil(right) > COLUMNS)
    return np.where(inside, line, 0)


def _zigzag(image: Floats, rng: Generator) -> Floats:
    start = int(rng.integers(0, SIDE - 1))
    fall, width = int(rng.integers(-5, 5)), 23
    angle, length = math.atan2(fall, width), math.hypot(fall, width)
    turns = np.arange(int((length - 2) // 4) + 1)
    along = np.concatenate([[0], 4 * turns + 2, [length]])
    beside = np.concatenate([[0], 2 * (-1.0) ** turns, [0]])
    columns = 2 + along * math.cos(angle) - beside * math.sin(angle)
    rows = start + along * math.sin(angle) + beside * math.cos(angle)
    corners = zip(columns.tolist(), rows.tolist(), strict=True)
    for (left, top), (right, bottom) in itertools.pairwise(corners):
        if right > left:
            line = _lines(left, np.array([top]), right, np.array([bottom]))[0]
            image = np.minimum(image + line, 1)
    return image


def _parts(cloud: Floats) -> list[Floats]:
    """Sixteen parts [28, 28], far from each other: a cloud for each image would take minutes."""
    return [cloud[y : y + SIDE, x : x + SIDE] for y in range(0, 256, 64) for x in range(0, 256, 64)]


def _plasma(rng: Generator, side: int = 256, decay: float = 1.4) -> Floats:
    """A cloud [side, side] between 0 and 1, by the diamond-square algorithm on a torus."""
    cloud = np.zeros((side, side))
    step, spread = side, 100.0

    def wobble(values: Floats) -> Floats:
        return values / 4 + spread * rng.uniform(-spread, spread, values.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        squares = corners + np.roll(corners, -1, 0)
        cloud[half::step, half::step] = wobble(squares + np.roll(squares, -1, 1))
        middles = cloud[half::step, half::step]
        across = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        cloud[::step, half::step] = wobble(across)
        along = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        cloud[half::step, ::step] = wobble(along)
        step, spread = half, spread / decay
    cloud -= cloud.min()
    return np.asarray(cloud / cloud.max())
