"""`python -m benchmarks.stress`: numbers under stress, ours beside others', against float64.

The claim: whatever the input, no result of ours errs by more than twice the best of the others and
the rounding of its dtype. Each exception is named, with the reason; one without a reason ends the
run. It also asks whether a NaN or an infinity in one feature leaves the others as they are, to the
bit.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
import importlib
import json
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import record, stress_cases, stress_report, torch_peers
from benchmarks.failures import OURS, attempt
from benchmarks.peers import FLAX, PEERS, Peer, loose
from benchmarks.stress_cases import Case, Exact

TWO_SWEEPS, DEFINITION, TORCH = f"{FLAX} two sweeps", "definition", "torch"
# Flax's two ways to take the variance; in NNX they are the same code as in Linen.
JUDGED: dict[str, Peer] = {
    OURS: PEERS[OURS],
    FLAX: PEERS[FLAX],
    TWO_SWEEPS: Peer(partial(PEERS[FLAX].make, use_fast_variance=False), "flax"),
    "haiku": PEERS["haiku"],
    "equinox": PEERS["equinox"],
    DEFINITION: PEERS[DEFINITION],
}
NAMES = (*JUDGED, TORCH)
AT_ANY_SIZE = (OURS, FLAX, TWO_SWEEPS, DEFINITION)
QUANTITIES = ("mean", "var", "y", "dx", "dscale")
Results = dict[str, Any]  # by quantity


def missing(names: Iterable[str]) -> dict[str, str]:
    """Which implementations are not here, and why."""
    absent: dict[str, str] = {}
    for name in names:
        with attempt(name, absent):
            importlib.import_module(TORCH if name == TORCH else JUDGED[name].needs)
    return absent


def program(name: str, shape: tuple[int, ...], dtype, gradients: bool) -> Callable[..., Results]:
    """All results of one training step from (x, scale, bias, dy)."""
    if name == TORCH:
        return torch_peers.results
    # A momentum of 0: the running averages are the statistics of the batch.
    apply, state = JUDGED[name].make(jax.ShapeDtypeStruct(shape, dtype), momentum=0.0)

    @jax.jit
    def run(x, scale, bias, dy):
        def y_of(x, scale):
            return apply(x, scale, bias, state)

        if not gradients:
            y, after = y_of(x, scale)
            return dict(zip(("y", "mean", "var"), (y, *_statistics(name, after)), strict=True))
        y, pull, after = jax.vjp(y_of, x, scale, has_aux=True)
        return dict(zip(QUANTITIES, (*_statistics(name, after), y, *pull(dy)), strict=True))

    def in_its_promotion(*args):
        with loose():
            return jax.block_until_ready(run(*args))

    return in_its_promotion


def _statistics(name: str, state) -> tuple[jax.Array, jax.Array]:
    """The running mean and variance in the state of a peer."""
    if name == "haiku":
        averages = (state[f"batch_norm/~/{kind}_ema"]["average"] for kind in ("mean", "var"))
        mean, var = map(jnp.ravel, averages)
    elif name == "equinox":  # beside the two a counter
        mean, var = (v for v in state if jnp.issubdtype(v.dtype, jnp.inexact))
    else:
        mean, var = (state["mean"], state["var"]) if isinstance(state, dict) else state
    return mean, var


def error(actual, right: Callable[[slice], np.ndarray], parts: Sequence[slice], unit: float):
    """The largest error, in units, and what rounding may make of it.

    Its dtype rounds the result once, float32 up to four times what the result is made of. What the
    dtype cannot hold has to be infinite, what is below its normal numbers may be 0. None where
    something is not finite that should be.
    """
    info = jnp.finfo(actual.dtype)
    largest = 0.0
    for part in parts:
        a, o = np.asarray(actual[part]).astype(np.float64), right(part)
        beyond = np.abs(o) > float(info.max)
        if not np.all(np.where(beyond, a == np.copysign(np.inf, o), np.isfinite(a))):
            return dict(error=None, rounding=0.0)
        with np.errstate(invalid="ignore"):
            far = np.where(beyond, 0, np.abs(a - o) - float(info.tiny))
        largest = max(largest, float(np.max(far)))
    rounding = float(info.eps) + 4 * float(jnp.finfo("float32").eps)
    return dict(error=largest / unit, rounding=rounding)


def errors(results: Results, exact: Exact) -> dict[str, dict]:
    """`error` of each quantity that there is."""
    n, features = exact.x.shape
    parts = stress_cases.parts(n, features)
    right: dict[str, tuple[Callable, list[slice]]] = {
        "mean": (lambda part: exact.mean, [slice(None)]),
        "var": (lambda part: exact.var, [slice(None)]),
        "dscale": (lambda part: exact.dscale, [slice(None)]),
        "y": (exact.y, parts),
        "dx": (exact.dx, parts),
    }
    return {q: error(v, *right[q], exact.unit[q]) for q, v in results.items()}


def judged(case: Case, names: Iterable[str], programs: dict) -> dict:
    """A row of the result: the errors of each implementation, or why it has none."""
    dy, scale, bias = stress_cases.arguments(case.x)
    exact = stress_cases.exact(case.x, dy, scale, bias)
    row: dict[str, Any] = dict(
        case=case.name, dtype=case.x.dtype.name, shape=list(case.x.shape), errors={}, failed={}
    )
    for name in names:
        if case.large and name not in AT_ANY_SIZE:
            continue
        with attempt(name, row["failed"]):
            run = _program(programs, name, case)
            row["errors"][name] = errors(run(case.x, scale, bias, dy), exact)
    return row


def _program(programs: dict, name: str, case: Case) -> Callable[..., Results]:
    key = name, case.x.shape, case.x.dtype
    if key not in programs:
        programs[key] = program(*key, gradients=not case.large)
    return programs[key]


def isolated(case: Case, names: Iterable[str], programs: dict) -> Iterator[dict]:
    """Whether a NaN in the first feature and an infinity in the second touch any other."""
    dy, scale, bias = stress_cases.arguments(case.x)
    spoilt = case.x.copy()
    spoilt[3, 0], spoilt[3, 1] = np.nan, np.inf
    for name in names:
        failed: dict[str, str] = {}
        with attempt(name, failed):
            run = _program(programs, name, case)
            clean, after = (run(x, scale, bias, dy) for x in (case.x, spoilt))
            changed = [
                quantity
                for quantity, v in clean.items()
                if np.asarray(v[..., 2:]).tobytes()
                != np.asarray(after[quantity][..., 2:]).tobytes()
            ]
            yield dict(implementation=name, dtype=case.x.dtype.name, changed=changed)
        if failed:
            yield dict(implementation=name, dtype=case.x.dtype.name, failed=failed[name])


def exceptions(rows: Iterable[dict]) -> list[dict]:
    """Where ours errs by more than twice the best of the others and the rounding of its dtype."""
    found = []
    for row in rows:
        ours = row["errors"][OURS]
        for quantity, own in ours.items():
            others = {
                name: results[quantity]["error"]
                for name, results in row["errors"].items()
                if name != OURS and results[quantity]["error"] is not None
            }
            if not others:
                continue
            best = min(others, key=others.__getitem__)
            if own["error"] is None or own["error"] > 2 * others[best] + own["rounding"]:
                where = dict(case=row["case"], dtype=row["dtype"], quantity=quantity)
                found.append(where | dict(ours=own["error"], best=others[best], of=best))
    return found


def run(quick: bool, names: Sequence[str] = NAMES) -> dict:
    """The whole result."""
    where = record.here()  # before: whatever changes meanwhile
    absent = missing(names)
    here = [name for name in names if name not in absent]
    rows, isolation, programs = [], [], {}
    count = sum(1 for _ in stress_cases.names(quick))
    for case in tqdm(stress_cases.cases(quick), total=count, disable=None):
        rows.append(judged(case, here, programs))
        if case.name == "mean/std = 1e1":
            isolation += isolated(case, here, programs)
    return dict(
        **where,
        settings=dict(quick=quick),
        missing=absent,
        rows=rows,
        isolation=isolation,
        exceptions=exceptions(rows),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small inputs, in half a minute")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder of the results")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"argument --out: {str(args.out)!r} is no folder")
    result = run(args.quick)
    text = stress_report.markdown(result)
    day, clock = result["date"][:10], result["date"][11:16].replace(":", "")
    name = f"{day}-{clock}-{result['device']['platform']}-stress"
    stem = args.out / (name + ("-quick" if args.quick else ""))
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(text)
    for suffix in (".json", ".md"):
        print(f"wrote {stem.with_suffix(suffix)}", file=sys.stderr)
    if unexplained := [e for e in result["exceptions"] if stress_report.why(e) is None]:
        sys.exit(f"exceptions without a reason: {unexplained}")


if __name__ == "__main__":
    main()
