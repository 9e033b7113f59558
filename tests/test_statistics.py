"""`BatchStats`, their merge, and the running averages."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn
from jax_bn import BatchStats, merge_stats, update_running_stats


@pytest.fixture
def x():
    return jnp.asarray(3 + 2 * np.random.default_rng(0).normal(size=(12, 4)), jnp.float32)


def stats_of(x, **options) -> BatchStats:
    return jax_bn.batch_norm(x, **options)[1]


def close(a: BatchStats, b: BatchStats):
    for name in ("mean", "var", "count"):
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_count_is_one_number_a_feature(x):
    np.testing.assert_array_equal(stats_of(x).count, np.full(4, 12))
    np.testing.assert_array_equal(stats_of(x, axis=0).count, np.full(12, 4))
    assert stats_of(x.astype(jnp.bfloat16)).count.dtype == np.float32


@pytest.mark.parametrize("unbiased", [False, True])
def test_running_averages(x, unbiased):
    mean, var = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    stats = stats_of(x)
    new_mean, new_var = update_running_stats(mean, var, stats, momentum=0.9, unbiased=unbiased)
    batch_var = np.var(x, axis=0, ddof=int(unbiased))
    np.testing.assert_allclose(new_mean, 0.9 * mean + 0.1 * np.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(new_var, 0.9 * var + 0.1 * batch_var, rtol=1e-5)


@pytest.mark.parametrize("momentum, kept", [(0.0, "new"), (1.0, "old")])
def test_momentum_is_the_weight_of_the_old(x, momentum, kept):
    stats = stats_of(x)
    old = np.zeros(4, np.float32), np.ones(4, np.float32)
    expected = {"old": old, "new": (stats.mean, stats.var)}[kept]
    actual = update_running_stats(*old, stats, momentum=momentum)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


def test_dtypes_of_the_running_averages_are_kept(x):
    old = jnp.zeros(4, jnp.bfloat16), jnp.ones(4, jnp.float16)
    mean, var = update_running_stats(*old, stats_of(x))
    assert (mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float16)
    old = jnp.zeros(4, jnp.float32), jnp.ones(4, jnp.float32)
    mean, var = update_running_stats(*old, stats_of(x.astype(jnp.complex64)))
    assert (mean.dtype, var.dtype) == (jnp.complex64, jnp.float32)


def test_a_feature_with_nothing_valid_keeps_its_averages(x):
    mask = np.ones((12, 4), bool)
    mask[:, 1] = False
    old = np.full(4, 7, np.float32), np.full(4, 5, np.float32)
    for unbiased in (False, True):
        update = jax.jit(lambda *a, u=unbiased: update_running_stats(*a, unbiased=u))
        mean, var = update(*old, stats_of(x, mask=mask))
        assert mean[1] == 7 and var[1] == 5
        assert (np.asarray(mean)[[0, 2, 3]] != 7).all() and np.isfinite(var).all()


def test_one_example_has_no_unbiased_variance(x):
    old = jnp.zeros(4), jnp.ones(4)
    with pytest.raises(ValueError, match="unbiased=True with a batch of one example"):
        update_running_stats(*old, stats_of(x[:1]), unbiased=True)
    with pytest.raises(ValueError, match="unbiased=True"):  # known while tracing
        jax.jit(lambda x: update_running_stats(*old, stats_of(x), unbiased=True))(x[:1])
    update_running_stats(*old, stats_of(x[:1]))
    # Known only when the program runs: the variance is kept, the mean is averaged.
    mask = jnp.arange(12) < 1
    update = jax.jit(lambda m: update_running_stats(*old, stats_of(x, mask=m), unbiased=True))
    mean, var = update(mask)
    np.testing.assert_array_equal(var, np.ones(4))
    np.testing.assert_allclose(mean, 0.01 * np.asarray(x[0]), rtol=1e-5)


@pytest.mark.parametrize(
    "mean, var, options, message",
    [
        (np.zeros(3), np.ones(4), {}, r"mean has shape \(3,\); expected \(4,\)"),
        (np.zeros(4), np.ones((1, 4)), {}, r"var has shape \(1, 4\); expected \(4,\)"),
        (np.zeros(4), np.ones(4), {"momentum": 1.5}, "momentum=1.5; expected a weight"),
        (np.zeros(4), np.ones(4), {"momentum": -0.1}, "momentum=-0.1; expected a weight"),
        (np.zeros(4), np.ones(4), {"momentum": np.float32(3)}, "momentum=3.0; expected a weight"),
        (np.zeros(4, int), np.ones(4), {}, "mean has dtype int(32|64); expected a float"),
    ],
)
def test_update_refuses(x, mean, var, options, message):
    mean, var = (v if v.dtype == int else v.astype(np.float32) for v in (mean, var))
    with pytest.raises((TypeError, ValueError), match=message):
        update_running_stats(mean, var, stats_of(x), **options)


def test_merged_batches_are_one_batch(x):
    close(merge_stats(stats_of(x[:5]), stats_of(x[5:6]), stats_of(x[6:])), stats_of(x))


def test_merging_does_not_cancel(x):
    far = x.at[6:].add(1e4)
    merged = merge_stats(stats_of(far[:6]), stats_of(far[6:]))
    exact = np.asarray(far, np.float64).var(0)
    np.testing.assert_allclose(merged.var, exact, rtol=8 * float(np.finfo(np.float32).eps))


def test_zeros_start_an_accumulation(x):
    start = BatchStats(jnp.zeros(4), jnp.zeros(4), jnp.zeros(4))

    def accumulate(carry, micro):
        stats = stats_of(micro)
        return merge_stats(carry, stats), None

    total, _ = lax.scan(accumulate, start, x.reshape(3, 4, 4))
    close(total, stats_of(x))
    close(merge_stats(start, start), start)


def test_merging_is_differentiable(x):
    def of_parts(x):
        merged = merge_stats(stats_of(x[:5]), stats_of(x[5:]))
        return jnp.sum(merged.mean**2 * merged.var)

    def of_whole(x):
        stats = stats_of(x)
        return jnp.sum(stats.mean**2 * stats.var)

    np.testing.assert_allclose(jax.grad(of_parts)(x), jax.grad(of_whole)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "got no statistics"),
        ((stats_of(np.ones((2, 3))), stats_of(np.ones((2, 4)))), "have shapes"),
        ((BatchStats(jnp.ones(2), jnp.ones(2), jnp.ones(())),), "have shapes"),
        (([stats_of(np.ones((2, 3)))],), "got a list; expected BatchStats"),
    ],
)
def test_merge_refuses(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        merge_stats(*args)
