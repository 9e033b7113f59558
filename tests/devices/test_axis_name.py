"""`axis_name`: in every mode what JAX gives for the definition written with `lax.psum`.

The same function of one device's share runs under `vmap`, `pmap` and both kinds of `shard_map`,
with our batch norm and with `reference.batch_norm`; gradients are taken inside and outside.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import residual_bytes
import jax_bn

N, C = 6, 4  # examples on one device, features
OURS, DEFINITION = jax_bn.batch_norm, jax_bn.reference.batch_norm


def share(batch_norm, x, valid, scale, bias, **options):
    """The loss of one device and its y; the statistics count in the loss."""
    y, stats = batch_norm(x, scale, bias, axis_name="i", mask=valid, **options)
    mean, var, count = jax.tree.leaves(stats)
    local = jnp.sum(jnp.sin(y) * (1 + y)) + jnp.sum(jnp.cos(mean) * var)
    return local, (y, mean, var, jnp.asarray(count))


def by_vmap(f, devices, varying):
    return jax.vmap(f, in_axes=(0, 0, None, None), axis_name="i")


def by_pmap(f, devices, varying):
    return jax.pmap(f, in_axes=(0, 0, None, None), axis_name="i", devices=devices)


def by_shard_map(f, devices, varying, *, check_vma):
    """`varying`: a tree like f's results, True where they differ between devices."""
    mesh = jax.make_mesh((len(devices),), ("i",), (AxisType.Auto,), devices=devices)

    def local(x, valid, scale, bias):
        results = f(x[0], None if valid is None else valid[0], scale, bias)
        # without tracking every device returns its own
        return jax.tree.map(lambda r, v: r[None] if v else r, results, stacked)

    stacked = jax.tree.map(lambda v: v or not check_vma, varying)
    out_specs = jax.tree.map(lambda s: P("i") if s else P(), stacked)
    in_specs = P("i"), P("i"), P(), P()
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


MODES = {
    "vmap": by_vmap,
    "pmap": by_pmap,
    "shard_map": partial(by_shard_map, check_vma=True),
    "shard_map without check_vma": partial(by_shard_map, check_vma=False),
}
VARYING = (True, (True, False, False, False))  # of what `share` returns


def arrays(masked=False, devices=8):
    random = np.random.default_rng(0)
    # Devices with very different means and, masked, with very different counts; one has nothing.
    x = random.normal(size=(devices, N, C)) + 10 * np.arange(devices)[:, None, None]
    valid = np.arange(N) < np.arange(devices)[:, None] if masked else None
    scale, bias = random.normal(size=(2, C))
    x, scale, bias = (np.asarray(v, np.float32) for v in (x, scale, bias))
    return x, None if valid is None else valid[..., None], scale, bias


def compare(of, *args, examples):
    """`of` builds the mapped function for one implementation."""
    ours, plain = jax.jit(of(OURS)), jax.jit(of(DEFINITION))
    assert_as_accurate(ours(*args), plain(*args), in_float64(plain, *args), examples)


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_inside(mode, masked, devices):
    """Each device differentiates its own share."""

    def of(batch_norm):
        def f(x, valid, scale, bias):
            loss = partial(share, batch_norm)
            return jax.grad(loss, argnums=(0, 2, 3), has_aux=True)(x, valid, scale, bias)

        # a scale that all devices share has one gradient where JAX tracks that
        return MODES[mode](f, devices, ((True, False, False), VARYING[1]))

    compare(of, *arrays(masked), examples=N * 8)


ALL_VALID = pytest.param(False, id="all valid", marks=pytest.mark.long)


