"""Recalibration with batches spread over devices, under plain jit."""

from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from jax_bn.nnx import BatchNorm
from jax_bn.recalibrate import recalibrate_nnx


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches(devices, kind):
    mesh = jax.make_mesh((len(devices),), ("data",), (kind,), devices=devices)
    x = np.random.default_rng(0).normal(size=(3, 16, 4)).astype(np.float32)
    x += np.arange(3, dtype=np.float32)[:, None, None]
    layer = BatchNorm(4, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        recalibrate_nnx(layer, (jax.device_put(b, NamedSharding(mesh, P("data"))) for b in x))
    actual = np.stack([layer.mean[...], layer.var[...]])
    expected = np.stack([x.mean((0, 1)), x.var((0, 1))])
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
