"""What the README and docs/results.md say of a Hopper GPU, from result files of `benchmarks.gpu`.

`python -m benchmarks.gpu_readme` writes it into both, between their markers.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
import json
import math

from benchmarks.failures import OURS
from benchmarks.gpu_programs import COPY, IMPLEMENTATIONS, KERNELS, MEASURES, TORCH
from benchmarks.peers import FLAX
from benchmarks.readme import rewrite
from benchmarks.record import ROOT
from benchmarks.report import table

FILES = ("2026-11-26-2354-h200", "2026-11-27-0004-h200-float32")
BESIDE = (OURS, KERNELS, TORCH)
FEW = ((32, 7, 7, 2048), (256, 1024))  # whose x stays on the chip, in bfloat16
MARKERS = tuple(f"<!-- benchmarks.gpu: {where} -->" for where in ("begin", "end"))
AFTER = {"nothing": "", "residual, relu": ", residual and relu"}

TUNED = ", with tuning the convolutions for all three"  # the first to compile

Case = dict[str, dict]  # a row for each implementation


def measured() -> list[dict]:
    """The rows of all files."""
    folder = ROOT / "benchmarks" / "results"
    return [r for name in FILES for r in json.loads((folder / f"{name}.json").read_text())["times"]]


def on_device(row: dict) -> float:
    return row["device_seconds"]


def by_clock(row: dict) -> float:
    return row["seconds"]["median"]


def layers(rows: list[dict]) -> dict[tuple, Case]:
    """Of one layer: by dtype, what follows, shape and measure."""
    found: dict[tuple, Case] = {}
    for row in rows:
        if row["measure"] in MEASURES:
            key = row["dtype"], row["after"], tuple(row["shape"]), row["measure"]
            found.setdefault(key, {})[row["implementation"]] = row
    return found


def faster(rows: list[dict]) -> set[tuple]:
    """dtype, examples and features of which every measure took less time with the kernels."""
    won: dict[tuple, bool] = {}
    for (dtype, _, shape, _), case in layers(rows).items():
        key = dtype, math.prod(shape[:-1]), shape[-1]
        here = all(time(case[KERNELS]) < time(case[OURS]) for time in (on_device, by_clock))
        won[key] = won.get(key, True) and here
    return {key for key, always in won.items() if always}


def network(rows: list[dict]) -> str:
    """A training step of a ResNet-50."""
    of = {r["implementation"]: r for r in rows if r["measure"] == "training step"}
    lines = [
        [
            name,
            f"{1e3 * on_device(row):.1f} ms, {on_device(row) / on_device(of[FLAX]):.2f}",
            f"{1e3 * by_clock(row):.1f} ms, {row['over_flax']['median']:.2f}",
            f"{row['compile_seconds']:.0f} s" + (TUNED if name == FLAX else ""),
        ]
        for name, row in of.items()
    ]
    return table(["", "on the device, and of Flax's", "by the clock", "to compile"], lines)


def over_flax(rows: list[dict]) -> str:
    """Time on the device over Flax's: of XLA's stages, the kernels, PyTorch."""

    def cell(cases: list[Case]) -> str:
        ratios = [[on_device(c[name]) / on_device(c[FLAX]) for c in cases] for name in BESIDE]
        return "; ".join(_span(values, "{:.2f}") for values in ratios)

    return _by_shape(rows, cell)


def of_copy(rows: list[dict]) -> str:
    """The rate of the kernels over the passes of four sweeps, as a share of that of a copy."""
    return _by_shape(rows, lambda cases: _span([c[KERNELS]["over_copy"] for c in cases], "{:.0%}"))


def losses(rows: list[dict]) -> str:
    """In how many cases ours take longer than what they are compared with; and times theirs."""
    pairs = [(KERNELS, OURS), (OURS, FLAX), (KERNELS, FLAX), (OURS, TORCH), (KERNELS, TORCH)]
    lines = []
    for (ours, theirs), dtype in product(pairs, ("bfloat16", "float32")):
        for what, seconds in (("on the device", on_device), ("by the clock", by_clock)):
            cells = []
            for measure in MEASURES:
                ratios = [
                    seconds(case[ours]) / seconds(case[theirs])
                    for key, case in layers(rows).items()
                    if (key[0], key[3]) == (dtype, measure)
                ]
                lost = sum(v > 1 for v in ratios)
                cells.append(f"{lost} of {len(ratios)}; {_span(ratios)}")
            lines.append([f"{ours}, {theirs}; {dtype}, {what}", *cells])
    return table(["the first longer than the second; times its time", *MEASURES], lines)


def speedup(rows: list[dict]) -> str:
    """Steps by the kernels: how many times as fast as Flax's and PyTorch's, on the device.

    And what it would be if the passes of four sweeps went at the rate of a copy.
    """

    def row(label: str, ratio: Callable[[Case], float]) -> list[str]:
        cells = []
        for dtype in ("bfloat16", "float32"):
            cases = [(k, c) for k, c in layers(rows).items() if (k[0], k[3]) == (dtype, "step")]
            for small in (False, True):
                chosen = [c for k, c in cases if (k[2] in FEW) == small]
                cells.append(_span([ratio(c) for c in chosen]))
        return [label, *cells]

    header = ["as fast as", "bfloat16, large x", "few examples", "float32, large x", "few examples"]
    lines = [row(name, partial(_speedup, name)) for name in (FLAX, TORCH)]
    lines.append(row(f"{FLAX}, at a copy's rate", lambda case: 1 / case[FLAX]["over_copy"]))
    return table(header, lines)


def _speedup(name: str, case: Case) -> float:
    return on_device(case[name]) / on_device(case[KERNELS])


def launch_by_launch(rows: list[dict]) -> str:
    """What the kernels of a small step take, and a copy."""
    case = layers(rows)["bfloat16", "nothing", (256, 1024), "step"]
    lines = []
    for name in (*IMPLEMENTATIONS, COPY):
        kernels = " + ".join(f"{1e6 * seconds:.1f}" for _, seconds in case[name]["kernels"])
        lines.append([name, f"{1e6 * on_device(case[name]):.1f} us", kernels])
    return table(["step at (256,1024), bfloat16", "on the device", "its launches"], lines)


def _span(values: list[float], form: str = "{:.2f}") -> str:
    ends = dict.fromkeys(form.format(v) for v in (min(values), max(values)))
    return " to ".join(ends)


def _by_shape(rows: list[dict], cell: Callable[[list[Case]], str]) -> str:
    of, lines = layers(rows), []
    for dtype in ("bfloat16", "float32"):
        for after, said in AFTER.items():
            mine = {k[2:]: c for k, c in of.items() if k[:2] == (dtype, after)}
            large = dict.fromkeys(shape for shape, _ in mine if shape not in FEW)
            groups = [(f"{len(large)} large x", tuple(large))]
            groups += [("x".join(map(str, shape)), (shape,)) for shape in FEW]
            for label, shapes in groups:
                cells = [cell([mine[shape, m] for shape in shapes]) for m in MEASURES]
                lines.append([f"{dtype}, {label}{said}", *cells])
    return table(["", *MEASURES], lines)


def sections(rows: list[dict]) -> dict[str, str]:
    """What stands between the markers of each file."""
    parts = {
        "README.md": (network(rows), over_flax(rows), losses(rows)),
        "docs/results.md": (of_copy(rows), speedup(rows), launch_by_launch(rows)),
    }
    begin, end = MARKERS
    return {name: "\n\n".join([begin, *texts, end]) for name, texts in parts.items()}


def main() -> None:
    for name, text in sections(measured()).items():
        rewrite(ROOT / name, text, *MARKERS)


if __name__ == "__main__":
    main()