@pytest.mark.parametrize("masked", [ALL_VALID, pytest.param(True, id="masked")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2])
def test_gradient_outside(mode, masked, order, devices):
    """The sum of all shares is differentiated, as in a training loop around the mapped function."""

    def of(batch_norm):
        mapped = MODES[mode](partial(share, batch_norm), devices, VARYING)

        def total(params, valid):
            x, scale, bias = params
            loss, (y, mean, _, _) = mapped(x, valid, scale, bias)
            # of each statistic one copy, wherever the mode keeps eight
            return jnp.sum(loss) + jnp.sum(y**3) + jnp.sum(mean.reshape(-1, C)[0] ** 2)

        def penalty(params, valid):
            return sum(jnp.sum(g**2) for g in jax.grad(total)(params, valid))

        return jax.grad({1: total, 2: penalty}[order])

    x, valid, scale, bias = arrays(masked)
    compare(of, (x, scale, bias), valid, examples=N * 8)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode(mode, devices):
    """Tangents of every device's results, and the transpose, of first and of second order."""

    def of(batch_norm):
        options = dict(forward_mode=True) if batch_norm is OURS else {}
        mapped = MODES[mode](partial(share, batch_norm, **options), devices, VARYING)

        def total(params, valid):
            x, scale, bias = params
            loss, (y, mean, _, _) = mapped(x, valid, scale, bias)
            return jnp.sum(loss) + jnp.sum(y**3) + jnp.sum(mean.reshape(-1, C)[0] ** 2)

        def results(params, valid, direction):
            def along(params):
                return jax.jvp(lambda p: total(p, valid), (params,), (direction,))[1]

            return jax.value_and_grad(along)(params)

        return results

    x, valid, scale, bias = arrays(masked=True)
    direction = jnp.cos(x), jnp.sin(scale), jnp.cos(bias)
    compare(of, (x, scale, bias), valid, direction, examples=N * 8)


@pytest.mark.parametrize("inner, outer", [("r", "f"), ("r", "r"), ("f", "f")])
def test_second_order_with_residual_and_activation(inner, outer, devices):
    """Along a line through all arguments, so it is one number."""
    x, valid, scale, bias = arrays(masked=True)
    point = x, scale, bias, np.cos(x)
    direction = jax.tree.map(np.sin, point)

    def derivative(f, mode):
        return jax.grad(f) if mode == "r" else lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]

    def of(batch_norm):
        options = dict(forward_mode=True) if (batch_norm, inner) == (OURS, "f") else {}

        def along(point, direction, valid, t):
            x, scale, bias, shortcut = jax.tree.map(lambda p, d: p + t * d, point, direction)

            def f(both, valid, scale, bias):
                more = dict(residual=both[1], activation=jax.nn.silu, **options)
                return share(batch_norm, both[0], valid, scale, bias, **more)

            both = jnp.stack([x, shortcut], 1)
            mapped = by_shard_map(f, devices, VARYING, check_vma=True)
            loss, (y, mean, _, _) = mapped(both, valid, scale, bias)
            return jnp.sum(loss) + jnp.sum(y**3) + jnp.sum(mean**2)

        def second(point, direction, valid, t):
            first = derivative(partial(along, point, direction, valid), inner)
            return derivative(first, outer)(t)

        return jax.jit(second)

    compare(of, point, direction, valid, np.float32(0.3), examples=N * 8)


@pytest.mark.parametrize(
    "mode, activation", [*((mode, jax.nn.relu) for mode in MODES), ("shard_map", jax.nn.silu)]
)
def test_residual_and_activation(mode, activation, devices):
    """The residual is a device's own, made of an array that all share: its gradient is the sum."""

    def of(batch_norm):
        def f(x, valid, scale, bias):
            def loss(x, scale, bias, shared):
                residual = jnp.broadcast_to(shared, x.shape)
                options = dict(residual=residual, activation=activation)
                return share(batch_norm, x, valid, scale, bias, **options)

            shared = jnp.linspace(-1, 1, C, dtype=scale.dtype)[None]
            gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
            return gradient(x, scale, bias, shared)

        return MODES[mode](f, devices, ((True, False, False, False), VARYING[1]))

    compare(of, *arrays(masked=True), examples=N * 8)


