"""Sums on CPUs: of anything but x itself in parts, and of few features in rows.

See `_sums._in_parts` and `_in_rows`.
"""

from functools import partial
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import peak_temporary
from jax_bn import _stages, batch_norm, normalize, reference
from jax_bn._compiler import Sweep
from jax_bn._sums import ONE_IN_PARTS, sum_of, sums_of

N, C = 2048, 32  # 2^16 numbers: the fewest that are summed in parts
FLOAT32 = jnp.dtype("float32")
EPS = float(np.finfo("float32").eps)

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is done on CPUs")


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def x(random):
    return random.normal(size=(N, C)).astype("float32")


OF_ONE = jax.__version_info__ >= ONE_IN_PARTS  # are sums of one array taken in parts too

# ---- parts ---------------------------------------------------------------------------------------


def products(x, dy, mean, mask=None):
    d = x.astype("float32") - mean
    d = d if mask is None else jnp.where(mask, d, 0)
    return d, dy.astype("float32") * d


def along(*arrays):
    """The sum of dy*(x - mean), alone."""
    axes = tuple(range(arrays[0].ndim - 1))
    return sum_of(lambda *arrays: products(*arrays)[1], arrays, axes)


def both(*arrays):
    """That of x - mean, and that of dy*(x - mean)."""
    return sums_of(products, arrays, tuple(range(arrays[0].ndim - 1)), Sweep.M2)


def arguments(shape, dtype, random):
    x, dy = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
    mean = random.normal(size=(1,) * (len(shape) - 1) + shape[-1:])
    return x, dy, jnp.asarray(mean, "float32")


def written(text):
    """The shapes in float32 that are written out before they are summed."""
    found = re.findall("tensor<([0-9x]+)xf32>", "".join(re.findall("_barrier .*", text)))
    return [tuple(map(int, shape.split("x"))) for shape in found]


def in_parts(text):
    """Whether there is a reduction in words of its own: not what is known as a sum."""
    return "reducer(" in text


