"""What holds for every call of `batch_norm` on a batch that is spread over several devices.

On calls and numbers drawn by Hypothesis, as in `tests/test_properties.py`.
"""

from functools import cache

from cases import Case, Numbers, Params, cases, numbers, seeds
from derivatives import assert_same, off_the_kinks, ours, results
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import pytest

pytestmark = pytest.mark.long  # see the Makefile


def spread(case: Case) -> bool:
    return bool(case.reduced) and case.mask != "spread" and case.epsilon > 0


def long_enough(case: Case) -> Case:
    """One or two examples on each device along the batch axis."""
    batch, shape = case.reduced[0], list(case.shape)
    shape[batch] = 8 * (1 + shape[batch] % 2)
    return case._replace(shape=tuple(shape))


@cache
def over(devices, check_vma: bool):
    """`derivatives.results` of a batch over these devices, differentiated from outside."""
    mesh = jax.make_mesh((len(devices),), ("i",), (AxisType.Auto,), devices=devices)

    def of_sharded(f, case: Case, numbers: Numbers):
        batch = case.reduced[0]
        of_x = P(*[None] * batch, "i")
        of_mask = P("i") if case.mask == "batch" else of_x
        of_statistics = P() if check_vma else P("i")  # without tracking each device returns its own

        def local(params, mask):
            (y, *statistics), count = f(params, mask, axis_name="i")
            statistics = jax.tree.map(jnp.asarray, (*statistics, count))
            return y, statistics if check_vma else jax.tree.map(lambda v: v[None], statistics)

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(Params(of_x, P(), P(), of_x), of_mask),
            out_specs=(of_x, of_statistics),
            check_vma=check_vma,
        )

        def whole(params, mask):
            y, statistics = mapped(params, mask)
            mean, var, count = statistics if check_vma else [v[0] for v in statistics]
            return (y, mean, var), count

        return results(whole, case, numbers)

    return of_sharded


@given(
    cases(long=6, short=2, fits=spread).map(long_enough),
    seeds,
    st.sampled_from([(8, True), (2, False), (4, True), (8, False)]),
)
def test_sharded_is_whole(devices, case, seed, how):
    count, check_vma = how
    made = off_the_kinks(case, numbers(case, seed))
    sharded = ours(case, made, of=over(tuple(devices[:count]), check_vma))
    assert_same(case, made, sharded, ours(case, made))