def test_a_pipeline_of_stages(devices):
    """Micro-batches pass from device to device, each with a layer of its own: one x a tick is kept.

    The statistics are those of a micro-batch in one stage, so no `axis_name`.
    """
    stages, batches = 4, 6
    mesh = jax.make_mesh((stages,), ("stage",), (AxisType.Auto,), devices=devices[:stages])
    random = np.random.default_rng(0)
    x = np.asarray(random.normal(size=(batches, N, C)), np.float32)
    scale, bias = np.asarray(random.normal(size=(2, stages, C)), np.float32)

    def pipelined(batch_norm, x, scale, bias):
        def run(x, scale, bias):
            last = jax.lax.axis_index("stage") == stages - 1
            first = jax.lax.axis_index("stage") == 0
            shift = [(i, i + 1) for i in range(stages - 1)]

            def tick(h, t):
                h = jnp.where(first, x[jnp.minimum(t, batches - 1)], h)
                y = jnp.tanh(batch_norm(h, scale[0], bias[0])[0])
                return jax.lax.ppermute(y, "stage", shift), jnp.where(last, y, 0)

            start = jax.lax.pcast(jnp.zeros((N, C), x.dtype), "stage", to="varying")
            _, ys = jax.lax.scan(tick, start, jnp.arange(batches + stages - 1))
            return jax.lax.psum(ys[stages - 1 :], "stage")

        specs = P(), P("stage"), P("stage")
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P())(x, scale, bias)

    def in_turn(batch_norm, x, scale, bias):
        for s, b in zip(scale, bias, strict=True):
            x = jax.vmap(lambda h, s=s, b=b: jnp.tanh(batch_norm(h, s, b)[0]))(x)
        return x

    def gradients(run, batch_norm, *args):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(run(batch_norm, *args))), (0, 1, 2))(*args)

    with jax.enable_x64(True):
        args = tuple(np.asarray(v, np.float64) for v in (x, scale, bias))
        ours = jax.jit(partial(gradients, pipelined, OURS))(*args)
        expected = jax.jit(partial(gradients, in_turn, DEFINITION))(*args)
    chex.assert_trees_all_close(ours, expected, rtol=1e-9, atol=1e-12)

    def kept(batch_norm):  # on all devices, beside what a pipeline without normalization keeps
        def f(*args):
            return residual_bytes(partial(pipelined, batch_norm), *args)

        return f(x, scale, bias)

    ticks = batches + stages - 1
    a_tick = (kept(OURS) - kept(lambda h, *_: (h, None))) / (ticks * stages)
    assert a_tick <= x[0].nbytes + 4 * C * x.itemsize
    assert (kept(DEFINITION) - kept(lambda h, *_: (h, None))) / (ticks * stages) >= 2 * x[0].nbytes


@pytest.mark.parametrize("mode", MODES)
def test_equal_shards_are_the_whole_batch(mode, devices):
    x, _, scale, bias = arrays()
    mapped = MODES[mode](partial(share, OURS), devices, VARYING)
    _, (y, mean, var, count) = mapped(x, None, scale, bias)

    def whole(x, scale, bias):
        return jax.tree.leaves(DEFINITION(x.reshape(-1, C), scale, bias))

    actual = y.reshape(-1, C), *(v.reshape(-1, C)[0] for v in (mean, var, count))
    oracle = in_float64(whole, x, scale, bias)
    assert_as_accurate(list(actual), whole(x, scale, bias), oracle, examples=N * 8)


@pytest.mark.parametrize("mode", MODES)
def test_devices_far_apart_do_not_cancel(mode, devices):
    """|mean|/std is 1e4: a sum of x^2 over devices would lose all of the variance."""
    x = 1e4 + np.random.default_rng(0).normal(size=(8, 512, C))
    x = np.asarray(x, np.float32)
    mapped = MODES[mode](partial(share, OURS), devices, VARYING)
    _, (_, _, var, _) = mapped(x, None, None, None)
    exact = x.reshape(-1, C).astype(np.float64).var(0)
    np.testing.assert_allclose(
        var.reshape(-1, C)[0], exact, rtol=8 * float(np.finfo(np.float32).eps), atol=0
    )


