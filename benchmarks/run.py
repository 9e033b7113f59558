"""Everything that a run measures, as a list of tasks behind one progress bar."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
import os
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import counters, measure, record, resnet, scaling, torch_peers
from benchmarks.peers import FLAX, NNX, OURS, PEERS, why_missing
from benchmarks.timing import Effort

NAMES = (*PEERS, *torch_peers.LAYOUTS)
SECTIONS = (*measure.MEASURES, "resnet", "counters", "scaling", "overhead")
DTYPES = ("float32", "bfloat16")
Case = tuple[tuple[int, ...], str]

IMAGES = ((32, 56, 56, 64), (32, 28, 28, 128), (32, 14, 14, 256), (32, 7, 7, 512))
ON_CPU: list[Case] = [(shape, dtype) for dtype in DTYPES for shape in IMAGES]
ON_CPU += [((256, 1024), "float32"), ((8192, 1024), "bfloat16")]
RESNET50 = ((256, 56, 56, 64), (256, 56, 56, 256), (256, 28, 28, 512), (256, 14, 14, 1024))
ON_ACCELERATOR: list[Case] = [
    (shape, dtype) for dtype in DTYPES for shape in (*RESNET50, (256, 7, 7, 2048), (256, 1024))
]
ON_H200: list[Case] = [(shape, dtype) for dtype in DTYPES for shape in (RESNET50[0], RESNET50[3])]


def cases(args: argparse.Namespace) -> list[Case]:
    """The shapes and dtypes: those asked for, or the usual ones of this device."""
    if args.shape:
        return [(shape, dtype) for dtype in args.dtypes for shape in args.shape]
    usual = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    if args.quick:
        image = (32, 14, 14, 256) if usual is ON_CPU else (256, 14, 14, 1024)
        usual = [(image, "float32"), (image, "bfloat16")]
    return [(shape, dtype) for shape, dtype in usual if dtype in args.dtypes]


def missing(names: list[str]) -> dict[str, str]:
    """Which implementations are not here, and why: whatever is measured, they are named."""
    found = {
        n: torch_peers.why_missing() if n in torch_peers.LAYOUTS else why_missing(n) for n in names
    }
    return {name: why for name, why in found.items() if why}


def efforts(args: argparse.Namespace) -> tuple[Effort, Effort]:
    """For the measures and, smaller, for scaling and overhead."""
    if args.rounds:
        return Effort(0, args.rounds, args.rounds), Effort(0, args.rounds, args.rounds)
    if args.quick:
        return Effort(0.5, 5, 31), Effort(0.2, 3, 21)
    return Effort(6, 15, 201), Effort(1.5, 7, 101)


def keep_pages(args: argparse.Namespace) -> int:
    """Bytes of the C library's heap that exist from now on, if it keeps them; see `__main__`.

    Or the first calls of each program, until the heap has grown, would wait for the system.
    """
    if jax.default_backend() != "cpu" or "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return 0
    array = np.ones(min(2**30 if args.quick else 2**31, scaling.memory_bytes() // 4), np.uint8)
    return array.nbytes  # and the array is freed


def run(args: argparse.Namespace) -> dict:
    """The whole result; `args`: the options of `__main__`."""
    effort, small = efforts(args)
    result: dict[str, Any] = dict(
        **record.here(),
        settings=dict(
            quick=args.quick, only=args.only, rounds=args.rounds, effort=asdict(effort),
            rotated_bytes=measure.COLD, depth_of_network=measure.DEPTH,
            jax_platforms=os.environ.get("JAX_PLATFORMS"), xla_flags=os.environ.get("XLA_FLAGS"),
            environment={
                k: v for k, v in sorted(os.environ.items()) if k.startswith(("MALLOC_", "OMP_"))
            },
            allocator_keeps_bytes=keep_pages(args),
        ),
        missing=missing(args.implementations), bandwidth=None,
        times=[], not_measured=[], residuals=[],
        h200=dict(missing="not asked for", rows=[]),
        collectives=dict(missing="not asked for", rows=[]),
        scaling=None, overhead=None,
    )  # fmt: skip
    tasks = list(_tasks(args, result, effort, small))
    with tqdm(tasks, unit="task") as progress:
        for name, task in progress:
            progress.set_description(f"{name:32}")
            task()
    return result


def _tasks(args, result, effort, small):
    """Name and function of each; the functions write into the result."""

    def bandwidth():
        on_cpu = jax.default_backend() == "cpu"
        nbytes = (2**26 if args.quick else 2**28) if on_cpu else 2**30
        nbytes = min(nbytes, scaling.memory_bytes() // 16)
        least = args.rounds or 31
        result["bandwidth"] = measure.bandwidth(nbytes, replace(effort, least_rounds=least))

    def collect(measured: Callable):
        rows, left_out = measured()
        result["times"] += rows
        result["not_measured"] += left_out

    def measured(what, case, data):
        rate = result["bandwidth"]["bytes_per_second"]
        return measure.measured(what, data(*case), args.implementations, effort, rate)

    def residuals(case: Case):
        result["residuals"] += counters.residuals(case[0], case[1], args.implementations)

    def h200(some):
        what = ("step",) if args.quick else [m for m in measure.MEASURES if m != "masked"]
        result["h200"] = counters.h200(some, what, args.implementations)

    def collectives():
        result["collectives"] = counters.collectives_elsewhere()

    def grow(points, most):
        rows, left_out = [], []
        for some_rows, some_left_out in scaling.scaling(points, small):
            rows += some_rows
            left_out += some_left_out
        result["scaling"] = dict(most_elements=most, rows=rows, not_measured=left_out)

    def overhead():
        few = (OURS, FLAX, NNX)
        names = [n for n in args.implementations if n in (few if args.quick else PEERS)]
        result["overhead"] = scaling.overhead(names, small)

    yield "bandwidth", bandwidth
    some_cases = cases(args)
    for case in some_cases:
        shape, dtype = case
        label = f"{'x'.join(map(str, shape))} {dtype}"
        made: dict = {}  # the buffers of one case, for all its measures, and gone with the last

        def data(*case, made=made):
            if not made:
                made["data"] = measure.inputs(*case)
            return made["data"]

        for what in (m for m in measure.MEASURES if m in args.only):
            yield f"{what} {label}", partial(collect, partial(measured, what, case, data))
        yield f"free {label}", made.clear
        if "counters" in args.only:
            yield f"residuals {label}", partial(residuals, case)
    if "resnet" in args.only:
        for dtype in ("float32",) if args.quick else args.dtypes:
            size = resnet.QUICK if args.quick else resnet.FULL
            one = partial(resnet.measured, size, dtype, args.implementations, effort)
            yield f"resnet {dtype}", partial(collect, one)
    if "counters" in args.only:
        yield "collectives", collectives
        yield "programs for an H200", partial(h200, ON_H200[:1] if args.quick else ON_H200)
    if "scaling" in args.only:
        yield "scaling", partial(grow, *scaling.points(args.quick, args.max_elements))
    if "overhead" in args.only:
        yield "overhead", overhead
