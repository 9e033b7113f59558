"""Masks: a masked batch is the compacted batch, forward and in every gradient; D15."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

import jax_bn

VALID = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)


def arrays(shape=(8, 4), dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    x = np.asarray(3 + 2 * random.normal(size=shape), dtype)
    scale, bias = np.asarray(random.normal(size=(2, shape[-1])), dtype)
    return x, scale, bias


def loss(batch_norm, params, valid, **options):
    """Not linear in y, and blind to masked positions of it: they are somebody's padding."""
    y, stats = batch_norm(*params, **options)
    mean, var, _ = jax.tree.leaves(stats)
    y = y.astype(mean.dtype)
    values = jnp.where(valid, jnp.sin(y) * (1 + y), 0)
    return jnp.sum(values) + jnp.sum(mean * var)


def penalty(*args, **options):
    gradients = jax.tree.leaves(jax.grad(loss, argnums=1)(*args, **options))
    return sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in gradients)


def everything(batch_norm, params, valid, **options):
    """y at valid positions, statistics, and gradients of first and second order."""
    y, stats = batch_norm(*params, **options)
    first = jax.grad(loss, argnums=1)(batch_norm, params, valid, **options)
    second = jax.grad(penalty, argnums=1)(batch_norm, params, valid, **options)
    return jnp.where(valid, y, 0), jax.tree.leaves(stats), first, second


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf], ids=["clean", "nan", "inf"])
def test_masked_is_compacted(poison, dtype):
    params = arrays(dtype=dtype)
    compacted = params[0][VALID], *params[1:]
    x = np.where(VALID[:, None], params[0], np.asarray(poison, dtype))
    ours = jax.jit(partial(everything, partial(jax_bn.batch_norm, mask=VALID)))
    plain = jax.jit(partial(everything, jax_bn.reference.batch_norm))

    def compact(results):
        """The rows of valid examples of y and of both dx, the statistics and the rest."""
        y, stats, (dx, *first), (ddx, *second) = results
        for masked in (dx[~VALID], ddx[~VALID]):
            np.testing.assert_array_equal(masked, np.zeros_like(masked))
        return y[VALID], stats, (dx[VALID], *first), (ddx[VALID], *second)

    actual = compact(ours((x, *params[1:]), VALID[:, None]))
    everywhere = np.ones((5, 1), bool)
    expected = plain(compacted, everywhere)
    assert_as_accurate(actual, expected, in_float64(plain, compacted, everywhere), examples=5)


@pytest.mark.parametrize(
    "shape, axis, mask_shape",
    [
        ((6, 5, 4), -1, (6, 5)),
        ((6, 5, 4), -1, (6, 5, 1)),
        ((6, 5, 4), -1, (6, 1)),
        ((6, 5, 4), -1, (6, 5, 4)),
        ((6, 5, 4), -1, (1, 5, 4)),
        ((6, 4, 5), 1, (6, 5)),
        ((6, 4, 5), (0, 2), (4,)),
        ((6, 6), -1, (6,)),
        ((6, 5, 4), -1, ()),
    ],
)
def test_shapes_that_broadcast(shape, axis, mask_shape):
    random = np.random.default_rng(0)
    # Apart, so that no feature's few examples are almost equal.
    x = np.asarray(random.normal(size=shape) + 3 * np.indices(shape).sum(0), np.float32)
    mask = random.uniform(size=mask_shape) < 0.7
    features = {a % len(shape) for a in np.atleast_1d(axis)}
    if mask.ndim == len(shape) - len(features):  # over the batch axes
        aligned = np.expand_dims(mask, tuple(features))
    else:
        aligned = np.reshape(mask, (1,) * (len(shape) - mask.ndim) + mask.shape)
    aligned = np.broadcast_to(aligned, shape)

    def first_order(batch_norm, mask):
        return jax.jit(jax.value_and_grad(partial(loss, partial(batch_norm, mask=mask, axis=axis))))

    ours = first_order(jax_bn.batch_norm, mask)
    plain = first_order(jax_bn.reference.batch_norm, aligned)
    args = (x, None, None), aligned
    assert_as_accurate(ours(*args), plain(*args), in_float64(plain, *args), examples=x.size)