@pytest.mark.parametrize("features", [4, 32])
@pytest.mark.parametrize("mode", MODES)
def test_large_shares(mode, features, devices):
    """Each device sums its own, by its own shift; so many that CPUs have another way to."""
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 2**16 // features, features)) + 5 * np.arange(8)[:, None, None]
    x = np.asarray(x, np.float32)
    mapped = MODES[mode](partial(share, OURS), devices, VARYING)
    _, (y, mean, var, _) = mapped(x, None, None, None)
    exact = x.reshape(-1, features).astype(np.float64)
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(mean.reshape(-1, features)[0], exact.mean(0), rtol=4 * eps, atol=0)
    np.testing.assert_allclose(var.reshape(-1, features)[0], exact.var(0), rtol=8 * eps, atol=0)
    x_hat = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(-1, features), x_hat, rtol=0, atol=16 * eps)


def test_unmapped_statistics_of_vmap():
    """Statistics of all examples belong to none: `out_axes=None` takes them, as for Flax."""
    x, valid, scale, bias = arrays(masked=True)
    f = partial(share, OURS)
    mapped = jax.vmap(f, (0, 0, None, None), (0, (0, None, None, None)), axis_name="i")
    _, (_, mean, _, count) = mapped(x, valid, scale, bias)
    assert mean.shape == count.shape == (C,)

    def of(batch_norm):
        def total(x):
            f = partial(share, batch_norm)
            mapped = jax.vmap(f, (0, 0, None, None), (0, (0, None, None, None)), axis_name="i")
            _, (_, mean, var, _) = mapped(x, valid, scale, bias)
            return jnp.sum(mean**2 * var)

        return jax.grad(total)

    compare(of, x, examples=N * 8)


