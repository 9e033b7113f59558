"""`residual` and `activation` inside the rule: y = activation(bn(x) + residual); D16."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import residual_bytes
import jax_bn

leaky = partial(jax.nn.leaky_relu, negative_slope=0.1)
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu of 0.1": leaky,
    "leaky_relu of -0.1": partial(jax.nn.leaky_relu, negative_slope=-0.1),
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "a function of ours": lambda z: jnp.sin(z) + z,
}
DEFINITION = jax_bn.reference.batch_norm


def arrays(dtype="float32", shape=(6, 5, 4)):
    random = np.random.default_rng(0)
    x, residual, dy = random.normal(size=(3, *shape))
    scale, bias = random.normal(size=(2, shape[-1]))
    return tuple(np.asarray(v, dtype) for v in (3 + 2 * x, scale, bias, residual)), dy


def loss(f, args, dy, **options):
    x, scale, bias, residual = args
    y, stats = f(x, scale, bias, residual=residual, **options)
    mean, var, _ = jax.tree.leaves(stats)
    y = y.astype(mean.dtype)
    return jnp.sum(dy.astype(y.dtype) * (y + y * y)) + jnp.sum(mean * var), y


def penalty(*args, **options):
    gradients = jax.tree.leaves(jax.grad(loss, 1, has_aux=True)(*args, **options)[0])
    return sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in gradients)


def check(args, dy, *, orders=2, **options):
    def of(f):
        def results(args, dy):
            first = jax.grad(partial(loss, f, **options), has_aux=True)(args, dy)
            second = jax.grad(partial(penalty, f, **options))(args, dy) if orders == 2 else ()
            return first, second

        return jax.jit(results)

    plain = of(DEFINITION)
    oracle = in_float64(plain, args, dy)
    assert_as_accurate(of(jax_bn.batch_norm)(args, dy), plain(args, dy), oracle, examples=30)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, added):
    args, dy = arrays()
    check(args if added else (*args[:3], None), dy, activation=ACTIVATIONS[activation])


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.gelu])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype, activation):
    args, dy = arrays(dtype)
    check(args, dy, activation=activation, orders=1)


@pytest.mark.parametrize("affine", ["neither", "scale", "bias"])
def test_relu_without_scale_or_bias(affine):
    (x, scale, bias, residual), dy = arrays()
    args = x, scale if affine == "scale" else None, bias if affine == "bias" else None
    check((*args, None), dy, activation=jax.nn.relu, orders=1)
    check((*args, residual), dy, activation=jax.nn.relu, orders=1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu of 0.1", "gelu"])
def test_a_scale_of_zero(activation):
    """The sides of relu are then told by the bias; where that is 0 too, z is at the kink."""
    (x, _, _, _), dy = arrays()
    scale = np.array([0, 0, 0, -1], np.float32)
    bias = np.array([1, -1, 0, 0], np.float32)
    check((x, scale, bias, None), dy, activation=ACTIVATIONS[activation], orders=1)
    check((x, scale, bias, np.zeros_like(x)), dy, activation=ACTIVATIONS[activation], orders=1)


def test_residual_alone_of_another_dtype():
    (x, scale, bias, residual), dy = arrays("bfloat16")
    args = x, scale, bias, residual.astype(np.float32)
    check(args, dy, orders=1)
    dresidual = jax.grad(lambda r: jax_bn.batch_norm(x, residual=r)[0].astype(np.float32).sum())
    assert dresidual(residual).dtype == residual.dtype


@pytest.mark.parametrize("forward_mode", [False, True])
def test_a_real_residual_of_a_complex_result(forward_mode):
    """It gets the real part; a cast of the complex cotangent would warn, and later be refused."""
    (x, scale, bias, residual), dy = arrays()

    def dresidual(f, x, residual, dy, **options):
        def total(residual):
            y, _ = f(x, scale.astype(x.dtype), bias.astype(x.dtype), residual=residual, **options)
            return jnp.sum(jnp.real(dy.astype(x.dtype) * y * y))

        return jax.grad(total)(residual)

    args = x + 1j * dy.astype(np.float32), residual, dy
    plain = partial(dresidual, DEFINITION)
    actual = dresidual(jax_bn.batch_norm, *args, forward_mode=forward_mode)
    assert_as_accurate(actual, plain(*args), in_float64(plain, *args), examples=30)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
def test_an_activation_that_overflows_far_from_the_mean_where_masked(added, forward_mode):
    """Its derivative is taken at the bias there: at x = 0 it would be inf, and 0*inf is NaN."""
    (x, scale, bias, residual), _ = arrays()
    mask = np.arange(30).reshape(6, 5) % 3 > 0
    scale, residual = np.abs(scale) + 1, residual if added else None
    batch_norm = partial(jax_bn.batch_norm, mask=mask, activation=jnp.exp)

    @jax.jit
    def gradients(x):
        def total(x, scale, bias):
            y, _ = batch_norm(x, scale, bias, residual=residual, forward_mode=forward_mode)
            return jnp.sum(jnp.where(mask[..., None], y, 0))

        return jax.grad(total, argnums=(0, 1, 2))(x, scale, bias)

    here, far = gradients(x - 3), gradients(x - 1003)  # x - 3 is near 0
    for a, b in zip(far, here, strict=True):  # x is rounded at 1003: 1003/2 eps of x_hat
        np.testing.assert_allclose(a, b, rtol=0, atol=1003 * 30 * 2.0**-23 * np.abs(b).max())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_nan_under_a_mask_reaches_nothing_else(activation):
    args, dy = arrays()
    mask = np.arange(30).reshape(6, 5) % 3 > 0

    @jax.jit
    def gradients(args, dy):
        f = partial(loss, jax_bn.batch_norm, mask=mask, activation=ACTIVATIONS[activation])
        grads, y = jax.grad(f, has_aux=True)(args, dy)
        second = jax.grad(partial(penalty, jax_bn.batch_norm, mask=mask))(args, dy)
        return grads, second, jnp.where(mask[..., None], y, 0)

    def hide(v):
        return np.where(mask[..., None], v, np.float32(np.nan))

    x, scale, bias, residual = args
    hidden = gradients((hide(x), scale, bias, hide(residual)), hide(dy))
    clean = gradients(args, np.where(mask[..., None], dy, 0))
    jax.tree.map(np.testing.assert_array_equal, hidden, clean)
    # the masked entries of dx and of the cotangent of the residual
    assert not hidden[0][0][~mask].any() and not hidden[0][3][~mask].any()


@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
def test_a_dead_unit_passes_nothing_on(added):
    """Not an infinite cotangent either, as with JAX's relu."""
    (x, scale, bias, residual), _ = arrays()
    args = x, scale, bias, residual if added else None
    for bad in (np.inf, np.nan):
        gradients = []
        for f in (jax_bn.batch_norm, DEFINITION):

            def y(args, f=f):
                x, scale, bias, residual = args
                return f(x, scale, bias, residual=residual, activation=jax.nn.relu)[0]

            value, pull = jax.vjp(jax.jit(y), args)
            gradients.append(pull(jnp.where(value > 0, 1, np.float32(bad))))
        for ours, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_side_of_the_kink_far_from_zero():
    """In the backward pass it is that of the forward pass: dbias counts the live units."""
    x = np.float32(1e5) + np.random.default_rng(0).normal(size=(20000, 9)).astype(np.float32)
    scale, bias = np.ones(9, np.float32), np.linspace(-1, 1, 9, dtype=np.float32)

    def y(bias):
        return jax_bn.batch_norm(x, scale, bias, activation=jax.nn.relu)[0]

    @jax.jit
    def live_and_counted(bias):
        return jnp.sum(y(bias) > 0, 0), jax.grad(lambda bias: jnp.sum(y(bias)))(bias)

    live, counted = live_and_counted(bias)
    np.testing.assert_array_equal(live, counted.astype(int))


