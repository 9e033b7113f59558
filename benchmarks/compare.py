"""What changed between two results, beyond the noise.

Two processes, even on one machine, differ by more than the rounds of one. So what is compared is
the time over Flax's in the same round, from quartile to quartile, this range made twice as wide: a
change is one where the ranges of the two do not overlap. And a change of ours has to be larger than
that of any other implementation in the same case, if all versions are the same: for these cannot
have changed. Flax's own seconds tell how fast the machine was, and are summed up in a line; where
Flax was not timed, seconds are compared. Counts have no noise.
"""

from collections.abc import Iterator
import math
from typing import Any

from benchmarks import report
from benchmarks.peers import FLAX, FUSED, OURS
from benchmarks.report import ratio, size
from benchmarks.timing import spread

COUNTS = ("bytes_moved", "peak_temporary_bytes", "kernels", "residual_bytes", "most_elements",
          "collectives", "passes")  # fmt: skip


def changes(before: dict, after: dict) -> Iterator[tuple[str, str, str, str]]:
    """What, before, after, and in words by how much."""
    old, new = _flat(before), _flat(after)
    floors = _noise(old, new) if before["versions"] == after["versions"] else {}
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        by = _by(a, b) if key[1] != FLAX else None
        if by and _apart(a[by], b[by]) and abs(_change(a, b)) > floors.get(_case(key), 0):
            change = math.exp(_change(a, b))
            word = "slower" if change > 1 else "faster"
            unit, show = (f"time over {FLAX}", ratio) if by == "over_flax" else ("ms", _ms)
            yield f"{_label(key)}, {unit}", show(a[by]), show(b[by]), f"{change:.2f} x, {word}"
        for count in COUNTS:
            if count in a and count in b and a[count] != b[count]:
                yield (
                    f"{_label(key)}, {count}",
                    _plain(a[count]),
                    _plain(b[count]),
                    _times(a[count], b[count]),
                )


def table(before: dict, after: dict) -> str:
    """Markdown: what differs in the circumstances, what changed, what only one of the two has."""
    lines = []
    for part in ("commit", "device", "versions", "settings"):
        a, b = before[part], after[part]
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            names = [k for k in {**a, **b} if a.get(k) != b.get(k)]
            lines += [f"- {part}, {k}: {a.get(k)} -> {b.get(k)}" for k in names]
        elif a != b:
            lines.append(f"- {part}: {a} -> {b}")
    circumstances = (
        "\n".join(["Differs in:", *lines]) if lines else "Same commit, device, settings."
    )
    changed = sorted(changes(before, after))
    old, new = _flat(before), _flat(after)
    both = len(old.keys() & new.keys())
    header = ("what", "before", "after", "change")
    nothing = f"Nothing changed beyond the noise, of {both} rows."
    text = report.table(header, changed) if changed else nothing
    parts = [part for part in (circumstances, _of_flax(old, new), text) if part]
    for title, keys in (
        ("Only before", old.keys() - new.keys()),
        ("Only after", new.keys() - old.keys()),
    ):
        if keys:
            parts.append(f"{title}: {'; '.join(sorted(map(_label, keys)))}")
    return "\n\n".join(parts)


def _flat(result: dict) -> dict[tuple, dict]:
    """All rows by (measure, implementation, shape, dtype)."""
    rows = [(r["measure"], r) for r in result["times"]]
    rows += [(f"residuals of {r['of']}", r) for r in result["residuals"]]
    rows += [(f"H200 {r['measure']}", r) for r in result["h200"]["rows"]]
    rows += [(f"collectives, {r['measure']}", r) for r in result["collectives"]["rows"]]
    if result["scaling"]:
        rows += [(f"scaling with {r['grows']}", r) for r in result["scaling"]["rows"]]
    if result["overhead"]:
        rows += [(r["what"], r) for r in result["overhead"]["rows"]]
    return {
        (what, r["implementation"], tuple(r.get("shape", ())), r.get("dtype", "")): r
        for what, r in rows
    }


def _label(key: tuple) -> str:
    what, name, shape, dtype = key
    return " ".join(part for part in (what, name, size(shape), dtype) if part)


def _case(key: tuple) -> tuple:
    what, _, *where = key
    return what, *where


def _by(a: dict, b: dict) -> str | None:
    """What to compare of two rows: ratios, seconds where one has none, nothing if untimed."""
    if "seconds" not in a or "seconds" not in b:
        return None
    return "over_flax" if a["over_flax"] and b["over_flax"] else "seconds"


def _change(a: dict, b: dict) -> float:
    """As a logarithm."""
    by = _by(a, b)
    return math.log(b[by]["median"] / a[by]["median"])


def _noise(old: dict, new: dict) -> dict[tuple, float]:
    """For each case the largest change of an implementation that is not ours."""
    floors: dict[tuple, float] = {}
    for key in old.keys() & new.keys():
        if key[1] not in (OURS, FUSED, FLAX) and _by(old[key], new[key]) == "over_flax":
            change = abs(_change(old[key], new[key]))
            floors[_case(key)] = max(change, floors.get(_case(key), 0))
    return floors


def _apart(a: dict, b: dict) -> bool:
    """Whether the ranges between the quartiles do not overlap, each made twice as wide."""
    first, second = sorted((a, b), key=lambda spread: spread["median"])
    margin = sum(spread["high"] - spread["low"] for spread in (a, b)) / 2
    return first["high"] + margin < second["low"]


def _of_flax(old: dict, new: dict) -> str:
    """How Flax's own times changed, all of them together."""
    both = [key for key in old.keys() & new.keys() if key[1] == FLAX and "seconds" in old[key]]
    if not both:
        return ""
    s = spread([new[k]["seconds"]["median"] / old[k]["seconds"]["median"] for k in both])
    return f"Seconds of {FLAX}, after over before, median and quartiles: {ratio(s._asdict())}"


def _ms(spread: dict) -> str:
    return ratio({k: v * 1e3 for k, v in spread.items()})


def _plain(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _times(a: Any, b: Any) -> str:
    return f"{b / a:.2f} x" if isinstance(a, int | float) and a else ""
