"""The closed form against `jax.grad` of the definition, over everything that may vary.

Each case compares y, the statistics, the gradient and the gradient of a penalty on the gradient
with the definition's, by the tolerance policy of `tolerance.py`.
"""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64, narrowed

import jax_bn

LAYOUTS = {  # shape, feature axis or axes
    "rank 1, no feature axis": ((9,), ()),
    "rank 2": ((9, 4), -1),
    "rank 2, features first": ((4, 9), 0),
    "rank 3, features in the middle": ((5, 4, 3), 1),
    "rank 4": ((3, 4, 2, 5), -1),
    "rank 4, features second": ((3, 5, 4, 2), 1),
    "rank 5, two feature axes": ((3, 2, 2, 3, 2), (1, -1)),
}
EVERYWHERE = ["bfloat16", "float32", "complex64"]
SOMEWHERE = ["float16", "float64", "complex128"]  # the same code: at one rank or two


def arrays(shape, axis, dtype, affine="both", seed=0) -> tuple[Any, Any]:
    """x, weights of y and of the statistics for a loss, and scale and bias or None."""
    random = np.random.default_rng(seed)
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in axes))

    def normal(shape):
        v = random.normal(size=shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            v = v + 1j * random.normal(size=shape)
        return np.asarray(v, jnp.dtype(dtype))

    x = normal(shape) * np.asarray(2, dtype) + np.asarray(3, dtype)
    scale = normal(features) if affine in ("both", "scale") else None
    bias = normal(features) if affine in ("both", "bias") else None
    real = jnp.finfo(dtype).dtype
    weights = normal(shape), *(np.asarray(random.normal(size=features), real) for _ in range(2))
    return (x, scale, bias), weights


def parts(batch_norm, params, **options):
    """y, mean and var of either implementation."""
    y, stats = batch_norm(*params, **options)
    mean, var, _ = jax.tree.leaves(stats)
    return y, mean, var


def loss(batch_norm, params, weights, use_stats, **options):
    """A scalar that weighs every entry of y differently and is not linear in it."""
    y, mean, var = parts(batch_norm, params, **options)
    wy, wm, wv = weights
    y, wy = y.astype(mean.dtype), wy.astype(mean.dtype)
    total = jnp.sum(jnp.real(wy * (y + y * y)))
    if use_stats is None:
        return total
    of_stats = wm.astype(var.dtype) * jnp.real(mean) + wv.astype(var.dtype) * var**2
    return total + use_stats.astype(var.dtype) * jnp.sum(of_stats)


def penalty(*args, **options):
    """The squared norm of the gradient: its own gradient is of second order."""
    gradients = jax.tree.leaves(jax.grad(loss, argnums=1)(*args, **options))
    wide = [g.astype(jnp.float32) if jnp.finfo(g.dtype).bits < 32 else g for g in gradients]
    return sum(jnp.sum(jnp.real(g * jnp.conj(g))) for g in wide)


def derivatives(batch_norm, orders, params, weights, use_stats, **options):
    """y, mean and var; gradients; gradients of a penalty on the gradients."""
    results = [parts(batch_norm, params, **options)]
    for f in (loss, penalty)[:orders]:
        results.append(jax.grad(f, argnums=1)(batch_norm, params, weights, use_stats, **options))
    return results


def check(params, weights, *, axis, orders=2, use_stats=(0.0, 1.0), dtype=None, **options):
    """Compares up to the given order, for each weight of the statistics in the loss."""
    examples = max(1, np.size(params[0]) // max(1, np.size(weights[1])))
    options = dict(axis=axis, **options)

    def of(batch_norm, **more):
        return jax.jit(partial(derivatives, batch_norm, orders, **options, **more))

    ours, definition = (
        of(f, dtype=dtype) for f in (jax_bn.batch_norm, jax_bn.reference.batch_norm)
    )
    oracle = of(jax_bn.reference.batch_norm)
    for use in use_stats:
        args = params, weights, use if use is None else np.float32(use)
        plain = definition(*narrowed(args))
        assert_as_accurate(ours(*args), plain, in_float64(oracle, *args), examples)


@pytest.fixture
def precision(dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        yield


@pytest.mark.parametrize(
    "layout, dtype",
    [*product(LAYOUTS, EVERYWHERE), *product(["rank 2", "rank 5, two feature axes"], SOMEWHERE)],
)
def test_layouts(layout, dtype, precision):
    shape, axis = LAYOUTS[layout]
    params, weights = arrays(shape, axis, dtype)
    # The second order takes most of the time to compile: every layout in float32, every dtype once.
    check(params, weights, axis=axis, orders=2 if dtype == "float32" or layout == "rank 2" else 1)


@pytest.mark.parametrize("affine", ["none", "both"])
def test_statistics_that_no_one_uses(affine):
    params, weights = arrays((6, 4), -1, "float32", affine)
    check(params, weights, axis=-1, use_stats=[None])


@pytest.mark.parametrize("affine", ["none", "scale", "bias"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_scale_or_bias(affine, dtype):
    params, weights = arrays((6, 3, 4), -1, dtype, affine)
    check(params, weights, axis=-1, orders=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("y_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("affine_dtype", ["float32", "bfloat16"])
def test_mixed_dtypes(dtype, y_dtype, affine_dtype):
    (x, scale, bias), weights = arrays((8, 4), -1, dtype)
    params = x, scale.astype(affine_dtype), bias.astype(affine_dtype)
    check(params, weights, axis=-1, orders=1, dtype=y_dtype)
    y, stats = jax_bn.batch_norm(*params, dtype=y_dtype)
    assert y.dtype == (y_dtype or dtype)
    assert stats.mean.dtype == stats.var.dtype == stats.count.dtype == np.float32


def test_integers_are_taken_as_float32():
    x = np.arange(12).reshape(6, 2)
    y, stats = jax_bn.batch_norm(x)
    expected, _ = jax_bn.batch_norm(x.astype(np.float32))
    assert y.dtype == stats.mean.dtype == np.float32
    np.testing.assert_array_equal(y, expected)


def test_one_example_is_legal_and_teaches_nothing():
    params, weights = arrays((1, 4), -1, "float32")
    dx, dscale, dbias = jax.grad(loss, argnums=1)(jax_bn.batch_norm, params, weights, None, axis=-1)
    y, stats = jax_bn.batch_norm(*params)
    np.testing.assert_array_equal(y, params[2][None])
    np.testing.assert_array_equal(stats.mean, params[0][0])
    np.testing.assert_array_equal(stats.var, np.zeros(4))
    np.testing.assert_array_equal(dx, np.zeros((1, 4)))
    np.testing.assert_array_equal(dscale, np.zeros(4))
    np.testing.assert_allclose(dbias, weights[0][0] * (1 + 2 * params[2]), rtol=1e-6)


def test_two_examples_are_the_fewest_that_teach():
    """With next to no epsilon x_hat would be 1 and -1, whatever x is, and dx would be rounding."""
    params, weights = arrays((2, 4), -1, "float32")
    check(params, weights, axis=-1, epsilon=1.0, orders=1, use_stats=[None])


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0])
def test_epsilon(epsilon):
    params, weights = arrays((8, 4), -1, "float32")
    check(params, weights, axis=-1, epsilon=epsilon)


def test_a_penalty_on_the_gradient_is_differentiated_through_the_statistics():
    """A rule whose mean and rstd were constants would pass every test of first order."""
    params, weights = arrays((8, 4), -1, "float32")

    def second(batch_norm):
        return jax.grad(penalty, argnums=1)(batch_norm, params, weights, None, axis=-1)[0]

    def frozen(x, scale, bias, **options):
        _, stats = jax_bn.reference.batch_norm(x, scale, bias, **options)
        mean, var, count = jax.lax.stop_gradient(stats)
        return jax_bn.normalize(x, mean, var, scale, bias, axis=-1), (mean, var, count)

    gradient, wrong = second(jax_bn.batch_norm), second(frozen)
    assert np.abs(gradient - wrong).max() > 1e-3 * np.abs(gradient).max()
