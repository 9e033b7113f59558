"""Sums on CPUs: without a shift, of large x near 0; and of few features, in rows.

See `_compiler.shifted_if_far` and `_compiler.sum_of`.
"""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bn import _stages, batch_norm, reference
from jax_bn._compiler import NEAR, sum_of

N, C = 8192, 8  # 2^16 numbers: the fewest of which this is so
FLOAT32 = jnp.dtype("float32")
EPS = float(np.finfo("float32").eps)

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is done on CPUs")
moments = partial(_stages.moments, mask=None, axes=(0,), dtype=FLOAT32)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def x(random):
    x = random.normal(size=(N, C))
    return ((x - x.mean(0)) / x.std(0)).astype("float32")


def shifts(x):
    _, shift, _, _ = jax.jit(moments)(x)
    return np.asarray(shift)[0]


def of_three(x):
    return np.median(x[:3], 0)


def test_near_0_there_is_no_shift(x):
    assert not shifts(x).any()
    assert not shifts(x + np.float32(0.95 * NEAR**0.5)).any()
    assert not shifts(x * np.float32(1e-15)).any()
    assert not shifts(np.zeros_like(x)).any()


@pytest.mark.parametrize("far", [1.05 * NEAR**0.5, -1e4, np.nan, np.inf])
def test_one_feature_far_from_0_gives_all_their_shift(far, x):
    x[:, 3] += np.float32(far)
    np.testing.assert_array_equal(shifts(x), of_three(x))


def test_squares_that_overflow_are_not_believed(x):
    """sum(x^2) is beyond float32, sum((x - mean)^2) is not."""
    x = (x + np.float32(2.5)) * np.float32(1e17)
    assert (np.square(x, dtype="float64").sum(0) > np.finfo("float32").max).all()
    np.testing.assert_array_equal(shifts(x), of_three(x))
    _, stats = batch_norm(x)
    np.testing.assert_allclose(stats.var, x.astype("float64").var(0), rtol=8 * EPS)


def test_neither_small_x_nor_few_examples(x):
    assert shifts(x[:-1]).any()
    assert shifts(x.reshape(16, -1)).any()
    assert not shifts(x.reshape(64, -1)).any()


def test_programs_that_may_run_elsewhere_have_no_conditional(x):
    """And no program but a CPU's: elsewhere both sums are one, and a shift costs nothing."""
    traced = jax.jit(moments).trace(x)
    assert traced.lower().as_text().count("stablehlo.case") == 1
    assert "stablehlo.case" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.case" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    exported = jax.export.export(jax.jit(moments), platforms=("cpu",))(x)
    assert "stablehlo.case" not in exported.mlir_module()
    mapped = jax.jit(jax.vmap(moments)).lower(np.stack([x, x]))
    assert "stablehlo.case" not in mapped.as_text()


