"""Layers of which the statistics, or scale and bias, or both stay as they are in training."""

from functools import partial

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn.linen
import jax_bn.nnx

N, C = 8, 4


def linen(name, **fields):
    """A new layer's state, and step :: params, stats, x -> y, stats, in training."""
    layer = getattr(jax_bn.linen, name)(use_running_average=False, **fields)

    def step(params, stats, x):
        y, updated = layer.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        return y, updated["batch_stats"]

    variables = layer.init(jax.random.key(0), jnp.ones((2, C)))
    return variables["params"], variables["batch_stats"], step


def in_nnx(name, **fields):
    layer = getattr(jax_bn.nnx, name)(C, rngs=nnx.Rngs(0), **fields)
    graphdef, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def step(params, stats, x):
        layer = nnx.merge(graphdef, params, stats, copy=True)
        y = layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    return params, stats, step


both_kinds = pytest.mark.parametrize("kind", [linen, in_nnx])
both_layers = pytest.mark.parametrize("name", ["BatchNorm", "BatchRenorm"])


def trained(kind, name, **fields):
    """y, the statistics before and after, the gradients of the params and of x; all in NumPy.

    The state is random, and so nowhere what a new layer's is.
    """
    rng = np.random.default_rng(0)
    params, stats, step = kind(name, **fields)

    def random(v):
        return v if v.dtype == jnp.int32 else jnp.asarray(rng.uniform(1, 2, v.shape), v.dtype)

    params, stats = jax.tree.map(random, (params, stats))
    x = jnp.asarray(3 + 2 * rng.normal(size=(N, C)), jnp.float32)

    @jax.jit
    def run(params, stats, x):
        def loss(params, x):
            y, after = step(params, stats, x)
            return jnp.sum(jnp.sin(y)), (y, after)

        (dparams, dx), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, after, dparams, dx

    y, after, dparams, dx = run(params, stats, x)
    return [jax.tree.leaves(jax.tree.map(np.asarray, v)) for v in (y, stats, after, dparams, dx)]


@both_kinds
@both_layers
def test_frozen_statistics(kind, name):
    """Bit for bit as they were; y and all gradients those of evaluation."""
    y, before, after, dparams, dx = trained(kind, name, freeze_statistics=True)
    chex.assert_trees_all_equal(before, after)
    evaluation = trained(partial(evaluated, kind), "BatchNorm")
    chex.assert_trees_all_equal([y, dparams, dx], [evaluation[i] for i in (0, 3, 4)])
    assert all(v.all() for v in dparams)


def evaluated(kind, name):
    if kind is in_nnx:
        return in_nnx(name, use_running_average=True)
    params, stats, _ = linen(name)
    layer = getattr(jax_bn.linen, name)(use_running_average=True)
    return params, stats, lambda p, s, x: (layer.apply({"params": p, "batch_stats": s}, x), s)


@both_kinds
@both_layers
def test_frozen_scale_and_bias(kind, name):
    """Their gradients are exactly 0; all else is as without."""
    y, before, after, dparams, dx = trained(kind, name, freeze_affine=True)
    free = trained(kind, name)
    chex.assert_trees_all_equal([y, after, dx], [free[i] for i in (0, 2, 4)])
    assert len(dparams) == 2 and not any(v.any() for v in dparams)
    assert all(v.all() for v in free[3])
    assert all((a != b).all() for a, b in zip(after, before, strict=True))


@both_kinds
def test_all_frozen(kind):
    y, before, after, dparams, dx = trained(
        kind, "BatchNorm", freeze_statistics=True, freeze_affine=True
    )
    chex.assert_trees_all_equal(before, after)
    assert not any(v.any() for v in dparams)
    half_frozen = trained(kind, "BatchNorm", freeze_statistics=True)
    chex.assert_trees_all_equal([y, dx], [half_frozen[i] for i in (0, 4)])


@both_kinds
def test_momentum_1_leaves_the_averages_and_normalizes_with_the_batch(kind):
    y, before, after, *_ = trained(kind, "BatchNorm", momentum=1.0)
    chex.assert_trees_all_equal(before, after)
    chex.assert_trees_all_equal(y, trained(kind, "BatchNorm")[0])


@both_kinds
def test_what_is_frozen_costs_nothing(kind):
    """In operations of the compiled step for each entry of x, beside the same without it."""
    params, stats, _ = kind("BatchNorm")
    x = jax.ShapeDtypeStruct((4096, C), jnp.float32)

    def operations(f):
        cost = jax.jit(f).lower(params, x).compile().cost_analysis()
        assert cost is not None
        return round(cost["flops"] / x.size, 1)

    def gradient(wrt, **fields):
        _, _, step = kind("BatchNorm", **fields)

        def loss(params, x):
            y, after = step(params, stats, x)
            return jnp.sum(jnp.sin(y)), after

        return operations(jax.grad(loss, wrt, has_aux=True))

    _, _, step = kind("BatchNorm")
    update = operations(lambda params, x: step(params, stats, x)[1])
    assert gradient(0, freeze_affine=True) <= update < update + 4 <= gradient(0)

    def affine(params, x):
        scale, bias = jax.tree.leaves(params)
        return jnp.sum(jnp.sin((x - bias[None]) * scale[None] + bias[None]))

    frozen = gradient(1, freeze_statistics=True, freeze_affine=True)
    assert frozen <= operations(jax.grad(affine, 1)) < frozen + 8 <= gradient(1)


def test_an_nnx_model_is_frozen_at_once():
    """By `set_attributes`, or by `nnx.view`, which leaves the model itself as it was."""
    model = nnx.Sequential(
        jax_bn.nnx.BatchNorm(C, rngs=nnx.Rngs(0)), jax_bn.nnx.BatchRenorm(C, rngs=nnx.Rngs(0))
    )
    x = jnp.arange(2.0 * C).reshape(2, C)

    def changed(model):
        before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
        model(x)
        after = nnx.state(model, nnx.BatchStat)
        return any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))

    assert "freeze_statistics: " in nnx.view_info(model)
    view = nnx.view(model, freeze_statistics=True, freeze_affine=True, use_running_average=False)
    assert not changed(view)
    gradients = nnx.grad(lambda view: jnp.sum(jnp.sin(view(x))))(view)
    assert not any(v.any() for v in jax.tree.leaves(gradients))
    assert changed(model)
    model.set_attributes(freeze_statistics=True)
    model.train()
    assert not changed(model)
