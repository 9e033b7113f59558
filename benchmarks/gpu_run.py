"""A run of `benchmarks.gpu`: the checks, then each section; the file is rewritten as it grows."""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
import json
import math
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax.numpy as jnp

from benchmarks import gpu_checks, gpu_programs, record, resnet, torch_peers
from benchmarks.device_time import Kernel, device_times
from benchmarks.failures import OURS, attempt
from benchmarks.gpu_programs import AFTER, COPIES, IMPLEMENTATIONS, KERNELS, MEASURES, TORCH
from benchmarks.measure import COLD
from benchmarks.peers import FLAX, loose
from benchmarks.timing import Effort, Timing, time_all

Shape = tuple[int, ...]
RESNET50 = [  # at batch 256: edge and features of what its layers normalize
    (112, 64), (56, 64), (56, 256), (28, 128), (28, 512), (14, 256), (14, 1024), (7, 512),
    (7, 2048),
]  # fmt: skip
SHAPES: list[Shape] = [(256, edge, edge, features) for edge, features in RESNET50]
SHAPES += [(8192, 1024), (65536, 512), (256, 1024), (32, 7, 7, 2048)]
QUICK: list[Shape] = [(256, 56, 56, 64), (256, 14, 14, 1024), (256, 1024)]
CHECKED: list[Shape] = [*QUICK, (32, 7, 7, 2048), (65536, 512), (101, 7, 7, 24)]
CHECKED += [(20, 7, 7, 512)]  # fits on the chip, and not in whole boxes
TIMED = ("nothing", "residual, relu")  # of AFTER; each is checked, and timed at the QUICK shapes
SECTIONS = ("checks", "bfloat16", "resnet", "float32")  # in this order
DTYPES = ("bfloat16", "float32")
FOR_RESNET = 200  # s that are kept for it
RECORDED = 5  # calls under the profiler
CLOCKS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu"
)


class Plan(NamedTuple):
    """What to do, and with how much effort."""

    checked: list[Shape]
    shapes: list[Shape]
    network: resnet.Size
    after_in_checks: tuple[str, ...] = tuple(AFTER)
    after: tuple[str, ...] = TIMED
    after_if_quick: tuple[str, ...] = ()  # and these, of the shapes in QUICK
    rotated: int = COLD  # bytes
    rounds: tuple[int, int] = (7, 101)  # at least, at most
    # As in a training loop calls are queued, and the host is ahead: what it takes to start one is
    # in a sample only once.
    sample_seconds: float = 0.02
    sample_of_resnet: float = 0.3
    for_resnet: float = 20  # s to time it
    limit: float = 120  # s for a check or a shape: far beyond what any takes
    here: Callable[[], Any] = nullcontext  # a context for whatever calls a kernel

    def cases(self) -> list[dict]:
        """Shapes, and what comes after; of the shapes in QUICK all that may come."""
        pairs = [*product(self.after, self.shapes), *product(self.after_if_quick, QUICK)]
        return [dict(shape=shape, after=after) for after, shape in pairs]


RESNET = resnet.Size((3, 4, 6, 3), 64, 256, 224, bottleneck=True, small_images=False, classes=1000)
FULL = Plan(CHECKED, SHAPES, RESNET, after_if_quick=("relu",))
FAST = Plan(QUICK, QUICK, RESNET, after=TIMED[1:])
TINY: list[Shape] = [(8, 256)]
DRY = Plan(
    TINY, TINY, resnet.Size((), 8, 4, 8, classes=4), TIMED[1:], TIMED[1:], rotated=1,
    rounds=(2, 2), sample_seconds=0, sample_of_resnet=0, for_resnet=0, limit=3600,
    here=gpu_programs.interpreted,
)  # fmt: skip


