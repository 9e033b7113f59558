"""Times of several programs in one process, in rounds: each runs once in every round.

Whatever else the machine does then slows all of them alike, and the ratio of two times of one round
means something. A different program is first each round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.failures import attempt

PAUSE = 0.002  # s before each sample: until the threads of the program before have gone to sleep


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


class Timing(NamedTuple):
    """Of one program: seconds of a call, and these over the reference's in the same round."""

    seconds: Spread
    ratio: Spread | None
    rounds: int
    calls: int  # in a sample


@dataclass(frozen=True)
class Program:
    """Something to time.

    Attributes:
        call: the program.
        arguments: what to call it with, in turn: in all larger than the caches, or the program
            would find its data there.
        wait: blocks until a result is there.
    """

    call: Callable[..., Any]
    arguments: Sequence[tuple[Any, ...]] = ((),)
    wait: Callable[[Any], Any] = jax.block_until_ready


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: for all programs that are timed together, in rounds of them all...
        least_rounds, most_rounds: ...but no fewer and no more rounds than these.
        sample_seconds: fast programs are called as often as this needs, and their mean taken.
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    sample_seconds: float = 0.003


def spread(samples: Sequence[float]) -> Spread:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


def time_all(
    programs: Mapping[str, Program], reference: str | None, effort: Effort
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of the programs by name; and, for those that cannot run, why."""
    failed: dict[str, str] = {}
    seconds_of_a_call: dict[str, float] = {}
    for name, program in programs.items():
        with attempt(name, failed):
            _sample(program, 0, 1)
            seconds_of_a_call[name] = _sample(program, 1, 1)
    calls = {
        name: min(max(1, math.ceil(effort.sample_seconds / s)), 1000)
        for name, s in seconds_of_a_call.items()
    }
    names = list(calls)
    a_round = sum(calls[n] * seconds_of_a_call[n] + PAUSE for n in names) or 1.0
    rounds = max(effort.least_rounds, min(int(effort.seconds / a_round), effort.most_rounds))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            samples[name].append(_sample(programs[name], i * calls[name], calls[name]))
    base = samples.get(reference) if reference else None
    timings = {
        name: Timing(
            spread(seconds),
            spread(np.divide(seconds, base).tolist()) if base else None,
            rounds,
            calls[name],
        )
        for name, seconds in samples.items()
    }
    return timings, failed


def _sample(program: Program, first: int, calls: int) -> float:
    """Mean seconds of some consecutive calls."""
    # A CPU would run calls that wait for one another's end side by side; a GPU queues them, and
    # waiting for each would time the waiting.
    wait_for_each = jax.default_backend() == "cpu"
    result = None
    start = time.perf_counter()
    for i in range(first, first + calls):
        result = program.call(*program.arguments[i % len(program.arguments)])
        if wait_for_each:
            program.wait(result)
    program.wait(result)
    return (time.perf_counter() - start) / calls
