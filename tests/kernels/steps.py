"""A training step through the kernels, beside XLA's stages and float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from tolerance import assert_as_accurate, in_float64

from jax_bn import batch_norm

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


def assert_right(hopper, arrays, scale, bias, **options):
    """All that `step` gives, by the kernels."""
    x, residual, dy = arrays
    args = x, residual, dy, scale, bias
    with hopper():
        actual = step(partial(batch_norm, **KERNELS), *args, **options)
    oracle = in_float64(partial(step, batch_norm, **options), *args)
    assert_as_accurate(actual, step(batch_norm, *args, **options), oracle, x.size // x.shape[-1])


def assert_right_inside_shard_map(hopper, shape, check_vma: bool, axis_name: str | None):
    """y and all gradients on a mesh of one device, by types that say what is shared, or do not."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, shared = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    (x, residual, _), scale, bias = case(shape, "float32")

    def on_each(*args, **options):
        own: Any = dict(axis_name=axis_name, activation=LEAKY) | options

        def run(x, residual, scale, bias):
            y, stats = batch_norm(x, scale, bias, residual=residual, **own)
            loss = jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(stats.mean) * stats.var)
            return loss[None], y

        loss, pull, y = jax.vjp(run, *args, has_aux=True)
        return y, pull(jnp.ones_like(loss))

    def mapped(*args, **options):
        specs = over, over, shared, shared
        f = jax.shard_map(
            partial(on_each, **options), mesh=mesh, in_specs=specs,
            out_specs=(over, specs), check_vma=check_vma,
        )  # fmt: skip
        return f(*args)

    args = x, residual, scale, bias
    with hopper():
        actual = mapped(*args, **KERNELS)
    assert_as_accurate(actual, mapped(*args), in_float64(mapped, *args), shape[0])


def kernels_in(hopper, f, *args) -> set[str]:
    """Names of those in the program of f and its derivative by the first argument."""

    def step(*args):
        y, pull = jax.vjp(lambda x: f(x, *args[1:]), args[0])
        return y, pull(y)

    with hopper():
        traced = str(jax.make_jaxpr(step)(*args))
    names = "moments", "normalize", "grad_sums", "grad_input", "forward", "backward"
    return {name for name in names if f"bn_{name}" in traced}
