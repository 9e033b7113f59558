"""A result as Markdown, and the files of a run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import json
from pathlib import Path

from benchmarks.peers import FLAX, OURS
from benchmarks.run import NAMES

TITLES = {
    "forward": "Forward",
    "backward": "Backward alone",
    "step": "Step: forward and backward in one program",
    "masked": "Step, every fifth example masked",
    "network": "Network: four times relu(bn(x) + x), gradients, one program",
    "resnet": "Training step of a small ResNet; x: its images",
}
NOT_HERE = "-"


def write(result: dict, folder: Path) -> Path:
    """Writes the JSON file and the Markdown file; their path without the suffix."""
    day, clock = result["date"][:10], result["date"][11:16].replace(":", "")
    name = f"{day}-{clock}-{result['device']['platform']}"
    stem = folder / (name + ("-quick" if result["settings"]["quick"] else ""))
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result) + "\n")
    return stem


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cases(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows by (shape, dtype), and there by implementation."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = found.setdefault((tuple(row["shape"]), row["dtype"]), {})
        case[row["implementation"]] = row
    return found


def size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def ratio(spread: dict | None) -> str:
    if spread is None:
        return NOT_HERE
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def mebibytes(n: float | None) -> str:
    return NOT_HERE if n is None else f"{n / 2**20:.2f}"


def milliseconds(row: dict | None) -> str:
    return NOT_HERE if row is None else f"{row['seconds']['median'] * 1e3:.3g}"


def markdown(result: dict) -> str:
    """The whole report."""
    sections = [_head(result)]
    for measure, title in TITLES.items():
        if rows := [r for r in result["times"] if r["measure"] == measure]:
            sections.append(f"## {title}\n\n{_times(rows)}")
    sections += [*_growth(result), _counts(result), _missing(result)]
    return "\n\n".join(s for s in sections if s)


def _head(result: dict) -> str:
    device, settings = result["device"], result["settings"]
    rate = result["bandwidth"]["bytes_per_second"]
    versions = ", ".join(f"{k} {v or 'missing'}" for k, v in result["versions"].items())
    environment = ", ".join(f"{k}={v}" for k, v in settings["environment"].items())
    return f"""# Benchmarks of {result["date"]}

- Device: {device["kind"]}, {device["processor"]}, {device["cores"]} cores, {device["system"]}
- Versions: {versions}; commit {result["commit"]}
- Memory: {rate / 1e9:.1f} GB/s, by a copy of {mebibytes(result["bandwidth"]["array_bytes"])} MiB
- Environment: {environment or "as the system has it"}

