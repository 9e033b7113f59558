"""jax_bn.linen.BatchNorm beside flax.linen.BatchNorm: one import changed, nothing else."""

import dataclasses
from functools import partial
import inspect
from typing import Any

import chex
from flax import errors, linen as nn, serialization
import jax
import jax.numpy as jnp
from layers import BF16, Case, LayerContract, assert_agree
import pytest

import jax_bn.linen

OURS, FLAX = jax_bn.linen.BatchNorm, nn.BatchNorm


class TestLinen(LayerContract):
    ours, flax = OURS, FLAX

    def init(self, cls, x, **fields):
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
            return cls(**fields).init(jax.random.key(0), x, use_running_average=False)

    def applied(self, cls, **fields):
        def apply(variables, x, mask, train, **call):
            layer = cls(**fields)
            y, updated = layer.apply(
                variables, x, not train, mask=mask, mutable="batch_stats", **call
            )
            return y, updated["batch_stats"]

        return apply

    @pytest.mark.parametrize(
        "case",
        [
            Case((3, 4, 2, 5), fields=dict(axis=(-1, 1))),
            Case(dtype=BF16, fields=dict(param_dtype=BF16, force_float32_reductions=False)),
        ],
        ids=["two axes", "bfloat16 statistics"],
    )
    def test_numbers_of_what_only_linen_has(self, case):
        self.assert_same_numbers(case)

    @pytest.mark.parametrize("use_scale", [True, False])
    @pytest.mark.parametrize("use_bias", [True, False])
    @pytest.mark.parametrize("force_float32_reductions", [True, False])
    def test_variables_are_those_of_flax(self, use_scale, use_bias, force_float32_reductions):
        fields = dict(
            axis=(-1, 1),
            use_scale=use_scale,
            use_bias=use_bias,
            force_float32_reductions=force_float32_reductions,
            param_dtype=BF16,
            scale_init=nn.initializers.normal(),
            bias_init=nn.initializers.uniform(),
        )
        ours, flax = (self.init(cls, jnp.ones((2, 3, 4, 5)), **fields) for cls in (OURS, FLAX))
        chex.assert_trees_all_equal(ours, flax)
        chex.assert_trees_all_equal_dtypes(ours, flax)
        assert [(k, list(v)) for k, v in ours.items()] == [(k, list(v)) for k, v in flax.items()]

    def test_initializing_uses_the_batch_alone_and_leaves_the_averages(self):
        x = jnp.arange(12.0).reshape(6, 2)
        layer = OURS(use_running_average=False, axis_name="unbound", axis_index_groups=[[0]])
        y, variables = layer.init_with_output(jax.random.key(0), x)
        chex.assert_trees_all_equal(y, self.applied(OURS)(variables, x, None, train=True)[0])
        chex.assert_trees_all_equal(variables, self.init(FLAX, x))
        stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
        chex.assert_trees_all_equal(variables["batch_stats"], stats)


def test_the_interface_begins_with_that_of_flax():
    def fields(cls):
        own = [f for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
        return [(f.name, f.default, f.kw_only) for f in own]

    ours, flax = fields(OURS), fields(FLAX)
    assert ours[: len(flax)] == flax
    assert all(kw_only for _, _, kw_only in ours[len(flax) :])

    ours, flax = (inspect.signature(cls.__call__).parameters.values() for cls in (OURS, FLAX))
    plain = [[(p.name, p.default, p.kind) for p in ps] for ps in (ours, flax)]
    residual = ("residual", None, inspect.Parameter.KEYWORD_ONLY)
    assert plain[0] == [*plain[1], residual]


@pytest.mark.parametrize("cls", [OURS, FLAX], ids=["ours", "flax"])
@pytest.mark.parametrize(
    "fields, at_call, message",
    [
        ({}, None, "use_running_average.* must be passed"),
        ({"use_running_average": True}, True, "use_running_average.* just once"),
        ({"dtype": jnp.int32}, True, "must be inexact: .*int32"),
    ],
)
def test_refused_as_by_flax(cls, fields, at_call, message):
    x = jnp.ones((6, 4))
    variables = OURS().init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match=message):
        cls(**fields).apply(variables, x, at_call)


def test_missing_and_immutable_collections_raise_flax_s_own_errors():
    x = jnp.ones((6, 4))
    variables = OURS().init(jax.random.key(0), x, use_running_average=True)
    OURS().apply(variables, x, use_running_average=True)  # evaluation needs nothing mutable
    for names, evaluate in [
        (["params"], True),
        (["params"], False),
        (["batch_stats"], True),
        (["params", "batch_stats"], False),
    ]:
        given = {name: variables[name] for name in names}
        raised = []
        for cls in (OURS, FLAX):
            with pytest.raises(errors.FlaxError) as e:
                cls().apply(given, x, use_running_average=evaluate)
            raised.append((e.type, str(e.value)))
        assert raised[0] == raised[1]


class Block(nn.Module):
    """Dense, BatchNorm, tanh, with the signature that nn.scan asks for."""

    norm: Any
    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        x = self.norm(use_running_average=not self.train)(nn.Dense(x.shape[-1], use_bias=False)(x))
        return nn.tanh(x), None


TRANSFORMS = {
    "jit": (nn.jit, {}),
    "remat": (nn.remat, {}),
    "scan": (
        partial(
            nn.scan,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        ),
        {},
    ),
    "vmap": (
        partial(
            nn.vmap,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="i",
        ),
        {"axis_name": "i"},
    ),
}


def gradients(module, variables, x):
    """Gradients of a training loss, and the updated statistics."""

    def loss(params):
        y, updated = module.apply(variables | {"params": params}, x, None, mutable="batch_stats")
        return jnp.sum(jnp.sin(jax.tree.leaves(y)[0])), updated["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize("transform, fields", TRANSFORMS.values(), ids=TRANSFORMS)
def test_under_the_transforms_of_linen(transform, fields):
    def module(cls):
        return transform(Block)(partial(cls, **fields))

    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    variables = jax.jit(module(OURS).init)(jax.random.key(1), x, None)
    assert_agree(lambda cls, *args: gradients(module(cls), *args), OURS, FLAX, variables, x)


class Model(nn.Module):
    """A block and a readout."""

    norm: Any
    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(3)(Block(self.norm, self.train)(x)[0])


def step(cls, variables, x):
    """The variables after a step of gradient descent."""
    grads, stats = gradients(Model(cls), variables, x)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    return {"params": params, "batch_stats": stats}


def resumed(cls, variables, x):
    """The logits of a model with these variables, and its variables after one more step."""
    return Model(cls, train=False).apply(variables, x), step(cls, variables, x)


@pytest.mark.parametrize("source, target", [(FLAX, OURS), (OURS, FLAX)], ids=["from", "to"])
def test_checkpoints_are_those_of_flax(source, target):
    x = jax.random.normal(jax.random.key(0), (8, 4))
    saved = Model(source).init(jax.random.key(1), x)
    for _ in range(3):
        saved = jax.jit(step, static_argnums=0)(source, saved, x)
    template = Model(target).init(jax.random.key(2), x)
    restored = serialization.from_bytes(template, serialization.to_bytes(saved))
    chex.assert_trees_all_equal(restored, saved)
    assert_agree(resumed, OURS, FLAX, restored, x)