def test_integers_say_the_same_as_bools():
    x, scale, bias = arrays()
    expected, _ = jax_bn.batch_norm(x, scale, bias, mask=VALID)
    for dtype in (np.int32, np.uint8):
        y, _ = jax_bn.batch_norm(x, scale, bias, mask=VALID.astype(dtype))
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_nothing_valid(epsilon):
    x, scale, bias = arrays()
    mask = np.ones((8, 4), bool)
    mask[:, 2] = False
    x[:, 2] = [0, 1, -1, 1e30, 5, 5, 5, 5]
    batch_norm = partial(jax_bn.batch_norm, mask=mask, epsilon=epsilon)
    y, stats = batch_norm(x, scale, bias)
    assert (stats.count[2], stats.mean[2], stats.var[2]) == (0, 0, 0)
    np.testing.assert_array_equal(stats.count[np.array([0, 1, 3])], [8, 8, 8])
    np.testing.assert_array_equal(y[:, 2], np.full(8, bias[2]))
    for order in (loss, penalty):
        gradients = jax.jit(jax.grad(partial(order, batch_norm)))((x, scale, bias), mask)
        for g in gradients:
            assert np.isfinite(g).all()
            np.testing.assert_array_equal(g[..., 2], np.zeros_like(g[..., 2]))


def test_one_example_valid():
    x, scale, bias = arrays()
    y, stats = jax_bn.batch_norm(x, scale, bias, mask=np.arange(8) == 3)
    np.testing.assert_array_equal(stats.mean, x[3])
    np.testing.assert_array_equal(stats.var, np.zeros(4))
    np.testing.assert_array_equal(y[3], bias)


def test_nothing_valid_and_nan_everywhere():
    x = np.full((8, 4), np.nan, np.float32)
    _, stats = jax_bn.batch_norm(x, mask=np.zeros(8, bool))
    np.testing.assert_array_equal(stats.mean, np.zeros(4))
    dx = jax.grad(lambda x: jnp.sum(jax_bn.batch_norm(x, mask=np.zeros(8, bool))[0]))(x)
    np.testing.assert_array_equal(dx, np.zeros((8, 4)))


def test_a_cotangent_at_a_masked_position_reaches_nothing():
    """Somebody's padding may hold NaN in the cotangent as well."""
    params = arrays()
    y, vjp = jax.vjp(lambda *p: jax_bn.batch_norm(*p, mask=VALID)[0], *params)
    dy = np.ones_like(y)
    clean = vjp(jnp.asarray(dy))
    for bad in (np.nan, 1e30):
        for actual, expected in zip(
            vjp(jnp.asarray(np.where(VALID[:, None], dy, np.float32(bad)))), clean, strict=True
        ):
            np.testing.assert_array_equal(actual, expected)


def test_the_mask_is_stable_where_the_mean_is_large():
    x = np.asarray(1e4 + np.random.default_rng(0).normal(size=(4096, 4)), np.float32)
    mask = np.arange(4096) % 3 > 0
    x[~mask] = 0
    _, stats = jax_bn.batch_norm(x, mask=mask)
    exact = x[mask].astype(np.float64).var(0)
    np.testing.assert_allclose(stats.var, exact, rtol=8 * float(np.finfo(np.float32).eps))


def test_no_variance_is_negative():
    """Of a constant m2 is the difference of two small roundings, and 0 where that is below."""
    constant = np.random.default_rng(0).normal(size=64).astype(np.float32)
    _, stats = jax_bn.batch_norm(np.tile(constant, (7, 1)), mask=np.ones(7, bool))
    assert (stats.var >= 0).all() and stats.var.max() <= np.finfo(np.float32).eps ** 2