@pytest.mark.parametrize(
    "shape, part",
    [
        ((N, C), N // 8),
        ((32, 8, 8, 32), 256),
        ((6, 56, 8, 32), 6 * 56),
        ((2, 3, 401, 33), 401),  # a divisor of no axis
        ((1, 1, 5 * 401, 33), 401),
        ((4 * 521, 33), 521),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [None, "whole", "examples", "some", "features"])
@pytest.mark.parametrize("f", [along, both])
def test_what_has_to_be_computed_is_summed_in_parts(f, shape, part, dtype, masked, random):
    x, dy, mean = args = arguments(shape, dtype, random)
    mask = None
    if masked:
        some = (shape[0], *(1,) * (len(shape) - 1))
        of = dict(whole=shape, examples=(*shape[:-1], 1), some=some, features=mean.shape)[masked]
        mask = jnp.asarray(random.random(of) < 0.7)
    at_once = f is both and dtype == "float32"
    expected = [(part, shape[-1])] * (2 if f is both else 1) if at_once or OF_ONE else []
    traced = jax.jit(f).trace(*args, mask)
    text = traced.lower().as_text()
    assert [s for s in written(text) if s == (part, shape[-1])] == expected
    assert in_parts(text) == bool(expected)
    for platform in ("tpu", "cuda"):
        assert not in_parts(traced.lower(lowering_platforms=(platform,)).as_text())
    x, dy, mean = (np.asarray(v, "float64") for v in args)
    d = np.where(True if mask is None else mask, x - mean, 0)
    exact = (d, dy * d) if f is both else (dy * d,)
    for found in (jax.jit(f)(*args, mask), f(*args, mask)):  # eager: as they lie
        for s, terms in zip(found if f is both else (found,), exact, strict=True):
            assert s.shape == mean.shape
            terms = terms.reshape(-1, shape[-1])
            bound = 16 * EPS * np.abs(terms).sum(0)
            assert (np.abs(np.asarray(s).ravel() - terms.sum(0)) <= bound).all()


@pytest.mark.parametrize(
    "shape",
    [
        (N - 8, C),  # too small
        (1009, 67),  # a prime
        (3, 3, 3, 7 * 347),
        (0, C),
    ],
)
def test_others_are_summed_as_they_lie(shape, random):
    assert not in_parts(jax.jit(both).lower(*arguments(shape, "float32", random)).as_text())


def test_nor_over_any_but_the_first_axes(x):
    def text(axes):
        f = partial(sums_of, lambda x: (x, 2 * x), axes=axes, sweep=Sweep.M2)
        return jax.jit(f).lower((x,)).as_text()

    assert in_parts(text((0,)))
    assert not in_parts(text((1,)))
    assert not in_parts(text(()))


def test_a_narrow_dy_is_summed_as_it_lies(random):
    """The library casts it in less time; in float32 one sweep is for both sums."""

    def gradient(x, dy):
        return jax.vjp(lambda x: batch_norm(x)[0], x)[1](dy)

    def summed(dtype):
        x, dy, _ = arguments((N, C), dtype, random)
        return written(jax.jit(gradient).lower(x, dy).as_text()).count((N // 8, C))

    assert summed("float32") == 4
    assert summed("bfloat16") == (3 if OF_ONE else 0)


def test_in_programs_that_may_run_elsewhere_sums_are_as_they_lie(random):
    args = arguments((N, C), "float32", random)
    assert in_parts(jax.jit(both).lower(*args).as_text())
    exported = jax.export.export(jax.jit(both), platforms=("cpu",))(*args)
    assert not in_parts(exported.mlir_module())
    mapped = jax.jit(jax.vmap(both)).lower(*(jnp.stack([v, v]) for v in args))
    assert not in_parts(mapped.as_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_only_a_part_is_written(dtype, masked, random):
    """Of a program with no result as large as x. A selection would be written whole."""
    if not OF_ONE and (masked or dtype != "float32"):
        pytest.skip("before JAX 0.12 one array is not summed in parts")
    x = jnp.asarray(random.normal(size=(16 * N, C)), dtype)
    mask = jnp.asarray(random.random((16 * N, 1)) < 0.7) if masked else None
    moments = partial(_stages.moments, axes=(0,), dtype=FLOAT32)
    sums = 2 if dtype == "float32" else 1
    counted = 0 if mask is None else mask.size
    most = 4 * (sums * x.size // 8 + counted)  # in float32
    assert peak_temporary(jax.jit(moments).lower(x, mask).compile()) < 1.1 * most


@pytest.mark.parametrize(
    "dtype, mean", [("float32", 0), ("float32", -1e4), ("bfloat16", 3), ("float16", 30)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_error_of_the_statistics(dtype, mean, masked, x, random):
    """Within the docstring's bound, with sums that err by few eps; what is masked may be NaN."""
    x = jnp.asarray(x + np.float32(mean), dtype)
    mask = random.random(N) < 0.7 if masked else np.ones(N, bool)
    x = jnp.where(mask[:, None], x, jnp.nan)
    _, stats = jax.jit(batch_norm)(x, mask=mask if masked else None)
    exact = np.asarray(x, "float64")[mask]
    of_three = exact.mean(0) if masked else np.median(exact[:3], 0)
    far = (of_three - exact.mean(0)) ** 2 / exact.var(0)
    assert (np.abs(stats.var / exact.var(0) - 1) <= 4 * EPS * (1 + far)).all()
    error = np.abs(np.asarray(stats.mean, "float64") - exact.mean(0))
    assert (error <= 2 * EPS * (np.abs(exact.mean(0)) + exact.std(0))).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jnp.tanh])
def test_gradients(activation, masked, x, random):
    """Of first and second order, beside those of the definition in float64."""
    scale, bias, dy, dx = (random.normal(size=s) for s in ((C,), (C,), (N, C), (N, C)))
    mask = jnp.asarray(random.random((N, 1)) < 0.7) if masked else None

    def derivatives(f, dtype):
        def loss(*args):
            y = f(*args, mask=mask, activation=activation)[0]
            valid = y if mask is None else jnp.where(mask, y, 0)
            return jnp.sum(valid * dy.astype(dtype))

        args = tuple(v.astype(dtype) for v in (x + 5, scale, bias))
        first = jax.grad(loss, (0, 1, 2))

        def along(*args):
            return jnp.vdot(first(*args)[0], dx.astype(dtype))

        return jax.jit(lambda *args: (first(*args), jax.grad(along, (0, 1))(*args)))(*args)

    found = derivatives(batch_norm, "float32")
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, derivatives(reference.batch_norm, "float64"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("of_x, of_y", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_x_and_dy_of_two_dtypes(of_x, of_y, x, random):
    x, dy = jnp.asarray(x, of_x), jnp.asarray(random.normal(size=(N, C)), of_y)

    def gradient(f, x, dy, **options):
        return jax.vjp(lambda x: f(x, **options)[0], x)[1](dy)[0]

    found = jax.jit(partial(gradient, batch_norm, dtype=of_y))(x, dy)
    with jax.enable_x64(True):
        exact = gradient(reference.batch_norm, *(np.asarray(v, "float64") for v in (x, dy)))
    eps = float(jnp.finfo(of_x).eps)
    np.testing.assert_allclose(np.asarray(found, "float64"), exact, rtol=eps, atol=1e-5)


def test_gradients_of_complex_x(x, random):
    """Two sums of complex numbers in one sweep, and one of complex and one of real ones."""
    x = x + 1j * random.normal(size=x.shape).astype("float32") + 5
    cotangent = random.normal(size=x.shape) - 1j * random.normal(size=x.shape)

    def gradient(f, dtype):
        def loss(x):
            y, *rest = jax.tree.leaves(f(x))
            return jnp.sum(jnp.real(y * cotangent.astype(dtype))) + jnp.sum(rest[1])

        return jax.jit(jax.value_and_grad(loss))(x.astype(dtype))

    found = gradient(batch_norm, "complex64")
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, gradient(reference.batch_norm, "complex128"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_under_an_explicit_mesh_of_one_device(x):
    def step(x):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(batch_norm(x)[0])))(x)

    expected = jax.jit(step)(x)
    with jax.set_mesh(jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Explicit,))):
        found = jax.jit(step)(x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_shift_is_written_out_once(x):
    """Or else XLA makes it again for every entry of x."""

    def shifts(x, **lowering):
        f = jax.jit(partial(_stages.moments, mask=None, axes=(0,), dtype=FLOAT32))
        return written(f.trace(x).lower(**lowering).as_text()).count((1, C))

    assert shifts(x) == 1
    assert shifts(x, lowering_platforms=("cuda",)) == 0
    assert shifts(x[:64]) == 0
    mapped = jax.vmap(partial(_stages.moments, mask=None, axes=(0,), dtype=FLOAT32))
    text = jax.jit(mapped).lower(x.reshape(-1, 64, C)).as_text()
    assert (N // 64, 1, C) in written(text)


def test_under_scan_and_remat(x):
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


@pytest.mark.parametrize("shape", [(2**15, 4), (2**16, 1), (16, 64, 64, 3), (4096, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sums_of_few_features(shape, dtype, random):
    """In rows, and the rows in parts."""
    x, dy, mean = args = arguments(shape, dtype, random)
    text = jax.jit(both).lower(*args).as_text()
    assert in_parts(text)
    assert min(s[1] for s in written(text) if len(s) == 2) > shape[-1]
    x, dy, mean = (np.asarray(v, "float64") for v in args)
    for s, terms in zip(jax.jit(both)(*args), (x - mean, dy * (x - mean)), strict=True):
        terms = terms.reshape(-1, shape[-1])
        bound = 16 * EPS * np.abs(terms).sum(0)
        assert s.shape == mean.shape
        assert (np.abs(np.asarray(s).ravel() - terms.sum(0)) <= bound).all()


@pytest.mark.parametrize(
    "shape",
    [(2048, 17), (2047, 2), (4096, 0), (0, 4), (4099, 1), (2 * 4099, 3)],  # the last two of primes
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
        ((N, C), -1, None),
        ((N, C), -1, (N, 1)),
        ((N, 4, C // 4), (1, 2), None),
        ((N, 4, C // 4), (1, 2), (N, 1, C // 4)),
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
    """Whatever else is kept: the residual, and y."""
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


@pytest.mark.parametrize("features", [8, C])
def test_exported_for_any_number_of_examples(features, x):
    """`normalize`, and its gradient: the statistics themselves need to know it."""
    x = x[:, :features]
    mean, var = x.mean(0), x.var(0)

    def loss(x):
        return jnp.sum(jnp.sin(normalize(x, mean, var)))

    some = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"n, {features}"), x.dtype)
    for f in (lambda x: normalize(x, mean, var), jax.grad(loss)):
        f = jax.jit(f)
        exported = jax.export.export(f)(some)
        for n in (3, N):
            np.testing.assert_allclose(exported.call(x[:n]), f(x[:n]), rtol=0, atol=4 * EPS)
