"""Numbers under stress: the quick form of `benchmarks.stress`, beside the definition and Flax."""

from functools import cache

import numpy as np
import pytest

from benchmarks import stress, stress_cases, stress_report
from benchmarks.failures import OURS
from benchmarks.stress import DEFINITION, FLAX

JUDGES = (OURS, FLAX, DEFINITION)


@cache
def result():
    return stress.run(quick=True, names=JUDGES)


def test_never_worse_than_twice_the_best_but_for_the_reasons_named():
    assert not result()["missing"]
    judged = [row for row in result()["rows"] if row["errors"].keys() == set(JUDGES)]
    assert len(judged) == len(list(stress_cases.names(quick=True)))
    assert {row["dtype"] for row in judged} == set(stress_cases.DTYPES)
    unexplained = [e for e in result()["exceptions"] if stress_report.why(e) is None]
    assert not unexplained


def test_the_worst_case_of_the_shift_is_within_its_bound():
    """The one exception that is ours: two of the first three examples are the only outliers."""
    n, features = stress_cases.QUICK_SHAPE
    worst = "outliers of 1e4 std first and second"
    (row,) = (r for r in result()["rows"] if (r["case"], r["dtype"]) == (worst, "float32"))
    x = dict(stress_cases.inputs((n, features), "float32"))[worst]
    far = np.max((x[0] - x.mean(0)) ** 2 / x.var(0))  # (k - mean)^2/var, at most N/2
    eps = float(np.finfo("float32").eps)
    assert 0.4 * n < far < 0.6 * n
    assert 1e-6 < row["errors"][OURS]["var"]["error"] < eps * np.sqrt(n) * (1 + far)


@pytest.mark.parametrize("name", JUDGES)
def test_nan_and_infinity_stay_in_their_features(name):
    found = [row for row in result()["isolation"] if row["implementation"] == name]
    assert {row["dtype"]: row["changed"] for row in found} == {d: [] for d in stress_cases.DTYPES}


def test_a_worse_result_is_an_exception_without_a_reason():
    """What the first test rests on: neither an error nor an overflow goes unseen."""

    def row(ours, best):
        errors = {OURS: ours, FLAX: best}
        return dict(
            case="mean/std = 1e0",
            dtype="float32",
            errors={k: {"y": dict(error=v, rounding=1e-6)} for k, v in errors.items()},
        )

    assert not stress.exceptions([row(3e-6, 1.1e-6), row(None, None)])
    (worse,) = stress.exceptions([row(4e-6, 1.1e-6)])
    (overflow,) = stress.exceptions([row(None, 1.0)])
    assert stress_report.why(worse) is stress_report.why(overflow) is None


def test_errors_are_seen_in_each_quantity():
    """A result that is wrong by a thousandth of the unit errs by a thousandth."""
    case = next(stress_cases.cases(quick=True))
    dy, scale, bias = stress_cases.arguments(case.x)
    exact = stress_cases.exact(case.x, dy, scale, bias)
    whole = slice(None)
    right = dict(mean=exact.mean, var=exact.var, dscale=exact.dscale)
    right |= dict(y=exact.y(whole), dx=exact.dx(whole))
    wrong = {name: np.array(v) for name, v in right.items()}
    for name, v in wrong.items():
        v.flat[-1] += 1e-3 * exact.unit[name]
    for name, found in stress.errors(wrong, exact).items():
        np.testing.assert_allclose(found["error"], 1e-3, rtol=1e-6, err_msg=name)
    for found in stress.errors(right, exact).values():
        assert found["error"] == 0


def test_report_names_what_is_compared():
    text = stress_report.markdown(result())
    for name in JUDGES:
        assert f"| {name} |" in text
    assert text.count("**no**") == len(result()["exceptions"]) > 0
    for reason in ("No reason is known", "Not there"):
        assert reason not in text
