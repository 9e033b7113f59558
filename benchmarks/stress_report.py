"""The result of `benchmarks.stress` as Markdown, with a reason for each exception."""

from benchmarks.failures import OURS
from benchmarks.report import NOT_HERE, table

TITLES = {
    "mean": "Mean, in units of sqrt(mean^2 + var)",
    "var": "Variance, in units of itself",
    "y": "y, in units of its largest",
    "dx": "dx, in units of scale*rstd*max(abs(dy)), of which it is a difference",
    "dscale": "dscale, in units of the root of the sum of its squared terms",
}
# By case and, if not for all of them, by quantity.
REASONS = {
    ("outliers of 1e4 std first and second", None): (
        "The variance is summed about the median of the first three examples. Where two of these "
        "are the only outliers, it lies sqrt(N/2) std from the mean, and the sums cancel: the "
        "worst case that the docstring of `batch_norm` bounds. Shuffled examples do not meet it, "
        "and with a mask, of ones too, the variance takes a sweep of its own about the mean."
    ),
    ("subnormal", "dscale"): (
        "XLA takes subnormal numbers for 0 on CPUs, in every program of JAX; PyTorch does not."
    ),
    ("largest finite, from half of it on", "var"): (
        "The sum of x overflows in all implementations, and y is right in none. The variance is "
        "beyond float32; those that take it in a second sweep then say infinity, ours says NaN."
    ),
}


def why(exception: dict) -> str | None:
    """The reason of an exception; None if it has none."""
    case = exception["case"]
    return REASONS.get((case, exception["quantity"])) or REASONS.get((case, None))


def markdown(result: dict) -> str:
    """The whole report."""
    names = [n for n in _names(result) if n not in result["missing"]]
    sections = [_head(result), _exceptions(result), _isolation(result)]
    for quantity, title in TITLES.items():
        lines = [_line(result, row, quantity, names) for row in result["rows"]]
        header = ["x", *names, "at most twice the best?"]
        sections.append(f"## {title}\n\n{table(header, [line for line in lines if line])}")
    failed = {
        f"{name}, {row['case']}: {reason}"
        for row in result["rows"]
        for name, reason in row["failed"].items()
    }
    absent = [f"{name}: {reason}" for name, reason in result["missing"].items()]
    if failed or absent:
        sections.append("## Not there\n\n" + "\n".join(f"- {s}" for s in sorted(failed) + absent))
    return "\n\n".join(sections)


def _names(result: dict) -> list[str]:
    """All implementations, in the order of the result."""
    rows = result["rows"]
    return list(dict.fromkeys(name for row in rows for name in row["errors"]))


def _head(result: dict) -> str:
    device = result["device"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    command = "python -m benchmarks.stress" + (" --quick" if result["settings"]["quick"] else "")
    shape = "x".join(map(str, result["rows"][0]["shape"]))
    return f"""# Numbers under stress

By `{command}` on {device["kind"]} ({device["processor"]}) on {result["date"][:10]}; {versions};
commit {result["commit"]}.

The largest error of each result of one training step against float64, for the x that its dtype
holds: of shape {shape}, or N x 1, then with mean 3 and std 1. `two sweeps`: with
`use_fast_variance=False`; `definition`: `jax_bn.reference`. "Not finite": an infinity or a NaN
where the right value is within the dtype of the result. "At most twice the best?": of the other
implementations, plus the rounding of the result's dtype and four roundings of float32."""


def _exceptions(result: dict) -> str:
    found: dict[str, list[str]] = {}
    for e in result["exceptions"]:
        ours = "not finite" if e["ours"] is None else f"{e['ours']:.1e}"
        text = f"{e['quantity']}, {e['dtype']}: {ours}, {e['of']} {e['best']:.1e}"
        found.setdefault(f"**{e['case']}**. {why(e) or 'No reason is known.'}", []).append(text)
    compared = sum(len(row["errors"][OURS]) for row in result["rows"])
    count = f"{len(result['exceptions'])} of {compared} results err by more."
    lines = [f"- {reason} ({'; '.join(which)})" for reason, which in found.items()]
    return f"## Exceptions\n\n{count}\n\n" + "\n".join(lines)


def _isolation(result: dict) -> str:
    touched = [
        f"- {row['implementation']}, {row['dtype']}: {row.get('failed') or row['changed']}"
        for row in result["isolation"]
        if row.get("failed") or row["changed"]
    ]
    text = (
        "A NaN in one feature and an infinity in another leave all results of the other features "
        "as they are, to the bit, in each implementation and dtype"
    )
    return "## NaN and infinity\n\n" + text + (":\n\n" + "\n".join(touched) if touched else ".")


def _line(result: dict, row: dict, quantity: str, names: list[str]) -> list[str] | None:
    """One line of a table; None where the case has no such quantity."""
    errors = row["errors"]
    if quantity not in errors[OURS]:
        return None

    def cell(name: str) -> str:
        if name not in errors:
            return NOT_HERE
        error = errors[name][quantity]["error"]
        return "not finite" if error is None else f"{error:.1e}" if error else "0"

    where = dict(case=row["case"], dtype=row["dtype"], quantity=quantity)
    refuted = any(where.items() <= e.items() for e in result["exceptions"])
    return [f"{row['case']}, {row['dtype']}", *map(cell, names), "**no**" if refuted else "yes"]
