"""Contestants that take turns, so that what else the machine does falls on all alike."""

import random
import statistics
from collections.abc import Callable
from timeit import Timer
from typing import Any

import jax


def compare(
    *contestants: Callable[[], Any],
    warm_up: int = 3,
    rounds: int = 24,
    statistic: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """The median seconds of each contestant, or another statistic, in shuffled turns, each finished before the next."""
    timers = [Timer(lambda run=run: jax.block_until_ready(run())) for run in contestants]
    times: list[list[float]] = [[] for _ in timers]
    order = random.Random(0)  # shuffled, for what one has just freed can help or hinder the next
    for _ in range(warm_up + rounds):
        for seat in order.sample(range(len(timers)), len(timers)):
            times[seat].append(timers[seat].timeit(1))
    return [statistic(taken[warm_up:]) for taken in times]


def verdict(what: str, ratio: float, floor: float) -> str:
    """A line that says whether a ratio reaches its floor."""
    return f"{what}: {ratio:,.2f}x, floor {floor:,g}x: {'met' if ratio >= floor else 'missed'}"