Times over those of `{FLAX}` in the same round, all in one process: the median and, in brackets, the
quartiles; below 1 is faster. The bound is the time of the fewest passes over x, 3 forward and 5
backward, at that rate; arrays that stay in a cache, and reads, which are cheaper than writes, can
beat it."""


def _times(rows: list[dict]) -> str:
    names = [n for n in NAMES if n != FLAX and any(r["implementation"] == n for r in rows)]
    bounded = any(r["bound_seconds"] for r in rows)
    header = ["x", "dtype", *names, f"{FLAX}, ms", f"{OURS}, ms"]
    header += ["bound, ms", f"{OURS} to the bound"] if bounded else []
    lines = []
    for (shape, dtype), case in cases(rows).items():
        cells = [size(shape), dtype]
        cells += [ratio(case[n]["over_flax"]) if n in case else NOT_HERE for n in names]
        ours = case.get(OURS)
        cells += [milliseconds(case.get(FLAX)), milliseconds(ours)]
        if bounded:
            bound = next(iter(case.values()))["bound_seconds"]
            cells.append(f"{bound * 1e3:.3g}")
            cells.append(f"{ours['seconds']['median'] / bound:.2f}" if ours else NOT_HERE)
        lines.append(cells)
    return table(header, lines)


def _counts(result: dict) -> str:
    return "\n\n".join(["## Counted", *_all_counts(result)])


def _all_counts(result: dict) -> Iterator[str]:
    for of, title in (("one", "one normalization"), ("block", "one block, relu(bn(x) + x)")):
        rows = [r for r in result["residuals"] if r["of"] == of]
        if rows:
            text = _wide(rows, lambda r: f"{r['residual_bytes'] / r['x_bytes']:.2f}")
            yield f"Kept by autodiff for the backward pass of {title}, in bytes of x:\n\n{text}"
    for key, title in (
        ("bytes_moved", "Bytes accessed, as this device's compiler counts them"),
        ("peak_temporary_bytes", "Temporaries"),
        ("kernels", "Kernels"),
    ):
        for measure in ("step", "network", "resnet"):
            rows = [
                r for r in result["times"] if r["measure"] == measure and r.get(key) is not None
            ]
            if rows:
                text = _wide(rows, lambda r, k=key: str(r[k]) if k == "kernels" else
                             mebibytes(r[k]))  # fmt: skip
                unit = "" if key == "kernels" else ", in MiB"
                yield f"{title} of the {measure}{unit}:\n\n{text}"
    h200, some = result["h200"], result["collectives"]
    if h200["missing"]:
        yield f"Programs for an H200: missing ({h200['missing']})."
    else:
        for measure in dict.fromkeys(r["measure"] for r in h200["rows"]):
            rows = [r for r in h200["rows"] if r["measure"] == measure]
            text = _wide(rows, _of_h200)
            title = f"Programs for an H200, {measure}: passes over x, kernels, temporaries in MiB"
            yield f"{title}:\n\n{text}"
    if some["missing"]:
        yield f"Collectives: missing ({some['missing']})."
    else:
        header = ("implementation", "program", "devices", "collectives", "elements at most")
        yield table(header, [
            (r["implementation"], r["measure"], str(r["devices"]),
             ", ".join(f"{n} {k}" for k, n in r["collectives"].items()), str(r["most_elements"]))
            for r in some["rows"]
        ])  # fmt: skip


def _of_h200(row: dict) -> str:
    if "reason" in row:
        return row["reason"]
    temporary = mebibytes(row["peak_temporary_bytes"])
    return f"{row['passes']:.2f}, {row['kernels']}, {temporary}"


def _wide(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """A line for each shape and dtype, a column for each implementation."""
    names = [n for n in NAMES if any(r["implementation"] == n for r in rows)]
    lines = [
        [size(shape), dtype, *[cell(case[n]) if n in case else NOT_HERE for n in names]]
        for (shape, dtype), case in cases(rows).items()
    ]
    return table(["x", "dtype", *names], lines)


def _growth(result: dict) -> list[str]:
    sections = []
    if growth := result["scaling"]:
        for grows, title in (("N", "examples"), ("C", "features")):
            rows = [r for r in growth["rows"] if r["grows"] == grows]
            lines = []
            for (shape, _), case in cases(rows).items():
                ours, flax = case.get(OURS), case.get(FLAX)
                cells = [size(shape), milliseconds(ours), milliseconds(flax)]
                cells.append(ratio(ours["over_flax"]) if ours else NOT_HERE)
                for key in ("bytes_moved", "peak_temporary_bytes", "residual_bytes"):
                    cells += [mebibytes(r[key] if r else None) for r in (ours, flax)]
                lines.append(cells)
            pairs = ("moved", "temporaries", "kept by autodiff")
            header = ["x", f"{OURS}, ms", f"{FLAX}, ms", "ratio"]
            header += [f"{what}, MiB: {n}" for what in pairs for n in (OURS, FLAX)]
            sections.append(f"## The step against the {title}, float32\n\n{table(header, lines)}")
    if over := result["overhead"]:
        cost: dict[str, dict[str, dict]] = {}
        for row in over["rows"]:
            cost.setdefault(row["what"], {})[row["implementation"]] = row
        names = [n for n in NAMES if any(n in of for of in cost.values())]
        lines = [
            [what, *[f"{milliseconds(of[n])}: {ratio(of[n]['over_flax'])}" if n in of else NOT_HERE
                     for n in names]]
            for what, of in cost.items()
        ]  # fmt: skip
        title = f"## Tracing, compiling, calling, at {size(over['shape'])}: ms, and over {FLAX}"
        sections.append(f"{title}\n\n{table(['', *names], lines)}")
    return sections


def _missing(result: dict) -> str:
    """What was not measured: each reason once, with what it is the reason of."""
    rows = [dict(implementation=n, reason=r, measure="all") for n, r in result["missing"].items()]
    rows += [r for r in result["not_measured"] if r["implementation"] not in result["missing"]]
    for part in ("scaling", "overhead"):
        some = (result[part] or {}).get("not_measured", [])
        rows += [r for r in some if r["implementation"] not in result["missing"]]
    of: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        of.setdefault((row["implementation"], row["reason"]), {})[row["measure"]] = None
    lines = [(name, ", ".join(measures), why) for (name, why), measures in of.items()]
    header = ("implementation", "measure", "reason")
    return "## Not measured\n\n" + (table(header, lines) if lines else "Nothing.")
