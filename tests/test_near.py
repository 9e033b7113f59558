"""Sums without a shift: on CPUs, of large x near 0; see `_compiler.shifted_if_far`."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bn import _stages, batch_norm, reference
from jax_bn._compiler import NEAR

N, C = 8192, 8  # 2^16 numbers: the fewest of which this is so
FLOAT32 = jnp.dtype("float32")
EPS = float(np.finfo("float32").eps)

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="CPUs alone do without")
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
    """Within the docstring's bound on both sides of the boundary, with a sum that errs by 2 eps."""
    x = jnp.asarray(x + np.float32(mean), dtype)
    _, stats = jax.jit(batch_norm)(x)
    exact = np.asarray(x, "float64")
    far = (shifts(x) - exact.mean(0)) ** 2 / exact.var(0)
    assert (far <= max(NEAR, 8)).all()
    assert (np.abs(stats.var / exact.var(0) - 1) <= 2 * EPS * (1 + far)).all()
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
