"""Hand-written stages beside XLA's, and the whole operation beside the definition."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tolerance import assert_as_accurate, in_float64

from jax_bn import batch_norm
from jax_bn.kernels import _stream

KERNELS: Any = dict(implementation="mosaic_gpu")
LEAKY = partial(jax.nn.leaky_relu, negative_slope=0.1)


def case(shape, dtype):
    """x, residual, dy; scale of both signs and bias; a mean far from zero."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, residual, dy = (jax.random.normal(k, shape, jnp.float32) for k in keys)
    scale = jnp.linspace(-1.0, 2.0, shape[-1])
    return [v.astype(dtype) for v in (5 + 2 * x, residual, dy)], scale, jnp.cos(scale)


def step(f, x, residual, dy, scale, bias, *, activation, fused):
    """y, statistics and all first derivatives."""

    def run(x, scale, bias, *residual):
        added: Any = dict(residual=residual[0]) if fused else {}
        y, stats = f(x, scale, bias, activation=activation, **added)
        return y, (stats[0], stats[1]) if isinstance(stats, tuple) else (stats.mean, stats.var)

    args = (x, scale, bias, residual) if fused else (x, scale, bias)
    y, pull, stats = jax.vjp(run, *args, has_aux=True)
    return y, stats, pull(dy)


@pytest.mark.parametrize(
    "shape, dtype, activation, fused",
    [
        ((4, 4, 4, 64), "bfloat16", jax.nn.relu, True),
        ((32, 512), "float32", LEAKY, False),
        ((32, 256), "float16", None, True),
    ],
    ids=["few features", "several slabs", "nothing after"],
)
def test_the_whole_operation(shape, dtype, activation, fused, hopper, monkeypatch):
    # One block and small tiles: each warpgroup goes round its ring.
    monkeypatch.setattr(_stream, "BLOCKS", 2)
    monkeypatch.setattr(_stream, "TILE_BYTES", 2 * 2048)
    (x, residual, dy), scale, bias = case(shape, dtype)
    options: Any = dict(activation=activation, fused=fused)
    with hopper():
        actual = step(partial(batch_norm, **KERNELS), x, residual, dy, scale, bias, **options)
    of_xla = step(batch_norm, x, residual, dy, scale, bias, **options)
    oracle = in_float64(partial(step, batch_norm, **options), x, residual, dy, scale, bias)
    assert_as_accurate(actual, of_xla, oracle, x.size // shape[-1])


def test_second_derivatives_are_those_of_xla(hopper):
    (x, _, _), scale, _ = case((16, 256), "float32")

    def along(x, **options):
        y, _ = batch_norm(x, scale, activation=LEAKY, **options)
        return jnp.sum(jnp.sin(y))

    def second(x, **options):
        return jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(partial(along, **options))(x))))(x)

    with hopper():
        actual = second(x, **KERNELS)
    assert_as_accurate(actual, second(x), in_float64(second, x), len(x))


def test_vmap(hopper):
    """Virtual batches are a vmap over them."""
    (x, _, _), scale, _ = case((32, 256), "float32")

    def dx(x, scale, **options):
        def f(x):
            return jnp.sum(jnp.sin(batch_norm(x, scale, virtual_batch_size=16, **options)[0]))

        return jax.grad(f)(x)

    with hopper():
        actual = dx(x, scale, **KERNELS)
    assert_as_accurate(actual, dx(x, scale), in_float64(dx, x, scale), 16)


def test_the_kernels_are_what_runs(hopper):
    (x, _, dy), _, _ = case((16, 256), "float32")

    def step(x, dy):
        y, pull = jax.vjp(lambda x: batch_norm(x, **KERNELS)[0], x)
        return y, pull(dy)

    with hopper():
        traced = str(jax.make_jaxpr(step)(x, dy))
    for name in ("bn_moments", "bn_normalize", "bn_grad_sums", "bn_grad_input"):
        assert name in traced