def test_under_vmap():
    x, scale, bias = arrays((3, 8, 4))[0], *arrays()[1:]
    masks = np.stack([VALID, ~VALID, np.ones(8, bool)])
    y, stats = jax.vmap(lambda x, m: jax_bn.batch_norm(x, scale, bias, mask=m))(x, masks)
    for i in range(3):
        expected, one = jax_bn.batch_norm(x[i], scale, bias, mask=masks[i])
        np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(stats.count[i], one.count)


def test_vmap_over_the_mask_alone():
    x, scale, bias = arrays()
    masks = np.stack([VALID, ~VALID, np.ones(8, bool)])

    def gradients(mask):
        return jax.grad(loss, argnums=1)(
            partial(jax_bn.batch_norm, mask=mask), (x, scale, bias), mask[:, None]
        )

    batched = jax.vmap(gradients)(masks)
    for i, mask in enumerate(masks):
        for a, b in zip(batched, gradients(mask), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


# ---- virtual batches -----------------------------------------------------------------------------


ALL_VALID = pytest.param(False, marks=pytest.mark.long)


@pytest.mark.parametrize("masked", [ALL_VALID, True])
@pytest.mark.parametrize(
    "shape, axis",
    [
        pytest.param((8, 4), -1, marks=pytest.mark.long),
        ((8, 3, 4), -1),
        pytest.param((4, 8, 3), 0, marks=pytest.mark.long),
    ],
)
def test_virtual_batches_are_batches(shape, axis, masked):
    random = np.random.default_rng(0)
    x = np.asarray(random.normal(size=shape), np.float32)
    features = shape[axis]
    scale, bias = np.asarray(random.normal(size=(2, features)), np.float32)
    batch = 1 if axis == 0 else 0
    batch_shape = tuple(n for a, n in enumerate(shape) if a != axis % len(shape))
    mask = random.uniform(size=batch_shape) < 0.7 if masked else None

    def split(x, scale, bias, mask=mask, batch_norm=jax_bn.reference.batch_norm):
        parts = []
        for i in (0, 4):
            part = jax.lax.slice_in_dim(x, i, i + 4, axis=batch)
            valid = None
            if mask is not None:
                valid = np.broadcast_to(np.expand_dims(mask[i : i + 4], axis), part.shape)
            parts.append(batch_norm(part, scale, bias, axis=axis, mask=valid)[0])
        return jnp.concatenate(parts, axis=batch), ()

    def ours(x, scale, bias):
        y, _ = jax_bn.batch_norm(x, scale, bias, axis=axis, mask=mask, virtual_batch_size=4)
        return y, ()

    def results(f, *params):
        first = jax.grad(lambda p: jnp.sum(jnp.sin(f(*p)[0])))
        second = jax.grad(lambda p: sum(jnp.sum(g**2) for g in first(p)))
        return f(*params)[0], first(params), second(params)

    params = x, scale, bias
    actual, plain = (jax.jit(partial(results, f)) for f in (ours, split))
    assert_as_accurate(actual(*params), plain(*params), in_float64(plain, *params), x.size)


def test_virtual_batches_report_the_statistics_of_the_whole_batch():
    x, _, _ = arrays()
    _, whole = jax_bn.batch_norm(x)
    _, stats = jax_bn.batch_norm(x, virtual_batch_size=2)
    np.testing.assert_allclose(stats.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var, whole.var, rtol=1e-5)
    np.testing.assert_array_equal(stats.count, whole.count)
    _, masked = jax_bn.batch_norm(x, mask=VALID, virtual_batch_size=2)
    _, expected = jax_bn.batch_norm(x, mask=VALID)
    np.testing.assert_allclose(masked.var, expected.var, rtol=1e-5)
    np.testing.assert_array_equal(masked.count, expected.count)
