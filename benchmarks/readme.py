"""The section of the README on performance, from a result file: wins and losses side by side."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers import FLAX, FUSED, OURS
from benchmarks.record import ROOT, BadResult
from benchmarks.report import NOT_HERE, TITLES, cases, ratio, size, table
from benchmarks.run import NAMES

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def section(result: dict, path: Path) -> str:
    """Markdown between the markers; `path`: of the result, to be named."""
    device, versions = result["device"], result["versions"]
    where = f"{device['kind']} ({device['processor']}, {device['cores']} cores)"
    used = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    command = "python -m benchmarks" + (" --quick" if result["settings"]["quick"] else "")
    parts = [
        f"From [`{path.name}`]({_link(path)}), made by `{command}` on {where} on "
        f"{result['date'][:10]}; {used}. Time over that of `{FLAX}` in the same round: median and "
        "quartiles; below 1 is faster."
    ]
    for measure in TITLES:
        rows = [r for r in result["times"] if r["measure"] == measure]
        if rows and measure in ("step", "masked", "network", "resnet"):
            parts.append(f"{TITLES[measure]}:\n\n{_ratios(rows)}")
    parts.append(_wins_and_losses(result))
    if gone := result["missing"]:
        parts.append("Not measured: " + "; ".join(f"{n}: {why}" for n, why in gone.items()))
    return "\n\n".join([BEGIN, *parts, END])


def rewrite(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Puts the section where the markers stand."""
    try:
        old = path.read_text()
    except OSError as e:
        raise BadResult(f"cannot read {str(path)!r}: {e.strerror}") from e
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise BadResult(f"{str(path)!r}: expected one {begin!r} and then one {end!r}")
    before, rest = old.split(begin)
    path.write_text(before + text + rest.split(end)[1])


def _link(path: Path) -> str:
    """From the root of the repository, if it is in there."""
    whole = path.resolve()
    return whole.relative_to(ROOT).as_posix() if whole.is_relative_to(ROOT) else path.name


def _ratios(rows: list[dict]) -> str:
    names = [n for n in NAMES if n != FLAX and any(r["implementation"] == n for r in rows)]
    lines = []
    for (shape, dtype), case in cases(rows).items():
        ratios = [ratio(case[n]["over_flax"]) if n in case else NOT_HERE for n in names]
        lines.append([f"{size(shape)} {dtype}", *ratios])
    return table(["x", *names], lines)


def _wins_and_losses(result: dict) -> str:
    """Of all that was timed, ours against each other implementation; alike: quartiles overlap."""
    tally: dict[tuple[str, str], tuple[list[str], list[str], list[str]]] = {}
    rows = [r for r in result["times"] if r["over_flax"]]
    for measure in TITLES:
        for (shape, dtype), case in cases(r for r in rows if r["measure"] == measure).items():
            for ours in (n for n in (OURS, FUSED) if n in case):
                for other in (n for n in case if n not in (OURS, FUSED)):
                    a, b = case[ours]["over_flax"], case[other]["over_flax"]
                    won = a["high"] < b["low"], False, b["high"] < a["low"]
                    which = won.index(True) if any(won) else 1
                    by = a["median"] / b["median"]
                    found = tally.setdefault((ours, other), ([], [], []))
                    found[which].append(f"{measure} {size(shape)} {dtype} ({by:.2f})")
    lines = [
        [*pair, str(len(won)), str(len(alike)), _worst_first(lost)]
        for pair, (won, alike, lost) in sorted(tally.items())
    ]
    header = ("", "against", "wins", "alike, within the spread", "losses, time over theirs")
    return "Of all measures and shapes:\n\n" + table(header, lines)


def _worst_first(found: Iterable[str]) -> str:
    ordered = sorted(found, key=lambda text: -float(text.rsplit("(", 1)[1].rstrip(")")))
    return f"{len(ordered)}" + (f": {'; '.join(ordered)}" if ordered else "")
