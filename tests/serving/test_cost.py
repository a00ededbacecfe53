"""What is decided from the time that batches take; no test here looks at a real clock."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.serving.cost import SECOND_SLOT_S, TARGET_BATCH_S, BatchCost, warm_up_sizes
from tests.serving.core import FakeClock

# Seconds of an image on the fastest and on the slowest machines and networks that are served.
IMAGE_S = [10e-6, 20e-6, 40e-6, 80e-6, 150e-6, 300e-6]
# What any batch takes beside its images.
OVERHEAD_S = 30e-6


def of_machine(image_s: Any) -> Any:
    return lambda images: OVERHEAD_S + images * image_s


def measured(true: Any, slowed: float = 1.0, sizes: Any = None) -> dict[Any, Any]:
    return {size: slowed * true(size) for size in sizes or warm_up_sizes(64)}


def cost_of(seconds: Any, max_batch_size: int = 64, max_waiting: int = 4096) -> BatchCost:
    cost = BatchCost(max_batch_size, max_waiting, FakeClock())
    cost.expect(seconds)
    return cost


def run_batches(cost: Any, true: Any, batches: Any, chance: Any = lambda: 1.0) -> None:
    """Small requests under load: batches as large as was decided."""
    for _ in range(batches):
        cost.learn(cost.batch_images, true(cost.batch_images) * chance())


def load(seed: int) -> Any:
    """A machine with other work: most batches are slowed down, some are stopped for long."""
    rng = random.Random(seed)
    return lambda: rng.choice([1.0, 1.05, 1.2, 1.5, 2.0, 2.0, 3.0, 50.0])


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_sizes_that_are_measured(largest: int, sizes: Any) -> None:
    assert warm_up_sizes(largest) == sizes


@pytest.mark.parametrize("image_s", IMAGE_S)
def test_batch_of_small_requests_takes_the_target_time_on_any_machine(image_s: float) -> None:
    true = of_machine(image_s)
    cost = cost_of(measured(true))
    assert true(cost.batch_images) == pytest.approx(TARGET_BATCH_S, abs=image_s / 2 + 1e-9)
    assert cost.image_cost_s == pytest.approx(true(cost.batch_images) / cost.batch_images)


@pytest.mark.parametrize("image_s", IMAGE_S)
def test_second_slot_is_worth_its_time_on_any_machine(image_s: float) -> None:
    cost = cost_of(measured(of_machine(image_s)))
    worth = cost.wake_images * cost.image_cost_s
    assert SECOND_SLOT_S <= worth < SECOND_SLOT_S + cost.image_cost_s


def test_bounds_are_kept_however_cheap_or_dear_an_image_is() -> None:
    cheap = cost_of({1: 0.0}, max_waiting=100)
    assert (cheap.batch_images, cheap.wake_images) == (64, 100)
    dear = cost_of({1: 1.0})
    assert (dear.batch_images, dear.wake_images) == (1, 1)


def test_before_anything_is_known_batches_are_full_and_every_deadline_is_tried() -> None:
    cost = BatchCost(64, 4096)
    cost.learn(64, 1.0)
    assert (cost.batch_images, cost.image_cost_s, cost.wake_images) == (64, 0.0, 64)


@pytest.mark.parametrize("image_s", IMAGE_S)
@pytest.mark.parametrize("slowed", [3.0, 10.0, 100.0])
def test_warm_up_on_a_busy_machine_is_forgotten_within_some_batches(
    image_s: float, slowed: float
) -> None:
    true = of_machine(image_s)
    cost, right = cost_of(measured(true, slowed)), cost_of(measured(true))
    run_batches(cost, true, 60)
    assert cost.batch_images == pytest.approx(right.batch_images, rel=0.1, abs=1)
    assert cost.image_cost_s == pytest.approx(right.image_cost_s, rel=0.1)


def test_one_size_that_was_disturbed_at_warm_up_is_limited_by_its_neighbours() -> None:
    true = of_machine(20e-6)
    seconds = measured(true)
    cost = cost_of(seconds | {16: 100 * true(16), 1: 100 * true(1)})
    assert cost.seconds(1) <= true(2)
    assert cost.seconds(16) <= 2 * true(8)
    assert cost.seconds(32) == pytest.approx(true(32))


@pytest.mark.parametrize("image_s", IMAGE_S)
def test_two_pods_of_one_model_converge_whatever_their_warm_up_said(image_s: float) -> None:
    true = of_machine(image_s)
    quiet, busy = cost_of(measured(true)), cost_of(measured(true, 8.0))
    for seed, cost in enumerate((quiet, busy)):
        run_batches(cost, true, 5000, load(seed))
    assert busy.batch_images == pytest.approx(quiet.batch_images, rel=0.15, abs=1)
    assert busy.wake_images == pytest.approx(quiet.wake_images, rel=0.15, abs=1)


@pytest.mark.parametrize("image_s", IMAGE_S)
def test_load_beside_the_server_hardly_changes_what_is_decided(image_s: float) -> None:
    true = of_machine(image_s)
    cost, right = cost_of(measured(true)), cost_of(measured(true))
    run_batches(cost, true, 5000, load(1))
    assert cost.image_cost_s == pytest.approx(right.image_cost_s, rel=0.25)


def test_batch_that_stalls_for_seconds_counts_as_one_slow_batch() -> None:
    cost = cost_of(measured(of_machine(20e-6)))
    before = cost.image_cost_s
    cost.learn(cost.batch_images, 30.0)
    assert cost.image_cost_s == pytest.approx(before, rel=0.02)


def test_machine_that_becomes_slower_for_good_is_followed() -> None:
    cost = cost_of(measured(of_machine(20e-6)))
    slower = of_machine(80e-6)
    run_batches(cost, slower, 3000)
    right = cost_of(measured(slower))
    assert cost.batch_images == pytest.approx(right.batch_images, rel=0.1, abs=1)


def test_lone_requests_alone_do_not_change_what_large_batches_are_said_to_cost() -> None:
    cost = cost_of(measured(of_machine(20e-6)))
    before = cost.batch_images
    for _ in range(3000):
        cost.learn(1, 1.5 * of_machine(20e-6)(1))
    assert cost.batch_images == pytest.approx(before, rel=0.05)


def test_sizes_that_were_not_measured_are_taken_from_those_that_were() -> None:
    cost = cost_of({4: 40e-6})
    assert cost.seconds(1) == pytest.approx(10e-6)
    assert cost.seconds(3) == pytest.approx(30e-6)
    assert cost.seconds(64) == pytest.approx(640e-6)
    assert cost.seconds(128) == pytest.approx(1280e-6)


@settings(deadline=None)
@given(
    warm_up=st.lists(st.floats(1e-6, 10.0), min_size=7, max_size=7),
    batches=st.lists(st.tuples(st.integers(1, 64), st.floats(1e-7, 100.0)), max_size=100),
)
def test_larger_batch_never_takes_less_time_nor_more_an_image(warm_up: Any, batches: Any) -> None:
    cost = cost_of(dict(zip(warm_up_sizes(64), warm_up, strict=True)))
    for images, seconds in batches:
        cost.learn(images, seconds)
        for small, large in zip(range(1, 64), range(2, 65), strict=True):
            least = cost.seconds(small) * (1 - 1e-9)
            most = cost.seconds(small) * large / small * (1 + 1e-9)
            assert least <= cost.seconds(large) <= most
        assert 1 <= cost.batch_images <= 64
        assert 1 <= cost.wake_images <= 4096
