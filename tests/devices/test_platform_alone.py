"""`_platform.on(..., alone=True)`: only in a program for one device that stands as it is."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from jax_bn._platform import on


@pytest.fixture(autouse=True)
def on_cpus(devices):
    if devices[0].platform != "cpu":
        pytest.skip("the choice is made for CPUs")


def chosen(x):
    """1 where the function for CPUs is taken, 0 where the other one is."""
    f = partial(on, "cpu", jnp.ones_like, otherwise=jnp.zeros_like, alone=True)
    return f(x)


X = np.zeros((4, 4), np.float32)


def test_one_device():
    assert np.all(jax.jit(chosen)(X) == 1)


def test_spread_by_the_compiler(devices):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=devices[:4])
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    assert np.all(jax.jit(chosen)(x) == 0)


@pytest.mark.parametrize("axes, expected", [({"data", "model"}, 1), ({"data"}, 0)])
def test_inside_shard_map(axes, expected, devices):
    """Over all axes of the mesh, or some: the compiler has the others."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=devices[:4])
    f = jax.shard_map(chosen, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=axes)
    assert np.all(jax.jit(f)(X) == expected)


def test_mapped():
    assert np.all(jax.jit(jax.vmap(chosen))(X) == 0)


def test_transposed():
    """Of what JAX knows no transpose of, too."""

    def doubled(v):
        return jax.lax.reduce((v, v), (0.0, 0.0), lambda s, t: (s[0] + t[0], s[1] + t[1]), (0,))

    def f(v):
        def otherwise(v):
            return (jnp.sum(v, 0),) * 2

        return on("cpu", doubled, v, otherwise=otherwise, alone=True)

    (ct,) = jax.jit(lambda s: jax.linear_transpose(f, X)((s, 2 * s)))(jnp.ones(4))
    assert np.all(ct == 3)


def test_exported():
    exported = jax.export.export(jax.jit(chosen), platforms=["cpu"])(X)
    assert np.all(exported.call(X) == 0)