@pytest.mark.parametrize("names", [("i", "j"), ("j",)], ids=["both axes", "one axis"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("scale_spec", [P(), P("j")], ids=["shared scale", "scale along j"])
def test_mesh_of_two_axes(names, check_vma, scale_spec, devices):
    mesh = jax.make_mesh((2, 4), ("i", "j"), (AxisType.Auto,) * 2, devices=devices)
    x, _, scale, bias = arrays()
    if scale_spec == P("j"):
        scale, bias = (np.stack([v, 2 * v, 3 * v, 4 * v]) for v in (scale, bias))

    def of(batch_norm):
        def local(x, scale, bias):
            def loss(x, scale, bias):
                y, stats = batch_norm(x, scale.reshape(C), bias.reshape(C), axis_name=names)
                mean, var, _ = jax.tree.leaves(stats)
                return jnp.sum(jnp.sin(y) * (1 + y)) + jnp.sum(mean * var)

            dx, dscale, dbias = jax.grad(loss, argnums=(0, 1, 2))(x[0], scale, bias)
            if check_vma:
                return dx[None], dscale, dbias
            return dx[None], dscale[None], dbias[None]

        per_device = scale_spec if check_vma else P(("i", "j"))
        specs = P(("i", "j")), scale_spec, scale_spec
        out_specs = P(("i", "j")), per_device, per_device
        return jax.jit(
            jax.shard_map(
                local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma
            )
        )

    compare(of, x, scale, bias, examples=N * 8)


@pytest.mark.parametrize("mode", ["pmap", "shard_map without check_vma"])
def test_groups(mode, devices):
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def of(batch_norm):
        def f(*args):
            loss = partial(share, batch_norm, axis_index_groups=groups)
            return jax.grad(loss, argnums=(0, 2, 3), has_aux=True)(*args)

        return MODES[mode](f, devices, ((True,) * 3, (True,) * 4))

    compare(of, *arrays(masked=True), examples=N * 4)


@pytest.mark.parametrize("mode", ["vmap", "shard_map"])
def test_groups_where_jax_has_none(mode, devices):
    f = partial(share, OURS, axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(NotImplementedError, match=r"axis_index_groups.*check_vma=False"):
        MODES[mode](f, devices, (True, (True,) * 4))(*arrays())


@pytest.mark.parametrize("groups", [[[0, 1, 2], [3, 4, 5, 6, 7]], [[0, 1]], [[0, 1], [1, 2]]])
def test_groups_that_do_not_divide_the_devices(groups, devices):
    f = partial(share, OURS, axis_index_groups=groups)
    with pytest.raises(ValueError, match="axis_index_groups"):
        MODES["pmap"](f, devices, (True, (True,) * 4))(*arrays())


def test_an_axis_name_that_is_not_bound(devices):
    def f(x, valid, scale, bias):
        return OURS(x, scale, bias, axis_name="j")[0]

    with pytest.raises(ValueError, match="axis_name='j' is not bound here"):
        MODES["shard_map"](f, devices, True)(*arrays())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_virtual_batches_across_devices(mode, order, devices):
    """The runs at the same place on all devices form one group."""

    def total(params, f):
        y, _ = f(*params)
        return jnp.sum(jnp.sin(y) * (1 + y))

    def derivative(f):
        def penalty(params):
            return sum(jnp.sum(g**2) for g in jax.grad(total)(params, f))

        return jax.grad({1: partial(total, f=f), 2: penalty}[order])

    def ours(x, scale, bias):
        f = partial(share, OURS, virtual_batch_size=2)
        _, (y, *_) = MODES[mode](f, devices, VARYING)(x, None, scale, bias)
        return y, ()

    def plain(x, scale, bias):
        runs = [DEFINITION(x[:, i : i + 2].reshape(-1, C), scale, bias)[0] for i in range(0, N, 2)]
        return jnp.concatenate([y.reshape(8, 2, C) for y in runs], axis=1), ()

    x, _, scale, bias = arrays()
    params = x, scale, bias
    definition = jax.jit(derivative(plain))
    oracle = in_float64(definition, params)
    actual = jax.jit(derivative(ours))(params)
    assert_as_accurate(actual, definition(params), oracle, examples=N * 8)


@pytest.mark.parametrize("axis_name", [None, "i"])
def test_devices_that_share_x_and_not_the_mask(axis_name, devices):
    mesh = jax.make_mesh((8,), ("i",), (AxisType.Auto,), devices=devices)
    x, scale, bias = arrays()[0][:2].reshape(-1, C), *arrays()[2:]
    valid = np.arange(8 * 2 * N).reshape(8, -1) % 3 > 0

    def of(batch_norm):
        def local(params, valid):
            def loss(params):
                y, stats = batch_norm(*params, mask=valid.reshape(-1, 1), axis_name=axis_name)
                mean, var, _ = jax.tree.leaves(stats)
                return jnp.sum(jnp.sin(y) * (1 + y)) + jnp.sum(mean * var)

            return jax.grad(loss)(params)

        return jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=(P(), P("i")), out_specs=(P(), P(), P()))
        )

    compare(of, (x, scale, bias), valid, examples=8 * 2 * N)


@pytest.mark.parametrize("axis_name", [None, "i"])
def test_devices_that_share_x_and_not_the_scale(axis_name, devices):
    """The gradient of x is the sum of theirs."""
    mesh = jax.make_mesh((8,), ("i",), (AxisType.Auto,), devices=devices)
    x, _, scale, bias = arrays()
    scale, bias = (np.arange(1, 9, dtype=np.float32)[:, None] * v for v in (scale, bias))

    def of(batch_norm):
        def local(x, scale, bias):
            def loss(x, scale, bias):
                y, _ = batch_norm(x, scale[0], bias[0], axis_name=axis_name)
                return jnp.sum(jnp.sin(y) * (1 + y))

            return jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)

        specs = P(), P("i"), P("i")
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))

    compare(of, x[0], scale, bias, examples=N * 8)


def test_shard_map_that_is_not_compiled(devices):
    x, valid, scale, bias = arrays(masked=True)
    mesh = jax.make_mesh((8,), ("i",), (AxisType.Auto,), devices=devices)

    def dx(x, valid, scale, bias):
        def loss(x):
            return share(OURS, x, valid[0], scale, bias)[0]

        return jax.grad(loss)(x[0])[None]

    eager = jax.shard_map(dx, mesh=mesh, in_specs=(P("i"), P("i"), P(), P()), out_specs=P("i"))
    args = x, valid, scale, bias
    np.testing.assert_allclose(eager(*args), jax.jit(eager)(*args), rtol=1e-5, atol=1e-5)
