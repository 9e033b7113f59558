"""`python -m benchmarks.gpu` measures on a Hopper GPU: the kernels beside XLA, Flax and PyTorch.

First every kernel is checked (`gpu_checks`): if one does not end, errs, or gives other bits another
time, nothing is timed; `--only` can leave that out. Then batch normalization at the shapes of a
ResNet-50 and a few others, with what follows it, and a training step of a ResNet-50. It is made for
ten minutes: each shape gets its share of the time that is left, and what gets none is named. The
result is one JSON file, rewritten after each section, so that what was measured is there if the
machine goes; and a table of it.

`--dry-run` goes the whole way on any machine: tiny arrays, the kernels interpreted. Its times mean
nothing.
"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path

import jax

from benchmarks import gpu_checks
from benchmarks.__main__ import chosen, positive
from benchmarks.gpu_programs import COPIES, IMPLEMENTATIONS
from benchmarks.gpu_run import SECTIONS, Run, label
from benchmarks.peers import FLAX
from benchmarks.report import table
from jax_bn import _implementation


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Checks and times the kernels on a Hopper GPU, beside XLA, Flax and PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="three shapes, with relu and residual")
    parser.add_argument(
        "--only", type=lambda text: chosen(text, SECTIONS), default=",".join(SECTIONS),
        metavar="A,B", help="sections to run",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default="out/gpu.json", help="the file of the result")
    parser.add_argument("--repetitions", type=positive, default=1000, help="of each check")
    parser.add_argument("--seconds", type=positive, default=540, help="for all of it")
    parser.add_argument("--dry-run", action="store_true", help="tiny arrays, interpreted: no times")
    return parser


def why_not_here(dry_run: bool) -> str | None:
    """Why it cannot run here; None where it can."""
    if jax.__version_info__ < _implementation.OLDEST_JAX:
        return f"jax is {jax.__version__}; the kernels want 0.11 or later"
    if dry_run:
        return None
    from jax_bn.kernels import mosaic_gpu

    if why := mosaic_gpu.why_not_here():
        return f"{why}. --dry-run goes the whole way without one, and times nothing"
    return None


def markdown(result: dict) -> str:
    """The times as tables, one for each dtype, and what was not measured."""
    parts = [f"{result['device']['kind']}, {result['date']}, commit {result['commit']}"]
    wrong = [c for c in result["checks"] if gpu_checks.why_wrong(c)]
    checks = "none"
    if result["checks"]:
        worst = max(c["error"] for c in result["checks"])
        checks = (
            f"{len(result['checks'])} of {result['settings']['repetitions']} repetitions, of which "
            f"{len(wrong)} failed; the largest error is {worst:.3f} of what is allowed"
        )
    parts.append(f"Checks: {checks}. The run: {result['ended']}.")
    if result["settings"]["dry_run"]:
        parts.append("A dry run: the times are those of an interpreter and mean nothing.")
    parts.append(
        "Each cell: time on the device, the kernels' own (with ~: by the clock), how many times as "
        "fast as Flax's layer, and the bandwidth of the passes of four sweeps as a share of that "
        "of the faster copy. By the clock, small arrays are the host's; the file has both."
    )
    timed = {row["implementation"] for row in result["times"]}
    names = [n for n in (*IMPLEMENTATIONS, *COPIES) if n in timed]
    for dtype in dict.fromkeys(row["dtype"] for row in result["times"]):
        lines: dict[tuple, dict[str, str]] = {}
        for row in (r for r in result["times"] if r["dtype"] == dtype):
            case = (label(row["shape"]), row["after"], row["measure"])
            lines.setdefault(case, {})[row["implementation"]] = _cell(row)
        body = [[*case, *(cells.get(n, "-") for n in names)] for case, cells in lines.items()]
        parts.append(f"## {dtype}\n\n" + table(["x", "then", "measure", *names], body))
    if result["not_measured"]:
        reasons: dict[tuple, list[str]] = {}
        for row in result["not_measured"]:
            case = f"{label(row['shape'])} {row['dtype']}, then {row['after']}"
            case += f", {row['measure']}" if "measure" in row else ""
            reasons.setdefault((row.get("implementation"), row["reason"]), []).append(case)
        left_out = [
            f"- {f'{name}: ' if name else ''}{reason} ({'; '.join(cases)})"
            for (name, reason), cases in reasons.items()
        ]
        parts.append("## Not measured\n\n" + "\n".join(left_out))
    return "\n\n".join(parts)


def _cell(row: dict) -> str:
    on_device = "device_seconds" in row
    seconds = row["device_seconds"] if on_device else row["seconds"]["median"]
    cell = f"{'' if on_device else '~'}{1e3 * seconds:.3f} ms"
    if row["implementation"] in COPIES:
        return f"{cell}, {row['terabytes_per_second']:.2f} TB/s"
    over_flax = row.get("device_over_flax", (row["over_flax"] or {}).get("median"))
    if over_flax and row["implementation"] != FLAX:
        cell += f", {1 / over_flax:.2f} x"
    return cell + (f", {row['over_copy']:.0%}" if "over_copy" in row else "")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = options()
    args = parser.parse_args(argv)
    args.only = [section for section in SECTIONS if section in args.only]
    if args.dry_run:  # or Pallas's interpreter, which has a thread for each of the GPU's, deadlocks
        os.environ.setdefault("NPROC", "64")
        args.repetitions = min(args.repetitions, 2)
    if why := why_not_here(args.dry_run):
        parser.error(why)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    run.all()
    print(markdown(run.result))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
