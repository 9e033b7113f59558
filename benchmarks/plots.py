"""The pictures of a result: time over Flax's, and how close to the memory's rate."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from benchmarks.measure import PASSES
from benchmarks.peers import FLAX, FUSED, OURS
from benchmarks.report import TITLES, cases, size
from benchmarks.run import NAMES

DARK, LIGHT, FLAXS = "#1b2a49", "#5d8aa8", "#f5b041"
COLOURS = dict(zip(
    NAMES, (DARK, LIGHT, FLAXS, "#f8d49a", "#7fb685", "#b58db6", "#9e9e9e", "#d9534f", "#e99a97"),
    strict=True,
))  # fmt: skip
MARKERS = {OURS: "o", FUSED: "s", FLAX: "^"}


def draw(result: dict, stem: Path) -> list[Path]:
    """Draws what the result has the numbers for; the files."""
    drawn = []
    for name, figure in (
        ("bars", _bars(result)), ("roofline", _roofline(result)), ("scaling", _scaling(result))
    ):  # fmt: skip
        if figure is not None:
            drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(drawn[-1], format="png")
    return drawn


def _figure(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(11, height * rows), dpi=110, layout="constrained")
    found = list(figure.subplots(rows, squeeze=False)[:, 0])
    for axes in found:
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _bars(result: dict) -> Figure | None:
    """A group of bars for each shape, a bar for each implementation, quartiles as whiskers."""
    by_measure = {m: [r for r in result["times"] if r["measure"] == m and r["over_flax"]]
                  for m in TITLES}  # fmt: skip
    by_measure = {m: rows for m, rows in by_measure.items() if rows}
    if not by_measure:
        return None
    figure, all_axes = _figure(len(by_measure), 3.2)
    for axes, (measure, rows) in zip(all_axes, by_measure.items(), strict=True):
        groups = cases(rows)
        names = [n for n in NAMES if n != FLAX and any(n in case for case in groups.values())]
        for i, name in enumerate(names):
            at = [g + (i + 0.5) / (len(names) + 1) for g, c in enumerate(groups.values())
                  if name in c]  # fmt: skip
            found = [case[name]["over_flax"] for case in groups.values() if name in case]
            medians = [v["median"] for v in found]
            whiskers = [[m - v["low"] for m, v in zip(medians, found, strict=True)],
                        [v["high"] - m for m, v in zip(medians, found, strict=True)]]  # fmt: skip
            whiskers = [[max(0, w) for w in side] for side in whiskers]
            heights = [m - 1 for m in medians]  # from 1: up is slower, down is faster
            axes.bar(at, heights, 1 / (len(names) + 1), bottom=1, yerr=whiskers, label=name,
                     color=COLOURS[name], error_kw=dict(lw=0.8, ecolor="0.4"))  # fmt: skip
        axes.axhline(1, color=FLAXS, lw=2)
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(MaxNLocator(6) if high < 6 * low else LogLocator(2))
        axes.yaxis.set_major_formatter("{x:g}")
        labels = [f"{size(shape)}\n{dtype}" for shape, dtype in groups]
        axes.set_xticks([g + 0.45 for g in range(len(labels))], labels, fontsize=6)
        axes.set(title=TITLES[measure], ylabel=f"time over {FLAX}")
        if names:
            axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _roofline(result: dict) -> Figure | None:
    """Bytes of the fewest passes, by time, against the bytes of x; the roof is a copy's rate."""
    rows = [r for r in result["times"] if r["measure"] in PASSES and r["bound_seconds"]]
    if not rows:
        return None
    measures = [m for m in PASSES if any(r["measure"] == m for r in rows)]
    figure, all_axes = _figure(len(measures), 3.6)
    rate = result["bandwidth"]["bytes_per_second"]
    for axes, measure in zip(all_axes, measures, strict=True):
        for name in NAMES:
            points = [r for r in rows if r["measure"] == measure and r["implementation"] == name]
            if not points:
                continue
            sizes = [r["bound_seconds"] * rate / PASSES[measure] / 2**20 for r in points]
            rates = [r["bound_seconds"] * rate / r["seconds"]["median"] / 1e9 for r in points]
            axes.scatter(sizes, rates, s=28, color=COLOURS[name], label=name,
                         marker=MARKERS.get(name, "."))  # fmt: skip
        axes.axhline(rate / 1e9, color="0.3", lw=1.2, ls="--", label="memory, by a copy")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="x, MiB", ylabel="GB/s", ylim=(0, None),
                 title=f"{TITLES[measure]}: {PASSES[measure]} passes over x")  # fmt: skip
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _scaling(result: dict) -> Figure | None:
    if not result["scaling"] or not result["scaling"]["rows"]:
        return None
    figure, all_axes = _figure(2, 3.4)
    for axes, (grows, label) in zip(
        all_axes, (("N", "elements of x, 64 features"), ("C", "features")), strict=True
    ):
        for name in (OURS, FLAX):
            rows = [r for r in result["scaling"]["rows"]
                    if r["grows"] == grows and r["implementation"] == name]  # fmt: skip
            at = [r["shape"][0] * r["shape"][1] if grows == "N" else r["shape"][1] for r in rows]
            for key, style in (("seconds", "-"), ("residual_bytes", ":")):
                values = [r[key]["median"] * 1e3 if key == "seconds" else r[key] / 2**20
                          for r in rows]  # fmt: skip
                unit = "ms" if key == "seconds" else "MiB kept by autodiff"
                axes.plot(at, values, style, marker=MARKERS[name], ms=4, color=COLOURS[name],
                          label=f"{name}, {unit}")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel=label, title=f"The step against the {label.split(',')[0]}, float32")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