def test_virtual_batches():
    (x, scale, bias, residual), _ = arrays()
    options: dict[str, Any] = dict(residual=residual, activation=jax.nn.relu)
    y, _ = jax_bn.batch_norm(x, scale, bias, virtual_batch_size=2, **options)
    for i in (0, 2, 4):
        options["residual"] = residual[i : i + 2]
        part, _ = jax_bn.batch_norm(x[i : i + 2], scale, bias, **options)
        np.testing.assert_allclose(y[i : i + 2], part, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
def test_with_given_statistics(activation):
    (x, scale, bias, residual), _ = arrays()
    stats = x.mean((0, 1)), x.var((0, 1))
    y = jax_bn.normalize(x, *stats, scale, bias, residual=residual, activation=activation)
    expected, _ = DEFINITION(x, scale, bias, residual=residual, activation=activation)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu of 0.1", "gelu", "a function of ours"])
def test_residual_bytes(activation, dtype):
    x, scale = jnp.ones((64, 16, 16, 8), dtype), jnp.ones(8)
    f = partial(jax_bn.batch_norm, activation=ACTIVATIONS[activation])
    assert residual_bytes(f, x, scale, scale) <= 1.01 * x.nbytes

    def added(x, scale, bias, residual):
        return f(x, scale, bias, residual=residual)

    assert residual_bytes(added, x, scale, scale, x + 1) <= 2.01 * x.nbytes


def test_y_is_kept_where_its_sign_is_enough():
    """The next layer keeps y anyway; so a block of both keeps three arrays, not four."""
    x, w = jnp.ones((1024, 8)), jnp.ones((8, 8))

    def block(x, residual, w):
        y, _ = jax_bn.batch_norm(x, residual=residual, activation=jax.nn.relu)
        return jnp.sin(y @ w)

    # x, y, y @ w and w
    assert residual_bytes(block, x, x + 1, w) <= 3.01 * x.nbytes + w.nbytes


# ---- refused -------------------------------------------------------------------------------------


SLOPE = jnp.ones((1, 1))


def unhashable():
    """A function that JAX cannot find again."""
    made = type("Unhashable", (), {"__call__": lambda self, z: 2 * z, "__hash__": None})
    return made()


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(residual=np.ones((1, 4), np.float32)),
            ValueError,
            "residual has shape.*broadcast_to",
        ),
        (dict(residual=np.float32(1)), ValueError, r"residual has shape \(\); expected \(6, 4\)"),
        (dict(activation="relu"), TypeError, "activation='relu'; expected a hashable function"),
        (dict(activation=lambda z: z * SLOPE), TypeError, "closes over an array, which would be"),
        (dict(activation=unhashable()), TypeError, "expected a hashable function"),
        (dict(activation=jnp.sum), ValueError, "activation maps float32.* expected the same shape"),
        (dict(activation=lambda z: z > 0), ValueError, "activation maps .* same shape and dtype"),
        (dict(activation=lambda z: (z, z)), ValueError, "activation maps .* same shape and dtype"),
        (dict(activation=np.abs), ValueError, "activation=<ufunc 'absolute'> cannot be applied"),
        (
            dict(activation=partial(jnp.add, np.ones(4))),
            ValueError,
            "activation=.* cannot be applied",
        ),
    ],
)
def test_what_is_refused(options, error, message):
    x = np.ones((6, 4), np.float32)
    with pytest.raises(error, match=message):
        jax_bn.batch_norm(x, **options)
    with pytest.raises(error, match=message):
        jax_bn.normalize(x, x[0], x[0], **options)


def test_an_activation_that_closes_over_a_traced_array_is_refused():
    x = np.ones((6, 4), np.float32)
    for f in (jax_bn.batch_norm, lambda x, **options: jax_bn.normalize(x, x[0], x[0], **options)):
        with pytest.raises(TypeError, match=r"activation=.* closes over an array"):
            jax.grad(lambda a, f=f: jnp.sum(f(x, activation=lambda z: z * a)[0]))(2.0)


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.gelu])
def test_no_features(activation):
    x = jnp.zeros((4, 0))
    f = partial(jax_bn.batch_norm, activation=activation)
    gradient = jax.grad(lambda x, r: jnp.sum(f(x, residual=r)[0]), (0, 1))(x, x)
    assert [v.shape for v in gradient] == [(4, 0)] * 2
