"""How the step grows with examples and with features; what compiling and calling cost.

Ours and Flax's alone, since it is how they grow that is compared.
"""

from collections.abc import Callable, Iterator
from functools import partial
import math
import os
from typing import Any

import jax

from benchmarks.counters import residuals
from benchmarks.measure import functions, inputs, measured, row
from benchmarks.peers import FLAX, OURS, PEERS, Peer, block, loose, why_missing
from benchmarks.timing import Effort, Program, time_all

FEATURES = 64  # while the elements grow
SMALL = (64, 32)  # the shape at which the call costs more than the work
LARGE = (32, 28, 28, 128)  # and one that is compiled to more
ARRAYS = 16  # of x's size, at most alive at once


def memory_bytes() -> int:
    """What is free for arrays."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def points(quick: bool, most_elements: int) -> tuple[list[tuple[str, tuple[int, int]]], int]:
    """Which argument grows and the shape, for each point; and the cap on the elements."""
    most = min(most_elements, memory_bytes() // (4 * ARRAYS))
    exponents = range(10, 23, 4) if quick else range(10, 28)
    by_n = [("N", (2**e // FEATURES, FEATURES)) for e in exponents if 2**e <= most]
    elements = 2 ** min(20 if quick else 23, max(13, int(math.log2(max(most, 1)))))
    features = (1, 64, 8192) if quick else [2**e for e in range(14)]
    return by_n + [("C", (elements // c, c)) for c in features], most


def scaling(
    some_points: list[tuple[str, tuple[int, int]]], effort: Effort
) -> Iterator[tuple[list[dict], list[dict]]]:
    """For each point the rows: time, bytes moved, temporaries and residuals of a float32 step."""
    for grows, shape in some_points:
        rows, left_out = measured("step", inputs(shape, "float32"), (OURS, FLAX), effort, None)
        kept = {r["implementation"]: r for r in residuals(shape, "float32", (OURS, FLAX))}
        for r in rows:
            r |= dict(grows=grows, residual_bytes=kept[r["implementation"]]["residual_bytes"])
        yield rows, left_out


def overhead(names: list[str], effort: Effort) -> dict[str, Any]:
    """Seconds to trace, to compile, and to call what does next to no work.

    What has relu and residual of its own is compiled beside others that have them around.
    """
    large = "x".join(map(str, LARGE))
    compiled = {  # the shape, and whether with relu and residual
        "compile": (SMALL, False),
        "compile block": (SMALL, True),
        f"compile {large}": (LARGE, False),
        f"compile block {large}": (LARGE, True),
    }
    called = "eager forward", "eager step", "jitted forward", "jitted step"
    programs: dict[str, dict[str, Program]] = {n: {} for n in ("trace", *compiled, *called)}
    missing = {name: why for name in names if (why := why_missing(name))}
    with loose():
        for name in (n for n in names if n not in missing):
            peer = PEERS[name]
            fs, args = _step(peer, SMALL, blocks=False)
            x, _, scale, bias, state = args

            def trace(step=fs["step"], args=args):
                return _anew(step).trace(*args)

            def compile_(fs, args):
                return _anew(fs["step"]).lower(*args).compile()

            programs["trace"][name] = Program(trace, wait=bool)
            for what, (shape, blocks) in compiled.items():
                if blocks or not peer.fused:
                    case = _step(peer, shape, blocks=blocks)
                    programs[what][name] = Program(partial(compile_, *case), wait=bool)
            for how, wrap in (("eager", lambda f: f), ("jitted", jax.jit)):
                forward, step = wrap(fs["forward"]), wrap(fs["step"])
                programs[f"{how} forward"][name] = Program(forward, [(x, scale, bias, state)])
                programs[f"{how} step"][name] = Program(step, [args])
        rows, left_out = [], []
        for what, some in programs.items():
            timings, failed = time_all(some, FLAX, effort)
            rows += [dict(what=what, implementation=n) | row(t) for n, t in timings.items()]
            left_out += [dict(measure=what, implementation=n, reason=r) for n, r in failed.items()]
    left_out += [dict(measure="overhead", implementation=n, reason=r) for n, r in missing.items()]
    return dict(shape=list(SMALL), rows=rows, not_measured=left_out)


def _step(peer: Peer, shape: tuple[int, ...], *, blocks: bool) -> tuple[dict[str, Callable], tuple]:
    """The measures as functions, and the arguments of a step."""
    data = inputs(shape, "float32")
    apply, state = peer.make(data.x)
    apply = block(peer, apply) if blocks else apply
    return functions(peer, apply), (*data.pairs[0], data.scale, data.bias, state)


def _anew(f: Callable) -> Any:
    """f, jitted as a function that JAX has not seen."""
    return jax.jit(lambda *args: f(*args))
