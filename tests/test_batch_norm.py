"""`batch_norm` and `normalize` as functions: transformations, memory, accuracy, and bad input."""

from functools import partial

import chex
import flax.linen
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import residual_bytes
import jax_bn
from jax_bn import _stages

batch_norm = jax_bn.batch_norm
definition = jax_bn.reference.batch_norm


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def x(random):
    return jnp.asarray(3 + 2 * random.normal(size=(8, 4)), jnp.float32)


@pytest.fixture
def scale(random):
    return jnp.asarray(random.normal(size=4), jnp.float32)


@pytest.fixture
def bias(random):
    return jnp.asarray(random.normal(size=4), jnp.float32)


def loss(x, scale, bias, f=batch_norm):
    y, stats = f(x, scale, bias)
    mean, var, _ = jax.tree.leaves(stats)
    return jnp.sum(jnp.sin(y)) + jnp.sum(mean * var)


gradient = jax.grad(loss, argnums=(0, 1, 2))
gradient_of_definition = jax.grad(partial(loss, f=definition), argnums=(0, 1, 2))


# ---- transformations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_axes",
    [(0, None, None), (None, 0, None), (0, 0, 0), (1, None, 0)],
    ids=["x", "scale", "all", "x inside, bias"],
)
def test_vmap(in_axes, random):
    shapes = (8, 4), (4,), (4,)
    args = [
        jnp.asarray(random.normal(size=s if a is None else (*s[:a], 3, *s[a:])), jnp.float32)
        for s, a in zip(shapes, in_axes, strict=True)
    ]
    for f, plain in ((batch_norm, definition), (gradient, gradient_of_definition)):

        def mapped(g, *args):
            return jax.tree.leaves(jax.vmap(g, in_axes)(*args))

        actual, expected = (jax.jit(partial(mapped, g)) for g in (f, plain))
        oracle = in_float64(expected, *args)
        assert_as_accurate(actual(*args), expected(*args), oracle, examples=8)


def test_vmap_of_vmap_of_the_gradient(random):
    x = jnp.asarray(random.normal(size=(2, 3, 8, 4)), jnp.float32)
    scale, bias = jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32)

    def nested(g, *args):
        return jax.vmap(jax.vmap(g, (0, None, None)), (0, None, None))(*args)

    def batched_scale(g, *args):
        return jax.vmap(jax.vmap(g, (None, 0, 0)), (0, None, None))(*args)

    for mapped, args in (
        (nested, (x, scale[0], bias[0])),
        (batched_scale, (x[:, 0], scale, bias)),
    ):
        actual, expected = (jax.jit(partial(mapped, g)) for g in (gradient, gradient_of_definition))
        oracle = in_float64(expected, *args)
        assert_as_accurate(actual(*args), expected(*args), oracle, examples=8)


def test_hessian(x):
    def y_of(f):
        return jax.jit(jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)[0]))))

    oracle = in_float64(y_of(definition), x)
    assert_as_accurate(y_of(batch_norm)(x), y_of(definition)(x), oracle, examples=8)


def test_scan_over_layers(x, random):
    scales = jnp.asarray(random.normal(size=(5, 4)), jnp.float32)

    def chain(f):
        def value(x, scales):
            def layer(x, scale):
                y, _ = f(x, scale)
                return x + jnp.tanh(y), None

            return jnp.sum(lax.scan(layer, x, scales)[0] ** 2)

        return jax.jit(jax.grad(value, argnums=(0, 1)))

    oracle = in_float64(chain(definition), x, scales)
    assert_as_accurate(chain(batch_norm)(x, scales), chain(definition)(x, scales), oracle, 8 * 5)


def test_checkpoint_and_jit_change_nothing(x, scale, bias):
    expected = gradient(x, scale, bias)
    for f in (jax.checkpoint(loss), jax.jit(loss)):
        actual = jax.grad(f, argnums=(0, 1, 2))(x, scale, bias)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_export_for_every_platform_at_once(x, scale, bias):
    platforms = ["cpu", "cuda", "tpu"]
    exported = jax.export.export(jax.jit(gradient), platforms=platforms)(x, scale, bias)
    assert list(exported.platforms) == platforms
    chex.assert_trees_all_close(
        exported.call(x, scale, bias), gradient(x, scale, bias), rtol=1e-5, atol=1e-5
    )


