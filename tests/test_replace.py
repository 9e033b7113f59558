"""replace_batch_norm: models as they are, with our layer in the place of Flax's."""

from functools import partial
from typing import Any

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
from layers import assert_agree
import optax
import pytest

import jax_bn.linen
import jax_bn.nnx

FAR = 100.0  # a mean at which Flax's variance and ours differ visibly, in float32


# --- NNX


class Model(nnx.Module):
    """Layers in all the places that NNX has for them, one of them shared, two stacked."""

    def __init__(self, norm: Any = nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        norm = partial(norm, 4, momentum=0.9, epsilon=1e-3, rngs=rngs)
        self.bn = norm(use_scale=False)
        self.sequence = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), norm(use_bias=False), jnp.tanh)
        self.shared = nnx.List([self.bn, norm(bias_metadata={"note": "any"})])
        self.named = nnx.Dict(a=norm())
        self.tuple = nnx.data((norm(), {"b": norm()}))
        stacked = nnx.vmap(lambda rngs: type(self.bn)(4, rngs=rngs))
        self.stack = nnx.split_rngs(splits=2)(stacked)(rngs)

    def __call__(self, x):
        def stack(x):
            run = nnx.scan(lambda x, bn: x + bn(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.stack)

        return sum(jnp.sin(f(x)) for f in (self.bn, self.sequence, self.shared[0], stack))


PATHS = [
    ("bn",),
    ("named", "a"),
    ("sequence", "layers", 1),
    ("shared", 1),
    ("stack",),
    ("tuple", 0),
    ("tuple", 1, "b"),
]


def variables(model) -> dict[Any, nnx.Variable]:
    return {p: v for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}


def test_nnx_layers_change_their_class_and_nothing_else():
    model = Model()
    before, kept, graph = variables(model), model.shared[0], nnx.graphdef(model)
    expected = nnx.graphdef(Model(jax_bn.nnx.BatchNorm))
    replaced = jax_bn.nnx.replace_batch_norm(model)
    assert sorted(replaced, key=str) == PATHS
    assert replaced[("bn",)] is model.bn is model.shared[0] is kept
    assert {type(layer) for layer in replaced.values()} == {jax_bn.nnx.BatchNorm}
    after = variables(model)
    assert before.keys() == after.keys() and all(after[p] is v for p, v in before.items())
    assert nnx.graphdef(model) == expected  # all fields
    assert jax_bn.nnx.replace_batch_norm(model) == {}

    assert jax_bn.nnx.restore_batch_norm(model.bn).keys() == {()}  # one layer
    assert jax_bn.nnx.restore_batch_norm(model).keys() == replaced.keys() - {("bn",)}
    assert nnx.graphdef(model) == graph and all(variables(model)[p] is v for p, v in before.items())
    assert jax_bn.nnx.restore_batch_norm(model) == {}


def nnx_results(replace, state, x):
    """Gradients, the updated state, then y in evaluation."""
    model = Model()
    nnx.update(model, state)
    if replace:
        jax_bn.nnx.replace_batch_norm(model)
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    state = nnx.to_pure_dict(nnx.state(model))
    model.eval()
    return nnx.to_pure_dict(grads), state, model(x)


def test_nnx_numbers_are_those_of_flax():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (6, 4))
    state = nnx.to_pure_dict(nnx.state(Model()))
    assert_agree(nnx_results, True, False, state, x)


def test_nnx_in_the_midst_of_training():
    """The optimizer made before goes on; the step compiled before is traced anew."""
    x = FAR + jax.random.normal(jax.random.key(0), (6, 4))
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @chex.assert_max_traces(n=3)
    def update(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model))

    step: Any = nnx.jit(update)

    step(model, optimizer)
    copy = nnx.clone((model, optimizer))
    jax_bn.nnx.replace_batch_norm(model)
    step(model, optimizer)
    step(*copy)
    ours, flax = (nnx.to_pure_dict(nnx.state(m)) for m in (model, copy[0]))
    chex.assert_trees_all_close(ours, flax, rtol=1e-2)
    assert (ours["layers"][0]["var"] != flax["layers"][0]["var"]).all()
    model.eval()
    (layer,) = jax_bn.nnx.restore_batch_norm(model).values()
    assert layer.use_running_average