class Run:
    """A run and its result."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.plan = DRY if args.dry_run else FAST if args.quick else FULL
        self.end = time.monotonic() + args.seconds
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        settings |= dict(rotated_bytes=self.plan.rotated, rounds=self.plan.rounds)
        self.result: dict[str, Any] = record.here() | dict(settings=settings, clocks={})
        self.result |= dict(checks=[], times=[], not_measured=[], ended="it was cut off")

    def all(self) -> None:
        self.clocks("before")
        if "checks" in self.args.only:
            self.checks()
        tasks: list[dict | None] = []  # None: the ResNet
        for section in self.args.only:
            if section == "resnet":
                tasks.append(None)
            elif section in DTYPES:
                tasks += [case | dict(dtype=section) for case in self.plan.cases()]
        for i, case in enumerate(tasks):
            if case is None:
                self.resnet()
                continue
            left = [c for c in tasks[i:] if c is not None]
            reserved = FOR_RESNET if len(left) < len(tasks[i:]) else 0
            self.case(case, (self.end - time.monotonic() - reserved) / len(left))
        self.clocks("after")
        self.result["ended"] = "complete"
        self.write()

    def write(self) -> None:
        """The file, whole at every moment."""
        part = self.args.out.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.args.out)

    def clocks(self, when: str) -> None:
        """As the driver's own program reads them, or why it does not."""
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            read: Any = [line.split(", ") for line in done.stdout.strip().splitlines()]
            found: Any = [dict(zip(CLOCKS.split(","), values, strict=True)) for values in read]
        except (OSError, subprocess.SubprocessError, ValueError) as e:
            found = f"not read: {e}"
        self.result["clocks"][when] = found
        self.write()

    def give_up(self, why: str) -> None:
        """Ends the process at once: its main thread may wait forever."""
        self.result["ended"] = why
        self.write()
        print(f"{why}; see {self.args.out}", file=sys.stderr, flush=True)
        os._exit(3)

    def say(self, what: str) -> None:
        print(f"{self.end - time.monotonic():4.0f} s left: {what}", file=sys.stderr, flush=True)

    def checks(self) -> None:
        """All of them, or the end of the run."""
        dtypes = [s for s in self.args.only if s in DTYPES] or ["bfloat16"]
        cases = list(product(self.plan.checked, dtypes, self.plan.after_in_checks))
        self.say(f"compiling {len(cases)} checks")

        def compiled(case):
            shape, dtype, after = case
            with self.plan.here():
                return gpu_checks.Check.compiled(shape, dtype, AFTER[after])

        with gpu_checks.limited(3 * self.plan.limit, "compiling the checks", self.give_up):
            checks = side_by_side(compiled, cases)
        for (shape, dtype, after), check in zip(cases, checks, strict=True):
            what = f"check of {label(shape)} {dtype}, then {after}"
            self.say(what)
            with gpu_checks.limited(self.plan.limit, what, self.give_up), self.plan.here():
                row = check.run(self.args.repetitions)
            self.result["checks"].append(dict(shape=shape, dtype=dtype, after=after) | row)
            if why := gpu_checks.why_wrong(row):
                self.result["ended"] = f"{what}: {why}"
                self.write()
                raise SystemExit(f"{what}: {why}. Nothing is timed")
            self.write()

    def case(self, case: dict, seconds: float) -> None:
        """All measures of one shape, dtype and what comes after, in about so many seconds."""
        what = f"{label(case['shape'])} {case['dtype']}, then {case['after']}"
        self.say(what)
        if seconds <= 0:
            self.result["not_measured"].append(case | dict(reason="no time was left"))
            self.write()
            return
        end = time.monotonic() + seconds
        with gpu_checks.limited(self.plan.limit, what, self.give_up):
            programs = self.programs(case)
            for i, measured in enumerate(MEASURES):
                share = (end - time.monotonic()) / (len(MEASURES) - i)
                effort = self.effort(share, self.plan.sample_seconds)
                self.time(programs[measured], effort, case | dict(measure=measured))
        self.write()

    def programs(self, case: dict) -> dict[str, dict]:
        """By measure and name; compiled side by side, which takes longer than to time them."""
        after = AFTER[case["after"]]
        data = gpu_programs.inputs(case["shape"], case["dtype"], after, self.plan.rotated)

        def make(which: tuple[str, str]):
            (measured, name), failed = which, {}
            if name == TORCH and (why := torch_peers.why_missing()):
                return None, {name: why}
            with attempt(name, failed), self.plan.here():
                return gpu_programs.program(name, measured, after, data), failed
            return None, failed

        names = [*product(MEASURES, IMPLEMENTATIONS), *product(MEASURES[:1], COPIES)]
        made: dict[str, dict] = {measured: {} for measured in MEASURES}
        for (measured, name), (program, failed) in zip(
            names, side_by_side(make, names), strict=True
        ):
            for m in MEASURES if name in COPIES else [measured]:  # a copy is the same in all
                if program:
                    made[m][name] = program
            self.failed(failed, case | dict(measure=measured))
        return made

    def resnet(self) -> None:
        """A training step with Flax's layer, ours through XLA and ours through the kernels."""
        from flax import linen

        import jax_bn.linen

        self.say("training step of a ResNet")
        ours: Any = jax_bn.linen.BatchNorm
        layers: dict[str, tuple[Callable, bool]] = {
            FLAX: (linen.BatchNorm, False),
            OURS: (partial(ours, implementation="xla"), True),
            KERNELS: (partial(ours, implementation="mosaic_gpu"), True),
        }
        size = self.plan.network
        shape = (size.batch, size.edge, size.edge, 3)
        case = dict(shape=shape, dtype="bfloat16", after="a ResNet", measure="training step")

        def make(name: str):
            failed: dict[str, str] = {}
            with attempt(name, failed), self.plan.here(), loose():
                return resnet.program(*layers[name], size, "bfloat16")[0], failed
            return None, failed

        with gpu_checks.limited(3 * self.plan.limit, "the ResNet", self.give_up):
            # One after the other: XLA tunes a convolution once, and all three get what it found.
            made, compiling = {}, {}
            for name in layers:
                start = time.monotonic()
                made[name] = make(name)
                compiling[name] = time.monotonic() - start
                self.say(f"compiled with {name} in {compiling[name]:.0f} s")
            for _, failed in made.values():
                self.failed(failed, case)
            programs = {name: program for name, (program, _) in made.items() if program}
            effort = self.effort(self.plan.for_resnet, self.plan.sample_of_resnet)
            self.time(programs, effort, case, compiling)
        self.write()

    def effort(self, seconds: float, sample_seconds: float) -> Effort:
        least, most = self.plan.rounds
        return Effort(seconds, least, most, sample_seconds)

    def time(
        self, programs: dict, effort: Effort, case: dict, compiling: dict[str, float] | None = None
    ) -> None:
        """Rows of one group of programs, in interleaved rounds; `compiling`: s that each took."""
        with self.plan.here():
            timings, failed = time_all(programs, FLAX, effort)
            on_device, unread = self.on_device({name: programs[name] for name in timings})
        self.failed(failed, case)
        self.failed({f"{name}, kernel by kernel": why for name, why in unread.items()}, case)
        self.result["times"] += rows(timings, case, on_device, compiling or {})

    def on_device(self, programs: dict) -> tuple[dict[str, list[Kernel]], dict[str, str]]:
        """The kernels of each program, where there is a GPU to run them."""
        return ({}, {}) if self.args.dry_run else device_times(programs, RECORDED)

    def failed(self, reasons: dict[str, str], case: dict) -> None:
        lost = [case | dict(implementation=name, reason=why) for name, why in reasons.items()]
        self.result["not_measured"] += lost