def test_donation(x, scale, bias):
    expected, _ = batch_norm(x, scale, bias)
    step = jax.jit(lambda x, s, b: batch_norm(x, s, b)[0], donate_argnums=0)
    given = x.copy()
    chex.assert_trees_all_close(step(given, scale, bias), expected, rtol=1e-6, atol=1e-6)
    assert given.is_deleted()


def test_a_second_call_does_not_trace_again(x, scale, bias):
    chex.clear_trace_counter()
    step = jax.jit(jax.grad(chex.assert_max_traces(loss, n=1), argnums=(0, 1, 2)))
    for _ in range(2):
        step(x, scale, bias)


def test_forward_mode_is_refused_and_forward_over_reverse_is_not(x):
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: batch_norm(x)[0], (x,), (x,))
    dx = jax.grad(lambda x: jnp.sum(jnp.sin(batch_norm(x)[0])))
    _, tangent = jax.jvp(dx, (x,), (x,))
    assert np.isfinite(tangent).all()


@pytest.mark.parametrize("forward_mode", [False, True])
def test_without_jit_nothing_is_compiled_twice(x, forward_mode):
    """Operation by operation, whatever is compiled for the first call serves the next."""

    def loss(x):
        y, stats = batch_norm(x, activation=jax.nn.gelu, forward_mode=forward_mode)
        y = jax_bn.normalize(y, stats.mean, stats.var, residual=y, activation=jax.nn.relu)
        return jnp.sum(y * y) + jnp.sum(stats.var)

    calls = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            calls.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        calls.clear()
        jax.grad(loss)(x)
        loss(x)
    assert not calls


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_x_is_the_only_residual_of_its_size(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.ones((64, 16, 16, 8), dtype)
        scale = bias = jnp.ones(8, jnp.finfo(dtype).dtype)
        assert residual_bytes(batch_norm, x, scale, bias) <= 1.01 * x.nbytes
        mask = jnp.ones((64, 16, 16), bool)
        masked = partial(batch_norm, mask=mask)
        assert residual_bytes(masked, x, scale, bias) <= 1.01 * x.nbytes + mask.nbytes
        stats = jnp.ones((2, 8), jnp.finfo(dtype).dtype)
        assert residual_bytes(jax_bn.normalize, x, *stats, scale, bias) <= 1.01 * x.nbytes


@jax.numpy_dtype_promotion("standard")  # as Flax needs it
def test_flax_keeps_more():
    """What is gained: Flax's layer keeps x, and x - mean and more in float32."""
    x = jnp.ones((64, 16, 16, 8), jnp.bfloat16)
    layer = flax.linen.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def apply(x):
        return layer.apply(variables, x, mutable="batch_stats")[0]

    assert residual_bytes(apply, x) >= 4 * x.nbytes


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4])
def test_variance_is_stable_where_the_mean_is_large(ratio, random):
    x = jnp.asarray(ratio + random.normal(size=(4096, 8)), jnp.float32)
    _, stats = batch_norm(x)
    assert error_and_bound(x, stats.var)[0].max() < 8 * EPS


@jax.numpy_dtype_promotion("standard")  # as Flax needs it
def test_variance_of_flax_is_not(random):
    x = jnp.asarray(1e4 + random.normal(size=(4096, 8)), jnp.float32)
    layer = flax.linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, updated = layer.apply(variables, x, mutable="batch_stats")
    assert error_and_bound(x, updated["batch_stats"]["var"])[0].max() > 0.5


@pytest.mark.parametrize("order", ["random", "sorted", "outliers first"])
def test_the_bound_of_the_docstring(order, random):
    x = random.normal(size=(65536, 1))
    if order == "sorted":
        x.sort(axis=0)
    if order == "outliers first":
        x[:2] = 1e4
    x = jnp.asarray(x, jnp.float32)
    _, stats = batch_norm(x)
    error, bound = error_and_bound(x, stats.var)
    assert (error <= bound).all()


