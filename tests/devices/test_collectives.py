"""What synchronization costs, counted in the compiled text: small sums, and as few as can be.

Flax's layer stands beside: one collective less in the forward pass, with sums of x^2 that cancel.
"""

from functools import partial

import chex
import flax.linen
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import collectives
import jax_bn

N, C = 64, 32


@pytest.fixture
def x():
    return np.asarray(3 + np.random.default_rng(0).normal(size=(N, 5, C)), np.float32)


@pytest.fixture
def scale():
    return np.asarray(np.random.default_rng(1).normal(size=C), np.float32)


@pytest.fixture
def mask():
    return np.arange(N)[:, None] % 3 > np.arange(5) % 2


def of_flax(x, scale, bias, mask=None, axis_name=None):
    layer = flax.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    stats = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    y, updated = layer.apply(variables, x, mask=mask, mutable="batch_stats")
    return y, updated["batch_stats"]["mean"]


def of_ours(x, scale, bias, mask=None, axis_name=None):
    y, stats = jax_bn.batch_norm(x, scale, bias, mask=mask, axis_name=axis_name)
    return y, stats.mean


@pytest.mark.parametrize("options", [{}, dict(forward_mode=True), dict(activation=jax.nn.silu)])
def test_features_over_an_explicit_mesh(options, x, scale, devices):
    """Parameters and averages are whole, as initializers make them; and so are their gradients."""
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Explicit,), devices=devices)

    def gradients(x, residual, scale):
        def loss(x, residual, scale):
            y, stats = jax_bn.batch_norm(x, scale, scale, residual=residual, **options)
            mean, var = jax_bn.update_running_stats(scale, scale, stats)
            assert jax.typeof(mean).sharding.spec == jax.typeof(scale).sharding.spec
            return jnp.sum(jnp.sin(y)), (mean, var)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, residual, scale)

    whole = gradients(x, x, scale)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P(None, None, "model")))
        by_features = jax.jit(gradients)(spread, x, scale)
    chex.assert_trees_all_close(by_features, whole, rtol=1e-4, atol=1e-4)


def forward(f, x, scale, mask=None):
    return f(x, scale, scale, mask)


def step(f, x, scale, mask=None):
    """Forward and backward."""

    def loss(x, scale, bias):
        return jnp.sum(jnp.sin(f(x, scale, bias, mask)[0]))

    return jax.grad(loss, argnums=(0, 1, 2))(x, scale, scale)


COSTS = [(of_ours, forward, 2), (of_ours, step, 3), (of_flax, forward, 1), (of_flax, step, 2)]


def few_and_small(counts, largest, sums):
    assert counts == ({"all-reduce": sums} if sums else {}), counts
    assert largest <= 8 * C


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("f, what, sums", COSTS)
@jax.numpy_dtype_promotion("standard")  # as Flax needs it
def test_shard_map(f, what, sums, masked, check_vma, count, x, scale, mask, devices):
    mesh = jax.make_mesh((count,), ("i",), (AxisType.Auto,), devices=devices[:count])
    shared = P() if check_vma else P("i")
    out_specs = (P("i"), shared, shared) if what is step else (P("i"), shared)
    mask = mask[..., None] if masked else None
    spread = jax.shard_map(
        partial(what, partial(f, axis_name="i")),
        mesh=mesh,
        in_specs=(P("i"), P(), P("i")),
        out_specs=out_specs,
        check_vma=check_vma,
    )
    few_and_small(*collectives(spread, x, scale, mask), sums)


