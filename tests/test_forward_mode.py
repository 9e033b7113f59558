"""`forward_mode=True`: what `jax.jvp` and its relatives do with the function (D14)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import residual_bytes
import jax_bn

batch_norm = partial(jax_bn.batch_norm, forward_mode=True)


def arrays(dtype="float32", shape=(6, 5, 4)):
    """x, scale, bias, residual, and a tangent of each."""
    random = np.random.default_rng(0)

    def some():
        x, residual = random.normal(size=(2, *shape))
        scale, bias = random.normal(size=(2, shape[-1]))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x, scale = x + 1j * x[::-1] ** 2, scale + 1j
        return tuple(np.asarray(v, dtype) for v in (3 + 2 * x, scale, bias, residual))

    return some(), some()


def results(f, x, scale, bias, residual, **options):
    y, stats = f(x, scale, bias, residual=residual, **options)
    mean, var, _ = jax.tree.leaves(stats)
    return y, mean, var


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tangents(dtype, activation, masked):
    mask = np.arange(30).reshape(6, 5, 1) % 3 > 0 if masked else None
    options = dict(activation=activation, mask=mask)

    def of(f):
        return jax.jit(lambda args, moving: jax.jvp(partial(results, f, **options), args, moving))

    args, moving = arrays(dtype)
    plain = of(jax_bn.reference.batch_norm)
    oracle = in_float64(plain, args, moving)
    assert_as_accurate(of(batch_norm)(args, moving), plain(args, moving), oracle, examples=30)


def test_tangents_of_complex_numbers():
    args, moving = arrays("complex64")

    def of(f):
        return jax.jit(lambda args, moving: jax.jvp(partial(results, f), args, moving))

    plain = of(jax_bn.reference.batch_norm)
    oracle = in_float64(plain, args, moving)
    assert_as_accurate(of(batch_norm)(args, moving), plain(args, moving), oracle, examples=30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_reverse_mode_is_its_transpose(dtype):
    """As accurate as the definition, like the default rule."""
    args, cotangent = arrays(dtype)

    def of(f):
        def pulled(args, dy):
            y, pull = jax.vjp(lambda *args: results(f, *args)[0], *args)
            return pull(dy.astype(y.dtype))

        return jax.jit(pulled)

    plain = of(jax_bn.reference.batch_norm)
    oracle = in_float64(plain, args, cotangent[0])
    actual = of(batch_norm)(args, cotangent[0])
    assert_as_accurate(actual, plain(args, cotangent[0]), oracle, examples=30)


def test_a_nan_under_a_mask_reaches_no_tangent_and_no_cotangent():
    (x, scale, bias, _), (dx, *_) = arrays(shape=(6, 4))
    mask = np.arange(6) != 2
    masked = partial(batch_norm, mask=mask, activation=jax.nn.gelu)

    def both(x, dx):
        _, tangent = jax.jvp(lambda x: masked(x, scale, bias)[0], (x,), (dx,))
        # also the derivative of a loss that is NaN where masked
        return tangent, jax.grad(lambda *p: jnp.sum(masked(*p)[0] ** 2), (0, 1, 2))(x, scale, bias)

    hidden = x.copy(), dx.copy()
    for v in hidden:
        v[2] = np.nan
    jax.tree.map(np.testing.assert_array_equal, both(*hidden), both(x, dx))


def test_linearize_and_gauss_newton():
    """J v once and again from one linearization, and J^T H J v with H that of the loss."""
    with jax.enable_x64(True):
        args, moving = arrays("float64")

        def products(f):
            def y(*args):
                return results(f, *args)[0]

            value, pushforward = jax.linearize(y, *args)
            _, pullback = jax.vjp(y, *args)
            tangent = pushforward(*moving)
            _, curved = jax.jvp(jax.grad(lambda y: jnp.sum(jnp.log1p(y**2))), (value,), (tangent,))
            return tangent, pushforward(*args), pullback(curved)

        ours, expected = (jax.jit(partial(products, f))() for f in (batch_norm, DEFINITION))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, expected)


DEFINITION = jax_bn.reference.batch_norm


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_x_is_the_only_residual_of_its_size(dtype):
    x, scale = jnp.ones((64, 16, 16, 8), dtype), jnp.ones(8)
    assert residual_bytes(batch_norm, x, scale, scale) <= 1.01 * x.nbytes
    activated = partial(batch_norm, activation=jax.nn.gelu)
    assert residual_bytes(activated, x, scale, scale) <= 1.01 * x.nbytes

    def added(x, residual):
        return activated(x, scale, scale, residual=residual)

    assert residual_bytes(added, x, x + 1) <= 2.01 * x.nbytes


def test_without_it_jvp_is_refused():
    x = jnp.ones((3, 2))
    with pytest.raises(TypeError, match=r"can't apply forward-mode .* \(jvp\) to a custom_vjp"):
        jax.jvp(lambda x: jax_bn.batch_norm(x)[0], (x,), (x,))