EPS = float(np.finfo(np.float32).eps)


def error_and_bound(x, var):
    """The relative error of a variance, and eps*sqrt(N)*(1 + (k - mean)^2/var) for our shift k."""
    exact = np.asarray(x, np.float64)
    k, mean, truth = np.median(exact[:3], axis=0), exact.mean(0), exact.var(0)
    return np.abs(var / truth - 1), EPS * np.sqrt(len(x)) * (1 + (k - mean) ** 2 / truth)


def test_one_outlier_does_not_set_the_shift(random):
    x = random.normal(size=(65536, 1))
    for place in range(3):
        spoilt = x.copy()
        spoilt[place] = 1e4
        spoilt = jnp.asarray(spoilt, jnp.float32)
        _, stats = batch_norm(spoilt)
        exact = np.asarray(spoilt, np.float64).var(0)
        assert np.abs(stats.var / exact - 1).max() < 8 * np.finfo(np.float32).eps


def test_the_shift_is_picked_from_x(random):
    """From its middle, for no sweep; of complex numbers, which have no order, it is the mean."""
    x = jnp.asarray(random.normal(size=(5, 4, 3)), jnp.float32)
    moments = partial(_stages.moments, axes=(0, 1))
    _, shift, _, _ = moments(x, None, dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(shift[0, 0], np.median(x[:3, 2], 0))
    _, shift, _, _ = moments(lax.complex(x, -x), None, dtype=jnp.dtype("complex64"))
    np.testing.assert_allclose(shift, lax.complex(x, -x).mean((0, 1), keepdims=True), rtol=1e-5)


def test_constant_features_have_no_variance():
    for value in (0.0, 0.1, 1e4, -3e30):
        y, stats = batch_norm(jnp.full((1000, 3), value, jnp.float32))
        np.testing.assert_array_equal(stats.var, np.zeros(3))
        np.testing.assert_array_equal(stats.mean, np.full(3, value, np.float32))
        np.testing.assert_array_equal(y, np.zeros((1000, 3)))


@pytest.mark.parametrize("n", [5, 7, 10, 11])
def test_no_variance_by_rounding_is_negative(n, random):
    """With a mask the shift is a rounded mean: m2 is the difference of two squares of an ulp."""
    x = jnp.asarray(np.repeat(random.normal(size=(1, 512)), n, 0), jnp.float32)
    for f in (batch_norm, jax.jit(batch_norm)):
        var = f(x, mask=jnp.ones(n, bool))[1].var
        assert (var >= 0).all() and (var <= (EPS * x[0]) ** 2).all()


def test_a_small_variance_is_not_none(x):
    """Statistics scale as x does: to the bit, by a power of two."""
    _, stats = batch_norm(x)
    _, small = batch_norm(x * 2.0**-20)
    np.testing.assert_array_equal(small.mean, stats.mean * 2.0**-20)
    np.testing.assert_array_equal(small.var, stats.var * 2.0**-40)


def test_a_squared_sum_that_overflows(random):
    """The shift is among the small numbers: sum(d)^2 is beyond float32, and nothing else is."""
    x = np.where(np.arange(64) < 32, 1e17, 2.5e18)[:, None] * random.uniform(0.9, 1, size=(64, 8))
    x = jnp.asarray(x, jnp.float32)
    d = x - jnp.median(x[:3], 0, keepdims=True)
    assert jnp.isinf(jnp.sum(d, 0) ** 2).all() and jnp.isfinite(jnp.sum(d**2, 0)).all()
    exact = np.asarray(x, np.float64).var(0)
    _, of_parts = batch_norm(x, virtual_batch_size=16)
    for stats in (batch_norm(x)[1], jax.jit(batch_norm)(x)[1], of_parts):
        np.testing.assert_allclose(stats.var, exact, rtol=64 * EPS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_a_bad_number_stays_in_its_feature(x, bad, place):
    spoilt = x.at[place, 1].set(bad)
    y, stats = batch_norm(spoilt)
    dx = jax.grad(lambda x: jnp.sum(jnp.sin(batch_norm(x)[0])))(spoilt)
    others = np.array([0, 2, 3])
    clean, clean_stats = batch_norm(x)
    np.testing.assert_array_equal(y[:, others], clean[:, others])
    np.testing.assert_array_equal(stats.var[others], clean_stats.var[others])
    assert np.isfinite(dx[:, others]).all()
    assert np.isnan(stats.var[1])


# ---- normalize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("shape, axis", [((8, 4), -1), ((3, 4, 2, 5), (1, 3)), ((0, 4), -1)])
def test_normalize(shape, axis, dtype, random):
    features = (4,) if axis == -1 else (4, 5)
    x = jnp.asarray(random.normal(size=shape), dtype)
    mean, scale, bias = (jnp.asarray(random.normal(size=features), dtype) for _ in range(3))
    var = jnp.asarray(random.uniform(1, 2, size=features), jnp.finfo(dtype).dtype)

    def plain(x, mean, var, scale, bias):
        reduced = tuple(a for a in range(x.ndim) if a not in np.atleast_1d(axis) % x.ndim)
        with jax.numpy_dtype_promotion("standard"):
            wide = jnp.promote_types(x.dtype, jnp.float32)
        v = [jnp.expand_dims(a, reduced).astype(wide) for a in (mean, var, scale, bias)]
        return ((x.astype(wide) - v[0]) / jnp.sqrt(v[1] + 1e-5) * v[2] + v[3]).astype(x.dtype)

    def ours(*args):
        return jax_bn.normalize(*args, axis=axis)

    def gradients(f):
        def total(args):
            y = f(*args)
            return jnp.sum(jnp.real(jnp.sin(y)))

        return jax.grad(total)

    args = x, mean, var, scale, bias
    if x.size:
        assert_as_accurate(ours(*args), plain(*args), in_float64(plain, *args), 1)
        oracle = in_float64(gradients(plain), args)
        assert_as_accurate(gradients(ours)(args), gradients(plain)(args), oracle, x.size)
    else:
        assert ours(*args).shape == shape


# ---- bad input: each row beside the input it is next to that works -------------------------------

X, V = np.ones((4, 3), np.float32), np.ones(3, np.float32)
GOOD = [
    dict(x=X),
    dict(x=X, scale=V, bias=V),
    dict(x=X, axis=0, scale=np.ones(4)),
    dict(x=X, axis=(0, 1), scale=X),
    dict(x=X, axis=[-1]),
    dict(x=X, epsilon=0),
    dict(x=X, epsilon=jnp.float32(1e-3)),
    dict(x=X, dtype="bfloat16"),
    dict(x=X[:1]),
    dict(x=X[:, :0]),
    dict(x=X.astype(int), scale=V.astype(int)),
    dict(x=X > 0),
    dict(x=X, axis_name=None, axis_index_groups=None),
    dict(x=X, mask=np.ones(4, bool)),
    dict(x=X, mask=np.ones((4, 1), np.int32)),
    dict(x=X, mask=np.ones((1, 3), bool)),
    dict(x=X, virtual_batch_size=2),
    dict(x=X[:, 0], axis=(), virtual_batch_size=4),
    dict(x=X[:, 0], axis=0, virtual_batch_size=1),  # no batch axis at all
]
BAD = [
    (dict(x=X[:0]), ValueError, r"x has shape \(0, 3\): no examples"),
    (dict(x=1.0), ValueError, "x is a scalar"),
    (dict(x=X, scale=V[:2]), ValueError, r"scale has shape \(2,\); expected \(3,\)"),
    (dict(x=X, bias=X), ValueError, r"bias has shape \(4, 3\); expected \(3,\)"),
    (dict(x=X, scale=np.float32(1)), ValueError, r"scale has shape \(\); expected \(3,\)"),
    (dict(x=X, axis=2), ValueError, "axis=2 is out of range"),
    (dict(x=X, axis=-3), ValueError, "axis=-3 is out of range"),
    (dict(x=X, axis=(1, -1)), ValueError, "twice"),
    (dict(x=X, axis=1.0), TypeError, "axis must be an int"),
    (dict(x=X, epsilon=-1e-5), ValueError, "epsilon=-1e-05; expected"),
    (dict(x=X, epsilon=np.nan), ValueError, "epsilon=nan; expected"),
    (dict(x=X, epsilon=None), TypeError, "epsilon=None; expected one real number"),
    (dict(x=X, epsilon=1j), TypeError, "epsilon=1j; expected one real number"),
    (dict(x=X, epsilon=V), TypeError, "epsilon=array.*; expected one real number"),
    (dict(x=X, dtype="int32"), ValueError, "dtype=int32 is not inexact"),
    (dict(x=X.astype("complex64"), dtype="float32"), ValueError, "pass dtype=complex64"),
    (dict(x=X, scale=V.astype("complex64")), ValueError, "pass dtype=complex64"),
    (dict(x=X, mask=np.ones(5, bool)), ValueError, r"mask has shape \(5,\); expected"),
    (dict(x=X, mask=np.ones((4, 3, 1), bool)), ValueError, r"mask has shape \(4, 3, 1\)"),
    (dict(x=X, mask=np.ones(4, np.float32)), TypeError, "mask has dtype float32"),
    (dict(x=X, axis_name="devices"), ValueError, "axis_name='devices' is not bound"),
    (dict(x=X, axis_name=3), ValueError, "axis_name=3; expected a name"),
    (dict(x=X, axis_name=("i", "i")), ValueError, "expected a name, or several different"),
    (dict(x=X, axis_index_groups=[[0]]), ValueError, "axis_index_groups needs axis_name"),
    (dict(x=X, axis_name="i", axis_index_groups=[]), ValueError, "at least one"),
    (dict(x=X, axis_name="i", axis_index_groups=[0]), ValueError, "sequences of indices"),
    (dict(x=X, virtual_batch_size=3), ValueError, "virtual_batch_size=3 does not divide"),
    (dict(x=X, virtual_batch_size=2.0), TypeError, "virtual_batch_size=2.0; expected an int"),
    (dict(x=X, virtual_batch_size=0), ValueError, "virtual_batch_size=0 does not divide"),
]


@pytest.mark.parametrize("kwargs", GOOD)
def test_accepted(kwargs):
    y, _ = batch_norm(**kwargs)
    assert y.shape == kwargs["x"].shape


@pytest.mark.parametrize("kwargs, error, message", BAD)
def test_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        batch_norm(**kwargs)
    x, options = kwargs["x"], {k: v for k, v in kwargs.items() if k != "x"}
    with pytest.raises(error, match=message):  # while tracing too
        jax.eval_shape(partial(batch_norm, **options), x)


def test_epsilon_is_static():
    with pytest.raises(TypeError, match=r"epsilon=.*; expected one real number, known while"):
        jax.jit(lambda epsilon: batch_norm(X, epsilon=epsilon))(1e-3)
    y = jax.jit(batch_norm, static_argnames="epsilon")(X, epsilon=1e-3)[0]
    np.testing.assert_array_equal(y, np.zeros_like(X))


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(mean=V[:2], var=V), ValueError, r"mean has shape \(2,\); expected \(3,\)"),
        (dict(mean=V, var=X), ValueError, r"var has shape \(4, 3\); expected \(3,\)"),
        (dict(mean=V, var=V, scale=V[:1]), ValueError, r"scale has shape \(1,\)"),
        (dict(mean=V, var=None), TypeError, "mean or var is None"),
        (dict(mean=V, var=V.astype("complex64")), TypeError, "a variance is real"),
        (dict(mean=V, var=V, axis=5), ValueError, "axis=5 is out of range"),
        (dict(mean=V, var=V, epsilon=-1), ValueError, "epsilon=-1"),
        (dict(mean=V, var=V, dtype=int), ValueError, "not inexact"),
    ],
)
def test_normalize_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        jax_bn.normalize(X, **kwargs)
