"""Sums on CPUs: without a shift, of large x near 0; and of few features, in rows.

See `_compiler.shifted_if_far` and `_compiler.sum_of`.
"""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import peak_temporary
from jax_bn import _stages, batch_norm, normalize, reference
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
    x = (x + np.float32(1.2)) * np.float32(1.35e17)
    squares = np.square(x, dtype="float64").sum(0)
    of_mean = N * np.square(x.mean(0, dtype="float64"))  # that of the mean does not
    assert (squares > np.finfo("float32").max).all() and (of_mean < 0.9 * squares).all()
    assert (of_mean < np.finfo("float32").max).all()
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
    assert (far <= NEAR).all()
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
    """A conditional within other control flow; one step near 0, the other far."""

    def scanned(f, xs):
        def step(s, x):
            return s + jax.checkpoint(lambda x: jnp.sum(jnp.sin(f(x)[0])))(x), None

        return jax.lax.scan(step, jnp.zeros((), xs.dtype), xs)[0]

    def gradient(f, dtype):
        xs = np.stack([x, x + np.float32(5)])
        return jax.jit(jax.grad(partial(scanned, f)))(xs.astype(dtype))

    with jax.enable_x64(True):
        expected = np.asarray(gradient(reference.batch_norm, "float64"))
    found = gradient(batch_norm, "float32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


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


@pytest.mark.parametrize(
    "shape",
    [(8192, 17), (2047, 2), (4096, 0), (0, 4), (4099, 1), (2 * 4099, 3)],  # the last two of primes
)
def test_others_are_not(shape):
    x, mean = jnp.ones(shape), jnp.ones((1, shape[-1]))
    text = jax.jit(summed).lower(x, mean).as_text()
    assert "optimization_barrier" not in text


@pytest.mark.parametrize(
    "shape, axis, mask",
    [
        ((8, 8192), 0, None),
        ((4, 2048, 3), (0, 2), None),
        ((2048, 4, 2), (1, 2), None),
        ((64, 4, 64), 1, None),
        ((8192, 2), -1, (8192, 2)),
        ((8192, 2), -1, (8192, 1)),
        ((8192, 2), -1, (1, 2)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_wherever_the_features_and_the_masks_lie(shape, axis, mask, dtype, random):
    features = {a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis)}
    reduced = tuple(a for a in range(len(shape)) if a not in features)
    per_feature = tuple(1 if a in reduced else size for a, size in enumerate(shape))
    x = random.normal(size=shape) + np.arange(np.prod(per_feature)).reshape(per_feature)
    x = (x * (1 + 2j) if dtype == "complex64" else x).astype(dtype)
    mask = None if mask is None else random.random(mask) < 0.7
    y, stats = jax.jit(partial(batch_norm, axis=axis))(x, mask=mask)

    where = np.broadcast_to(True if mask is None else mask, shape)
    n = np.maximum(where.sum(reduced, keepdims=True), 1)
    wide = x.astype("complex128")
    mean = np.where(where, wide, 0).sum(reduced, keepdims=True) / n
    var = np.where(where, abs(wide - mean) ** 2, 0).sum(reduced, keepdims=True) / n
    np.testing.assert_allclose(stats.mean, mean.squeeze(reduced), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, var.squeeze(reduced), rtol=1e-5)
    x_hat = (wide - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, np.where(where, x_hat, y), rtol=0, atol=3e-5)


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


# ---- no barriers in small programs ---------------------------------------------------------------


def barriers(f, *args, **lowering):
    return jax.jit(f).trace(*args).lower(**lowering).as_text().count("optimization_barrier")


def test_small_programs_have_no_barriers():
    step = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(batch_norm(x)[0])))
    assert barriers(step, jnp.ones((31, 128))) == 0
    assert barriers(step, jnp.ones((32, 128))) > 0


def test_small_examples_of_a_large_program_have_them():
    """Virtual batches and mapped models; without, these write x in float32."""

    def gradient(x, dy, **options):
        return jax.vjp(lambda x: batch_norm(x, **options)[0], x)[1](dy)

    x = jnp.zeros((2**16, 32), "bfloat16")
    assert barriers(partial(gradient, virtual_batch_size=64), x, x) > 0
    mapped, parts = jax.jit(jax.vmap(gradient)), x.reshape(-1, 64, 32)
    assert barriers(mapped, parts, parts) > 0
    assert peak_temporary(mapped.lower(parts, parts).compile()) < 0.5 * x.nbytes


def test_exported_for_any_number_of_examples(x):
    """`normalize`: the statistics themselves need to know it."""
    mean, var = x.mean(0), x.var(0)
    f = jax.jit(lambda x: normalize(x, mean, var))
    some = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"n, {C}"), x.dtype)
    exported = jax.export.export(f)(some)
    for n in (3, N):
        np.testing.assert_allclose(exported.call(x[:n]), f(x[:n]), rtol=0, atol=4 * EPS)
