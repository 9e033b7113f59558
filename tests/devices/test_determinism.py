"""What changes with the number of devices: the order of sums, and so the last bits of results.

Of two runs on as many devices, nothing. Of runs on different numbers, for normal examples: each
result differs by at most sqrt(N) eps of its largest entry, N being the number of examples, which is
the growth of the rounding of a sum that `batch_norm` states. (Its bound has a factor more for
outliers, each device's shift being one of its own examples.)
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_bn

N, C = 2048, 16
NUMBERS = 1, 2, 4, 8


def arrays():
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, N, C))
    scale, bias = random.normal(size=(2, C))
    return tuple(np.asarray(v, np.float32) for v in (3 + 2 * x, scale, bias, dy))


def results(x, scale, bias, dy, **options):
    """y and the statistics, and what they give dx, dscale and dbias."""

    def values(*params):
        y, stats = jax_bn.batch_norm(*params, **options)
        return y, stats.mean, stats.var

    (y, mean, var), pull = jax.vjp(values, x, scale, bias)
    dx, dscale, dbias = pull((dy, mean, var))
    return dict(y=y, mean=mean, var=var, dx=dx, dscale=dscale, dbias=dbias)


def by_the_compiler(mesh):
    """Under plain `jit` with a sharded batch."""
    spread, whole = (NamedSharding(mesh, spec) for spec in (P("i"), P()))
    return jax.jit(results, in_shardings=(spread, whole, whole, spread), out_shardings=whole)


def by_hand(mesh):
    """Under `shard_map`, with `axis_name`."""

    def local(*args):
        return results(*args, axis_name="i")

    each = dict.fromkeys(("y", "dx"), P("i")) | dict.fromkeys(
        ("mean", "var", "dscale", "dbias"), P()
    )
    specs = P("i"), P(), P(), P("i")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=each))


@pytest.mark.parametrize("spread", [by_the_compiler, by_hand])
def test_the_number_of_devices(spread, devices):
    def run(number):
        mesh = jax.make_mesh((number,), ("i",), (AxisType.Auto,), devices=devices[:number])
        program = spread(mesh)
        once, again = (jax.tree.map(np.asarray, program(*arrays())) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, once, again)
        return once

    alone, *others = map(run, NUMBERS)
    eps = float(jnp.finfo(jnp.float32).eps)
    apart = {
        name: [float(np.abs(o[name] - v).max() / (eps * np.abs(v).max())) for o in others]
        for name, v in alone.items()
    }
    assert max(map(max, apart.values())) > 0  # or the sums were not spread
    for name, in_eps in apart.items():
        assert max(in_eps) <= np.sqrt(N), f"{name}: {in_eps} eps on {NUMBERS[1:]} devices"
    if jax.default_backend() == "cpu":  # as the README has it
        assert max(map(max, apart.values())) <= 4