SHARDINGS = {
    "batch": P("d"),
    "features": P(None, None, "m"),
    "batch and features": P("d", None, "m"),
    "batch over both axes": P(("d", "m")),
}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request, devices):
    mesh = jax.make_mesh((4, 2), ("d", "m"), (request.param,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("f, what, sums", COSTS)
@jax.numpy_dtype_promotion("standard")  # as Flax needs it
def test_partitioned_by_the_compiler(f, what, sums, masked, sharding, x, scale, mask, mesh):
    x, scale, mask = placed(mesh, SHARDINGS[sharding], x, scale, mask[..., None])
    along_batch = SHARDINGS[sharding][0] is not None
    args = (x, scale, mask) if masked else (x, scale)
    few_and_small(*collectives(partial(what, f), *args), sums if along_batch else 0)


ALL_VALID = pytest.param(False, marks=pytest.mark.long)


@pytest.mark.parametrize("masked", [ALL_VALID, True])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_numbers_do_not_depend_on_the_sharding(masked, sharding, x, scale, mask, mesh):
    def of(batch_norm, mask):
        def results(x, scale):
            y, stats = batch_norm(x, scale, scale, mask=mask)
            mean, var, _ = jax.tree.leaves(stats)

            def loss(x, scale, bias):
                y, stats = batch_norm(x, scale, bias, mask=mask)
                mean, var, _ = jax.tree.leaves(stats)
                return jnp.sum(jnp.sin(y) * (1 + y)) + jnp.sum(mean * var)

            return y, mean, var, jax.grad(loss, argnums=(0, 1, 2))(x, scale, scale)

        return jax.jit(results)

    whole = np.broadcast_to(mask[..., None], x.shape) if masked else None
    placed_x, placed_scale, placed_mask = placed(
        mesh, SHARDINGS[sharding], x, scale, mask[..., None]
    )
    actual = of(jax_bn.batch_norm, placed_mask if masked else None)(placed_x, placed_scale)
    assert actual[0].sharding.is_equivalent_to(placed_x.sharding, x.ndim)
    assert actual[3][0].sharding.is_equivalent_to(placed_x.sharding, x.ndim)
    plain = of(jax_bn.reference.batch_norm, whole)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=mesh.devices.flat[:1])):
        expected, oracle = plain(x, scale), in_float64(plain, x, scale)
    gathered = jax.tree.map(np.asarray, actual)
    assert_as_accurate(gathered, jax.tree.map(np.asarray, expected), oracle, N * 5)


def placed(mesh, spec, x, scale, mask):
    """x by spec, scale as x's features are, mask as x's batch is."""
    entries = tuple(spec) + (None,) * (3 - len(spec))
    specs = P(*entries), P(entries[-1]), P(*entries[:2], None)
    return (
        jax.device_put(v, NamedSharding(mesh, s))
        for v, s in zip((x, scale, mask), specs, strict=True)
    )


def test_a_batch_over_two_explicit_devices(x, scale, devices):
    """The fewest over which no example can be picked from x."""
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,), devices=devices[:2])
    whole, _ = jax_bn.batch_norm(x, scale)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("d")))
        y, _ = jax.jit(jax_bn.batch_norm)(spread, scale)
    np.testing.assert_allclose(y, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_virtual_batches_that_a_device_holds_need_no_communication(sharding, x, scale, mask, mesh):
    def f(x, scale):
        return jax_bn.batch_norm(x, scale, virtual_batch_size=4)[0]

    spread, shared_scale, _ = placed(mesh, SHARDINGS[sharding], x, scale, mask[..., None])
    assert collectives(f, spread, shared_scale)[0] == {}
    expected = np.concatenate([f(part, scale) for part in np.split(x, N // 4)])
    np.testing.assert_allclose(jax.jit(f)(spread, shared_scale), expected, rtol=1e-5, atol=1e-5)


def test_virtual_batches_across_explicit_shards_are_refused(devices):
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((N, C)), NamedSharding(mesh, P("d")))
        jax.jit(partial(jax_bn.batch_norm, virtual_batch_size=8))(x)
        with pytest.raises(ValueError, match=r"virtual_batch_size=16 .* expected a divisor of 8"):
            jax.jit(partial(jax_bn.batch_norm, virtual_batch_size=16))(x)


@pytest.mark.parametrize("spec", [P("a"), P("b"), P(None, "a"), P(None, "b"), P("a", "b")])
@pytest.mark.parametrize("features", [2, 8])
def test_few_features_over_explicit_axes_of_length_1(features, spec, devices):
    """Such an array is whole, and its type still says how it lies: it cannot be read in rows."""
    mesh = jax.make_mesh((1, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=devices[:2])
    x = np.random.default_rng(0).normal(size=(2**16, features)).astype("float32")

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(jax_bn.batch_norm(x)[0])))(x)

    expected = gradient(x)
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