def test_nnx_forward_mode():
    def model(x, forward_mode):
        layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        if forward_mode is not None:
            jax_bn.nnx.replace_batch_norm(layer, forward_mode=forward_mode)
        y = layer(x)
        jax_bn.nnx.restore_batch_norm(layer)  # no number depends on forward_mode
        return y

    def tangent(forward_mode):
        x = jnp.arange(8.0).reshape(4, 2)
        return jax.jit(lambda x: jax.jvp(partial(model, forward_mode=forward_mode), (x,), (x,)))(x)

    chex.assert_trees_all_close(tangent(True), tangent(None), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        tangent(False)


class OwnNNX(nnx.BatchNorm):
    pass


class Wrapper(nnx.Module):
    def __init__(self, *layers):
        self.layers = nnx.List(layers)


def test_nnx_refusals_name_the_layer_and_change_nothing():
    replace, restore = jax_bn.nnx.replace_batch_norm, jax_bn.nnx.restore_batch_norm
    rngs = nnx.Rngs(0)
    model = Wrapper(nnx.BatchNorm(2, rngs=rngs), OwnNNX(2, rngs=rngs))
    with pytest.raises(TypeError, match=r"at \('layers', 1\) is of class OwnNNX, a subclass of fl"):
        replace(model)
    assert type(model.layers[0]) is nnx.BatchNorm
    with pytest.raises(TypeError, match=r"model is of class BatchNorm; expected an nnx\.Module"):
        replace(nn.BatchNorm())  # pyright: ignore[reportArgumentType]
    hidden = partial(nnx.BatchNorm(2, rngs=rngs))
    with pytest.raises(
        ValueError, match="class Sequential and has no batch normalization that NNX finds"
    ):
        replace(nnx.Sequential(hidden))
    for name, value in (("activation", jax.nn.relu), ("unbiased", True), ("momentum", None)):
        model = Wrapper(*(jax_bn.nnx.BatchNorm(2, rngs=rngs) for _ in range(2)))
        setattr(model.layers[1], name, value)
        with pytest.raises(ValueError, match=rf"at \('layers', 1\) has {name}=.*; expected "):
            restore(model)
        assert type(model.layers[0]) is jax_bn.nnx.BatchNorm
    model = Wrapper(nnx.BatchNorm(2, rngs=rngs))
    with pytest.raises(ValueError, match="Expected a node of type"):
        nnx.jit(lambda model: replace(model) and None)(model)


# --- Linen


class Block(nn.Module):
    """The layer made in a compact method, as nn.scan asks for it."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(momentum=0.9, axis_name=self.axis_name)(x, not train)
        return x + nn.tanh(y), None


class Preset(nn.BatchNorm):
    """A subclass that sets a field."""

    epsilon: float = 1e-3


class Net(nn.Module):
    """Layers made in setup and under the transforms of Linen, one of them shared."""

    def setup(self):
        axes: Any = dict(variable_axes={"params": 0, "batch_stats": 0}, in_axes=nn.broadcast)
        one: Any = dict(variable_axes={"params": None, "batch_stats": None}, in_axes=(0, None))
        self.bn = nn.BatchNorm(use_bias=False)
        self.preset = Preset()
        self.jitted = nn.jit(nn.BatchNorm, static_argnums=2)()
        self.checkpointed = nn.remat(Block, static_argnums=2)()
        self.scanned = nn.scan(Block, split_rngs={"params": True}, length=2, **axes)()
        mapped = nn.vmap(Block, split_rngs={"params": False}, axis_name="i", **one)
        self.mapped = mapped(axis_name="i")

    def __call__(self, x, train):
        mask = jnp.ones((6, 1, 1), bool)
        blocks = self.checkpointed, self.scanned, self.mapped
        y = self.bn(x, not train) + self.bn(x**2, use_running_average=not train, mask=mask)
        y += self.preset(x, not train) + jnp.sin(self.jitted(x, not train))
        return y + sum(block(x, train)[0] for block in blocks)


LINEN_PATHS = [
    ("bn",),
    ("preset",),
    ("jitted",),
    ("checkpointed", "BatchNorm_0"),
    ("scanned", "BatchNorm_0"),
    ("mapped", "BatchNorm_0"),
]


def linen_results(replace, variables, x):
    """Gradients, the updated statistics, and y in evaluation."""

    def loss(params):
        y, updated = Net().apply(variables | {"params": params}, x, True, mutable="batch_stats")
        return jnp.sum(jnp.sin(y)), updated

    def all_results():
        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        return grads, updated, Net().apply(variables | updated, x, False)

    if not replace:
        return all_results()
    with jax_bn.linen.replace_batch_norm() as replaced:
        results = all_results()
    assert replaced == LINEN_PATHS
    return results


def test_linen_numbers_variables_and_paths_are_those_of_flax():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (6, 3, 4))
    init = jax.jit(Net().init, static_argnums=2)
    flax = init(jax.random.key(1), x, True)
    with jax_bn.linen.replace_batch_norm() as replaced:
        ours = init(jax.random.key(1), x, True)
    assert replaced == LINEN_PATHS
    chex.assert_trees_all_equal(ours, flax)
    assert_agree(linen_results, True, False, ours, x)


def test_linen_programs_of_inside_and_outside_are_kept_apart():
    """So are those with forward_mode and without, and all stay in the cache."""
    x = FAR + jax.random.normal(jax.random.key(0), (6, 4))
    model = nn.jit(nn.BatchNorm)(use_running_average=False)
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    @chex.assert_max_traces(n=3)
    def training(variables, x):
        return model.apply(variables, x, mutable="batch_stats")

    def within(f, **options):
        with jax_bn.linen.replace_batch_norm(**options) as replaced:
            return f(variables, x), replaced

    flax = training(variables, x)
    ours, replaced = within(training)
    assert replaced == [()]
    chex.assert_trees_all_close(ours, flax, rtol=1e-2, atol=1e-2)
    assert (ours[1]["batch_stats"]["var"] != flax[1]["batch_stats"]["var"]).all()
    chex.assert_trees_all_equal(training(variables, x), flax)
    again, replaced = within(training)
    assert replaced == []  # from the cache
    chex.assert_trees_all_equal(again, ours)

    def tangent(variables, x):
        return jax.jvp(lambda x: training(variables, x)[0], (x,), (x**2,))

    _, replaced = within(jax.jit(tangent), forward_mode=True)
    assert replaced == [()]
    with pytest.raises(TypeError, match="forward-mode"):
        within(tangent)


class OwnLinen(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize("cls", [OwnLinen, nn.remat(OwnLinen)], ids=["plain", "remat"])
def test_linen_refuses_a_call_of_its_own_and_leaves_nothing_behind(cls):
    model = nn.Sequential([cls(use_running_average=False)])
    init = partial(jax.eval_shape, model.init, jax.random.key(0), jnp.ones((6, 4)))
    with pytest.raises(TypeError, match=r"at \('layers_0',\) is of class .*OwnLinen, a subclass"):
        with jax_bn.linen.replace_batch_norm():
            init()
    init()
    with jax_bn.linen.replace_batch_norm():
        with pytest.raises(RuntimeError, match=r"within another .* forward_mode=False; expected"):
            with jax_bn.linen.replace_batch_norm(forward_mode=True):
                pass


def test_linen_errors_and_intermediates_are_flax_s_own():
    """One call, as of Flax's layer, to whatever watches the model's calls."""
    x, seen = jnp.ones((6, 4)), []

    def spy(next_fun, args, kwargs, context):
        seen.append(type(context.module))
        return next_fun(*args, **kwargs)

    model = nn.BatchNorm()
    with nn.intercept_methods(spy), jax_bn.linen.replace_batch_norm():
        variables = jax.eval_shape(partial(model.init, use_running_average=True), seed(), x)
        with pytest.raises(ValueError, match=r"use_running_average.* must be passed"):
            jax.eval_shape(model.apply, variables, x)
        apply = partial(model.apply, use_running_average=True, capture_intermediates=True)
        _, updated = jax.eval_shape(partial(apply, mutable="intermediates"), variables, x)
    assert seen == 3 * [nn.BatchNorm]
    assert len(updated["intermediates"]["__call__"]) == 1


def seed():
    return jax.random.key(0)