def rows(
    timings: dict[str, Timing],
    case: dict,
    on_device: dict[str, list[Kernel]],
    compiling: dict[str, float],
) -> Iterator[dict]:
    """What the file says of each: seconds by the clock and on the device, and a rate.

    On the device are the kernels' own times: by the clock, those of a small array are the host's.
    The rate is that of the passes of four sweeps, whatever the program really moves; `over_copy`
    is its ratio to that of the faster copy.
    """
    size = math.prod(case["shape"]) * jnp.dtype(case["dtype"]).itemsize
    busy = {name: sum(k.seconds for k in kernels) for name, kernels in on_device.items()}
    seconds = {name: busy.get(name, timing.seconds.median) for name, timing in timings.items()}
    copied = min((seconds[name] for name in COPIES if name in seconds), default=None)
    for name, timing in timings.items():
        row = case | dict(implementation=name, seconds=timing.seconds._asdict())
        row |= dict(over_flax=timing.ratio and timing.ratio._asdict())
        row |= dict(rounds=timing.rounds, calls=timing.calls)
        if name in compiling:
            row |= dict(compile_seconds=compiling[name])
        if name in busy:
            row |= dict(device_seconds=busy[name], launches=len(on_device[name]))
            if FLAX in busy:
                row |= dict(device_over_flax=busy[name] / busy[FLAX])
            if copied:  # a network's are too many
                row |= dict(kernels=[(k.name[:120], k.seconds) for k in on_device[name]])
        if copied:
            passes = 2 if name in COPIES else AFTER[case["after"]].passes(case["measure"])
            rate, of_copy = passes * size / seconds[name], 2 * size / copied
            row |= dict(passes=passes, terabytes_per_second=rate / 1e12, over_copy=rate / of_copy)
        yield row


def side_by_side(f: Callable, cases) -> list:
    """f of each, in threads: what compiles is not held up by Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(f, cases))


def label(shape: Shape) -> str:
    return "x".join(map(str, shape))
