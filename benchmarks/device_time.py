"""How long a GPU itself works at a call, kernel by kernel, as JAX's profiler records it.

Time by the clock has the host's part in it: of a small array the launches take longer than what
they launch. The profiler records every kernel of the process, PyTorch's too.
"""

from collections.abc import Mapping
from pathlib import Path
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.failures import attempt
from benchmarks.timing import Program

PAUSE = 0.02  # s between two programs: what lies further apart than half of it is of two


class Kernel(NamedTuple):
    """What a GPU ran: a kernel, or a copy."""

    name: str
    start: float  # s
    seconds: float


def device_times(
    programs: Mapping[str, Program], calls: int
) -> tuple[dict[str, list[Kernel]], dict[str, str]]:
    """The kernels of a call of each program, in order; their seconds are medians of the calls.

    And why there are none, of a program whose kernels cannot be told from the record.
    """
    for program in programs.values():  # whatever is done once
        program.wait(program.call(*program.arguments[0]))
    try:
        return _recorded_together(programs, calls), {}
    except ValueError:  # the host was held up: now and then a record has a hole, or an end too many
        found, failed = {}, {}
        for name, program in programs.items():
            with attempt(name, failed):
                found |= _recorded_together({name: program}, calls)
        return found, failed


def _recorded_together(programs: Mapping[str, Program], calls: int) -> dict[str, list[Kernel]]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for program in programs.values():
                time.sleep(PAUSE)
                result: Any = None
                for i in range(calls):
                    result = program.call(*program.arguments[i % len(program.arguments)])
                program.wait(result)
        recorded = _recorded(Path(folder))
    # Of one program alone a hole is no end.
    groups = apart(recorded) if len(programs) > 1 else [recorded]
    if len(groups) != len(programs):
        raise ValueError(f"{len(groups)} programs are recorded; expected {len(programs)}")
    pairs = zip(programs, groups, strict=True)
    return {name: of_a_call(kernels, calls) for name, kernels in pairs}


def apart(recorded: list[Kernel]) -> list[list[Kernel]]:
    """Split where the device had nothing to do for half a pause. `recorded`: by their starts."""
    groups: list[list[Kernel]] = []
    idle_since = -float("inf")
    for kernel in recorded:
        if kernel.start - idle_since > PAUSE / 2:
            groups.append([])
        groups[-1].append(kernel)
        idle_since = max(idle_since, kernel.start + kernel.seconds)
    return groups


def of_a_call(kernels: list[Kernel], calls: int) -> list[Kernel]:
    """Of several calls that each ran the same kernels: one call, with median times."""
    each, left = divmod(len(kernels), calls)
    if left or not each:
        raise ValueError(f"{len(kernels)} kernels are recorded; expected as many in {calls} calls")
    if any(k.name != kernels[i % each].name for i, k in enumerate(kernels)):
        raise ValueError(f"{calls} calls ran different kernels; expected the same, in one order")
    seconds = np.array([k.seconds for k in kernels]).reshape(calls, each)
    return [
        first._replace(seconds=float(median))
        for first, median in zip(kernels[:each], np.median(seconds, axis=0), strict=True)
    ]


def _recorded(folder: Path) -> list[Kernel]:
    """In the order of their starts: each stream of the device has a line of its own."""
    found = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:  # the others sum up
                    if line.name.startswith("Stream"):
                        found += [
                            Kernel(e.name, e.start_ns / 1e9, e.duration_ns / 1e9)
                            for e in line.events
                        ]
    return sorted(found, key=lambda k: k.start)
