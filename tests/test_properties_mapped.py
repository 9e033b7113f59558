"""Batches that are mapped: by `vmap` over calls, and spread over an axis of `vmap`.

On calls and numbers drawn by Hypothesis, as in `test_properties.py`.
"""

from functools import cache, partial

from cases import LONG, Case, Numbers, Params, cases, seeds
from derivatives import OURS, QUICK, assert_same, call, example, off_the_kinks, ours, results
from hypothesis import given, strategies as st
import jax
import numpy as np
import pytest

pytestmark = pytest.mark.long  # see the Makefile

NESTINGS = [((3,), False), ((2, 3), False), ((2, 3), True)]


@given(cases(long=8, short=2), seeds, st.sampled_from(NESTINGS if LONG else NESTINGS[-1:]))
def test_vmap_is_a_loop(case, seed, nesting):
    """Over everything, or all but scale, bias and mask, which the examples then share."""
    sizes_of_axes, shared = nesting
    total = int(np.prod(sizes_of_axes))
    singles = [example(case, seed._replace(seed=seed.seed + i)) for i in range(total)]
    if shared:
        singles = [
            off_the_kinks(
                case,
                one._replace(
                    mask=singles[0].mask,
                    params=one.params._replace(
                        scale=singles[0].params.scale, bias=singles[0].params.bias
                    ),
                ),
            )
            for one in singles
        ]

    def stacked(*leaves):
        return np.stack(leaves).reshape(*sizes_of_axes, *np.shape(leaves[0]))

    batch = jax.tree.map(stacked, *singles)
    if shared:
        params = batch.params._replace(scale=singles[0].params.scale, bias=singles[0].params.bias)
        batch = batch._replace(params=params, mask=singles[0].mask)
    with jax.enable_x64(case.wide):
        mapped = jax.tree.map(np.asarray, vmapped(case, len(sizes_of_axes), shared)(batch))
    for i, single in enumerate(singles):
        actual = jax.tree.map(lambda v, i=i: v[np.unravel_index(i, sizes_of_axes)], mapped)
        assert_same(case, single, actual, ours(case, single))


@cache
def vmapped(case: Case, depth: int, shared: bool):
    def f(params, mask, cotangent, direction):
        return results(partial(call, OURS, case), case, Numbers(params, mask, cotangent, direction))

    of_shared = None if shared else 0
    for _ in range(depth):
        f = jax.vmap(f, (Params(0, of_shared, of_shared, 0), of_shared, 0, 0))
    return jax.jit(lambda numbers: f(*numbers), compiler_options=QUICK)


def in_parts(f, case: Case, numbers: Numbers):
    """`results` with the batch spread over an axis of vmap."""
    batch = case.reduced[0]
    parts = 2 if case.shape[batch] % 2 == 0 else case.shape[batch]

    def split(v, axis):
        return v.reshape(*v.shape[:axis], parts, -1, *v.shape[axis + 1 :])

    def spread(params: Params, mask):
        of_mask = 0 if case.mask == "batch" else batch
        x, residual = (None if v is None else split(v, batch) for v in (params.x, params.residual))
        params = params._replace(x=x, residual=residual)
        of_params = Params(batch, None, None, batch)
        mapped = jax.vmap(
            partial(f, axis_name="i"),
            (of_params, None if mask is None else of_mask),
            ((batch, None, None), None),
            axis_name="i",
        )
        (y, mean, var), count = mapped(params, None if mask is None else split(mask, of_mask))
        return (y.reshape(case.shape), mean, var), count

    return results(spread, case, numbers)


def divisible(case: Case) -> bool:
    return bool(case.reduced) and case.mask != "spread" and case.shape[case.reduced[0]] > 1


@given(cases(long=12, fits=divisible), seeds)
def test_spread_over_an_axis_of_vmap_is_whole(case, seed):
    numbers = example(case, seed)
    assert_same(case, numbers, ours(case, numbers, of=in_parts), ours(case, numbers))