@pytest.mark.parametrize("mean", [0, 1, 0.95 * NEAR**0.5, 1.05 * NEAR**0.5, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_error_of_the_statistics(dtype, mean, x):
    """Within the docstring's bound on both sides of the boundary, with sums that err by few eps."""
    x = jnp.asarray(x + np.float32(mean), dtype)
    _, stats = jax.jit(batch_norm)(x)
    exact = np.asarray(x, "float64")
    far = (shifts(x) - exact.mean(0)) ** 2 / exact.var(0)
    assert (far <= 8).all()
    assert (np.abs(stats.var / exact.var(0) - 1) <= 4 * EPS * (1 + far)).all()
    error = np.abs(np.asarray(stats.mean, "float64") - exact.mean(0))
    assert (error <= 2 * EPS * (np.abs(exact.mean(0)) + exact.std(0))).all()


@pytest.mark.parametrize("mean", [0, 5])
def test_gradients(mean, x, random):
    """Of first and second order, beside those of the definition in float64."""
    x = x + np.float32(mean)
    scale, bias, dy, dx = (random.normal(size=s) for s in ((C,), (C,), (N, C), (N, C)))

    def derivatives(f, dtype):
        def loss(*args):
            return jnp.sum(f(*args)[0] * dy.astype(dtype))

        args = tuple(v.astype(dtype) for v in (x, scale, bias))
        first = jax.grad(loss, (0, 1, 2))

        def along(*args):
            return jnp.vdot(first(*args)[0], dx.astype(dtype))

        return jax.jit(lambda *args: (first(*args), jax.grad(along, (0, 1))(*args)))(*args)

    found = derivatives(batch_norm, "float32")
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, derivatives(reference.batch_norm, "float64"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_under_scan_and_remat(x):
    """A conditional within other control flow."""

    def f(x):
        return jnp.sum(jnp.sin(batch_norm(x)[0]))

    def scanned(x):
        return jax.lax.scan(lambda s, x: (s + jax.checkpoint(f)(x), None), 0.0, x[None])[0]

    for v in (x, x + np.float32(5)):
        a, b = jax.jit(jax.grad(f))(v), jax.jit(jax.grad(scanned))(v)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


# ---- few features --------------------------------------------------------------------------------


def summed(x, mean):
    axes = tuple(range(x.ndim - 1))
    return sum_of(lambda x, mean: x.astype("float32") - mean, (x, mean), axes)


@pytest.mark.parametrize(
    "shape, row",  # examples in a row times features
    [
        ((4096, 1), 128),
        ((4096, 2), 128),
        ((16, 32, 8, 3), 32 * 3),
        ((2000, 5), 25 * 5),
        ((1001, 7), 13 * 7),
        ((4099, 1), 1),  # a prime
        ((256, 16), 128),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_features_are_summed_in_rows(shape, row, dtype, random):
    x = jnp.asarray(random.normal(size=shape), dtype)
    mean = jnp.asarray(random.normal(size=shape[-1:]), "float32").reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )
    lowered = jax.jit(summed).trace(x, mean)
    rows = f"tensor<{x.size // row}x{row}x{'f32' if dtype == 'float32' else 'bf16'}>"
    assert rows in lowered.lower().as_text()
    elsewhere = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "optimization_barrier" not in elsewhere
    exact = np.asarray(x, "float64") - np.asarray(mean, "float64")
    found, n = jax.jit(summed)(x, mean), x.size // shape[-1]
    assert found.shape == mean.shape
    np.testing.assert_allclose(found.ravel(), exact.reshape(n, -1).sum(0), rtol=0, atol=8 * n * EPS)
    np.testing.assert_allclose(
        found, summed(x, mean), rtol=0, atol=8 * n * EPS
    )  # eager: as they lie


@pytest.mark.parametrize("shape", [(8192, 17), (2047, 2), (4096, 0), (0, 4)])
def test_others_are_not(shape):
    x, mean = jnp.ones(shape), jnp.ones((1, shape[-1]))
    text = jax.jit(summed).lower(x, mean).as_text()
    assert "optimization_barrier" not in text


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jnp.tanh])
def test_gradients_of_few_features(activation, features, random):
    """With all that is kept in the inputs of the sums: the residual, and y."""
    shape = 6, 32, 32, features
    x, residual, dy = (jnp.asarray(random.normal(size=shape), "float32") for _ in range(3))
    scale, bias = (jnp.asarray(random.normal(size=features), "float32") for _ in range(2))

    def derivatives(f, dtype):
        def loss(x, scale, bias, residual):
            y, mean, var = f(x, scale, bias, residual)
            return jnp.sum(y * dy.astype(dtype)) + jnp.sum(mean * var)

        args = (v.astype(dtype) for v in (x, scale, bias, residual))
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*args)

    def ours(x, scale, bias, residual):
        y, stats = batch_norm(x, scale, bias, residual=residual, activation=activation)
        return y, stats.mean, stats.var

    def definition(x, scale, bias, residual):
        y, (mean, var, _) = reference.batch_norm(x, scale, bias)
        return (activation or (lambda z: z))(y + residual), mean, var

    found = derivatives(ours, "float32")
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, derivatives(definition, "float64"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
