"""What holds for every call of `batch_norm`, on calls and numbers drawn by Hypothesis.

`make fuzz` draws more of both. Mapped calls are in `test_properties_mapped.py`, those over several
devices in `devices/test_properties.py`.
"""

from functools import partial
from typing import Any

from cases import Case, Numbers, Params, cases, numbers, seeds
from derivatives import (
    OURS,
    assert_alike,
    assert_is_definition,
    assert_same,
    call,
    definition,
    example,
    first_order,
    off_the_kinks,
    oracle,
    ours,
    rounding,
    seen,
    tangents,
    terms,
)
from hypothesis import given, strategies as st
import jax
import numpy as np
import pytest
from sizes import Results, facts, sizes, tangent_sizes, wide
from tolerance import assert_as_accurate

import jax_bn

pytestmark = pytest.mark.long  # see the Makefile


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Not kept for the tests of other files."""
    yield
    jax.clear_caches()


@given(cases(long=40), seeds)
def test_value_and_derivatives_are_those_of_the_definition(case, seed):
    numbers = example(case, seed)
    assert_is_definition(case, numbers, ours(case, numbers))


@given(cases(long=40, fits=lambda case: case.differentiable), seeds)
def test_dx_is_orthogonal_to_constants_and_but_for_epsilon_to_x_hat(case, seed):
    """D17: 1^T dx = 0, and x_hat^T dx = scale*rstd^3*epsilon*dscale, which is 0 without epsilon."""
    numbers = example(case, seed)
    dy, *of_statistics = numbers.cotangent
    numbers = numbers._replace(cotangent=(dy, *map(np.zeros_like, of_statistics)))
    valid, n, mean, rstd = facts(case, numbers)
    first = ours(case, numbers).first
    dx = wide(first.x)
    np.testing.assert_array_equal(dx[~valid], 0)

    def total(v):
        return np.sum(v, case.reduced, keepdims=True)

    size = sizes(case, numbers).first
    off = rounding(case, first.x, case.eps * size.x)
    assert np.all(np.abs(total(dx)) <= n * off)
    if case.scale is None or case.complex:
        return
    x_hat = np.where(valid, wide(numbers.params.x) - mean, 0) * rstd
    of = first.scale, numbers.params.scale
    dscale, scale = (np.expand_dims(wide(v), case.reduced) for v in of)
    factor = scale * rstd**3 * case.epsilon
    of_dscale = rounding(case, first.scale, case.eps * size.scale)
    off = n * off * np.abs(x_hat).max(initial=0) + np.abs(factor) * of_dscale
    assert np.all(np.abs(total(x_hat * dx) - factor * dscale) <= off)


@given(cases(long=40), seeds)
def test_the_order_of_the_batch_is_nothing(case, seed):
    numbers = example(case, seed)
    random = np.random.default_rng(seed.seed)
    orders = {a: random.permutation(case.shape[a]) for a in case.reduced}

    def permuted(v, back=False):
        return v if v is None else taken(v, list(orders), list(orders.values()), back)

    def of(params: Params, back=False):
        return params._replace(x=permuted(params.x, back), residual=permuted(params.residual, back))

    params, mask, (dy, *rest), direction = numbers
    if mask is not None:
        axes = range(mask.ndim) if case.mask == "batch" else list(orders)
        mask = taken(mask, list(axes), list(orders.values()))
    other = ours(case, Numbers(of(params), mask, (permuted(dy), *rest), of(direction)))
    back = other._replace(
        y=permuted(other.y, True), first=of(other.first, True), second=of(other.second, True)
    )
    assert_same(case, numbers, back, ours(case, numbers))


def taken(v, axes, orders, back=False):
    for a, order in zip(axes, orders, strict=True):
        if v.shape[a] > 1:
            v = np.take(v, np.argsort(order) if back else order, a)
    return v


@given(
    cases(long=12, fits=lambda case: case.x in ("float32", "float64", "complex64")),
    seeds,
    st.sampled_from([0.25, 2.0, 16.0]),
    st.sampled_from([0.0, -7.0, 100.0]),
)
def test_scale_and_shift_of_x_are_nothing(case, seed, a, b):
    """x -> a*x + b, exact here, with epsilon -> a^2*epsilon: y stays, dx becomes dx/a."""
    if case.epsilon:
        a = 4.0  # one other program
    seed = seed._replace(kind="grid", location=0.0, spread=1.0)
    here = example(case, seed)
    (x, *params), mask, (dy, dmean, dvar), direction = here
    along = None if direction.x is None else a * direction.x
    there = Numbers(
        Params((a * x + b).astype(x.dtype), *params),
        mask,
        (dy, dmean / a, dvar / a**2),
        direction._replace(x=along),
    )
    case_there = case._replace(epsilon=a**2 * case.epsilon)

    def back(of: Results, b):
        def scaled(v: Params):
            return v if v.x is None else v._replace(x=(a * v.x).astype(v.x.dtype))

        mean, var = (of.mean - b) / a, of.var / a**2
        return Results(of.y, mean, var, scaled(of.first), scaled(of.second))

    known = np.squeeze(facts(case, here).count, case.reduced) > 0  # the mean of nothing stays 0
    expected = ours(case, here)
    actual = back(ours(case_there, there), np.asarray(b * known, expected.mean.dtype))
    larger = jax.tree.map(np.maximum, sizes(case, here), back(sizes(case_there, there), 0))
    actual, expected = (seen(case, here, v) for v in (actual, expected))
    assert_alike(case, actual, expected, larger)


def masked_somewhere(case: Case) -> bool:
    return case.mask in ("batch", "x") and bool(case.features) and case.examples > 1


@given(cases(long=12, fits=masked_somewhere), seeds, st.sampled_from([0.0, np.nan, np.inf, -1e4]))
def test_masked_is_compacted(case, seed, poison):
    """Half of the examples are cut out: the same for all features, or others for each."""
    random = np.random.default_rng(seed.seed + 2)
    n, features = case.examples, int(np.prod(case.feature_shape))
    kept = np.argsort(random.uniform(size=(n, features)), 0)[: (n + 1) // 2]  # [K, C]
    if case.mask == "batch":
        kept = np.broadcast_to(kept[:, :1], kept.shape)
    valid = np.zeros((n, features), bool)
    np.put_along_axis(valid, kept, True, 0)
    order = *case.reduced, *case.features
    moved = tuple(case.shape[a] for a in order)

    def spread(v):  # [N, C] -> x's shape
        return np.transpose(v.reshape(moved), np.argsort(order))

    def compact(v):  # x's shape -> [K, ...]
        rows = np.transpose(v, order).reshape(n, features)
        return np.take_along_axis(rows, kept, 0).reshape(-1, *case.feature_shape)

    def compact_params(of: Params):
        x, residual = (None if v is None else compact(v) for v in (of.x, of.residual))
        return of._replace(x=x, residual=residual)

    whole = np.all(valid, 1) if case.mask == "batch" else spread(valid)
    mask = np.asarray(whole, case.mask_dtype)
    if case.mask == "batch":
        mask = mask.reshape([case.shape[a] for a in case.reduced])
    clean = numbers(case, seed)._replace(mask=mask)
    few = Case(
        *case._replace(
            shape=((n + 1) // 2, *case.feature_shape),
            axis=tuple(range(1, 1 + len(case.feature_shape))),
            mask=None,
        )
    )
    clean = off_the_kinks(case, clean)
    dy, *rest = clean.cotangent
    cut = Numbers(
        compact_params(clean.params), None, (compact(dy), *rest), compact_params(clean.direction)
    )

    def poisoned(v):
        if v is None or not np.issubdtype(np.asarray(v).dtype, np.inexact):
            return v
        return np.where(spread(valid), v, np.asarray(poison, v.dtype))

    params = clean.params._replace(
        x=poisoned(clean.params.x) if case.differentiable else clean.params.x,
        residual=poisoned(clean.params.residual),
    )
    actual = ours(case, clean._replace(params=params, cotangent=(poisoned(dy), *rest)))
    for v in (actual.first.x, actual.first.residual, actual.second.x, actual.second.residual):
        if v is not None:
            np.testing.assert_array_equal(v[~spread(valid)], 0)
    actual = actual._replace(
        y=compact(actual.y),
        first=compact_params(actual.first),
        second=compact_params(actual.second),
    )
    assert_same(few, cut, actual, ours(few, cut))


@given(cases(long=8, short=1), seeds)
def test_traced_is_eager(case, seed):
    """First derivatives: the second take hundreds of operations, each compiled by itself."""
    numbers = example(case, seed)
    with jax.enable_x64(case.wide):
        eager = jax.tree.map(np.asarray, first_order(partial(call, OURS, case), case, numbers))
    traced = ours(case, numbers, of=first_order)
    assert_same(case, numbers, eager, traced)


@given(cases(long=15), seeds)
def test_forward_mode_has_the_gradients_of_the_default(case, seed):
    numbers = example(case, seed)
    actual = ours(case._replace(forward_mode=True), numbers)
    assert_same(case, numbers, actual, ours(case, numbers))


@given(cases(long=15), seeds)
def test_tangents_are_those_of_the_definition(case, seed):
    numbers = example(case, seed)
    away = numbers.cotangent[0] != 0  # from kinks, and some more
    valid = facts(case, numbers).valid

    def kept(of):
        y, *statistics = of
        return (np.where(away & valid, y, np.zeros_like(y)), *statistics)

    actual = ours(case._replace(forward_mode=True), numbers, of=tangents)
    of_terms = terms(case, tangent_sizes(case, numbers), actual)
    plain, exact = (f(case, numbers, of=tangents) for f in (definition, oracle))
    assert_as_accurate(kept(actual), kept(plain), kept(exact), case.examples, of_terms)


def again(f, case: Case, numbers: Numbers):
    """y, and y once more, by the statistics that came with it."""
    (y, mean, var), _ = f(numbers.params, numbers.mask)
    x, scale, bias, residual = numbers.params
    options: Any = dict(axis=case.axis, epsilon=case.epsilon, dtype=case.dtype)
    options |= dict(residual=residual, activation=case.activation)
    return y, jax_bn.normalize(x, mean, var, scale, bias, **options)


@given(cases(long=15), seeds)
def test_normalize_with_the_statistics_of_the_batch(case, seed):
    numbers = example(case, seed)
    valid = facts(case, numbers).valid
    expected, actual = (np.where(valid, v, np.zeros_like(v)) for v in ours(case, numbers, of=again))
    assert_alike(case, actual, expected, sizes(case, numbers).y)
