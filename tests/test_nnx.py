"""jax_bn.nnx.BatchNorm beside flax.nnx.BatchNorm: one import changed, nothing else."""

from functools import partial
import inspect
from typing import Any

import chex
from flax import nnx, serialization
from flax.nnx.nn.dtypes import promote_dtype
import jax
import jax.numpy as jnp
from layers import BF16, Case, LayerContract, assert_agree, assert_better, examples, judges, run
import pytest

import jax_bn.nnx

OURS, FLAX = jax_bn.nnx.BatchNorm, nnx.BatchNorm


def variables(layer):
    """The layer's variables, in the form of Linen's."""
    params, stats = (
        nnx.to_pure_dict(nnx.state(layer, kind)) for kind in (nnx.Param, nnx.BatchStat)
    )
    return {"params": params, "batch_stats": stats}


class TestNNX(LayerContract):
    ours, flax = OURS, FLAX

    def init(self, cls, x, **fields):
        return variables(cls(x.shape[fields.get("axis", -1)], rngs=nnx.Rngs(0), **fields))

    def applied(self, cls, **fields):
        def apply(given, x, mask, train, **call):
            layer = cls(given["batch_stats"]["mean"].size, rngs=nnx.Rngs(0), **fields)
            nnx.update(layer, given["params"] | given["batch_stats"])
            y = layer(x, use_running_average=not train, mask=mask, **call)
            return y, variables(layer)["batch_stats"]

        return apply

    def test_bfloat16_is_evaluated_with_float32_statistics(self):
        """Flax rounds them to bfloat16, and so shifts a mean of 100.26 to 100.5."""
        args = self.arrays(Case(dtype=BF16))
        args = args._replace(x=args.x + BF16(97))
        args.variables["batch_stats"]["mean"] = jnp.full(4, 100.26, jnp.float32)
        ours, flax, definition, oracle = (
            results["evaluation"]
            for results in (
                run(self.applied(OURS, dtype=BF16), *args),
                run(self.applied(FLAX, dtype=BF16), *args),
                *judges(args),
            )
        )
        definition["y"] = definition["y"].astype(BF16)
        assert_better(ours, flax, definition, oracle, examples(args))

    @pytest.mark.parametrize(
        "promote_dtype, dtype",
        [
            (lambda args, dtype: args, None),
            (lambda args, dtype: promote_dtype(args, dtype=BF16), jnp.float16),
        ],
        ids=["nothing", "to bfloat16"],
    )
    def test_promote_dtype_works_as_in_flax(self, promote_dtype, dtype):
        fields = dict(promote_dtype=promote_dtype, dtype=dtype)
        self.assert_same_numbers(Case(dtype=BF16, fields=fields))


def test_the_interface_begins_with_that_of_flax():
    for name in ("__init__", "__call__", "set_view"):
        ours, flax = (
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(OURS, name), getattr(FLAX, name))
        )
        assert ours[: len(flax)] == flax
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for *_, kind in ours[len(flax) :])


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_variables_are_those_of_flax(use_scale, use_bias):
    def made(cls):
        rngs = nnx.Rngs(0)
        layer = cls(
            4,
            use_scale=use_scale,
            use_bias=use_bias,
            param_dtype=BF16,
            scale_init=nnx.initializers.normal(),
            bias_init=nnx.initializers.uniform(),
            scale_metadata={"out_sharding": ("features",), "eager_sharding": False},
            bias_metadata={"note": "any"},
            rngs=rngs,
        )
        named = {k: v for k, v in vars(layer).items() if isinstance(v, nnx.Variable)}
        return list(vars(layer)), named, rngs.params.count[...]

    (ours, own, drawn), (flax, expected, expected_drawn) = made(OURS), made(FLAX)
    added = ["virtual_batch_size", "activation", "forward_mode", "implementation"]
    added += ["unbiased", "freeze_statistics", "freeze_affine"]
    assert ours == [*flax, *added]  # all attributes, in order of creation
    assert drawn == expected_drawn
    for name, variable in expected.items():
        assert type(own[name]) is type(variable)
        assert own[name].get_metadata() == variable.get_metadata()
        chex.assert_trees_all_equal(own[name][...], variable[...])
        assert own[name].dtype == variable.dtype


@pytest.mark.parametrize("cls", [OURS, FLAX], ids=["ours", "flax"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_running_average": None}, "use_running_average"),
        ({"dtype": jnp.int32}, "must be inexact: .*int32"),
    ],
)
def test_refused_as_by_flax(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(4, rngs=nnx.Rngs(0), **fields)(jnp.ones((6, 4)))


@pytest.mark.parametrize("train", [True, False])
def test_a_wrong_number_of_features_is_named(train):
    layer = OURS(5, use_running_average=not train, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has shape \(6, 4\).*num_features=5"):
        layer(jnp.ones((6, 4)))


def test_an_integer_mask_is_an_improvement_on_flax():
    x, mask = jnp.ones((6, 4)), jnp.ones((6, 1), jnp.int32)
    OURS(4, rngs=nnx.Rngs(0))(x, mask=mask)
    with pytest.raises(ValueError, match="boolean"):
        FLAX(4, rngs=nnx.Rngs(0))(x, mask=mask)


@pytest.mark.parametrize("cls", [OURS, FLAX], ids=["ours", "flax"])
def test_switching_between_training_and_evaluation(cls):
    x = jnp.arange(12.0).reshape(6, 2)
    layer = cls(2, rngs=nnx.Rngs(0))
    call = nnx.jit(cls.__call__, static_argnames="use_running_average")

    def trains(layer, **at_call):
        before = layer.mean[...]
        call(layer, x, **at_call)
        return bool((layer.mean[...] != before).all())

    assert trains(layer)
    layer.eval()
    assert not trains(layer)
    assert trains(layer, use_running_average=False)  # the call wins over the attribute
    layer.train()
    assert trains(layer)
    assert not trains(layer, use_running_average=True)
    assert not trains(nnx.view(layer, use_running_average=True))
    assert trains(layer)  # a view leaves the layer as it is
    layer.set_view(use_running_average=True)
    assert not trains(layer)
    layer.set_view()
    assert not trains(layer)


class Block(nnx.Module):
    """Linear, BatchNorm, tanh."""

    def __init__(self, norm, *, rngs):
        self.linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = norm(4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


def merged(block, x):
    """Through jax.jit, as a graph definition and a state."""
    graphdef, state = nnx.split(block)

    @jax.jit
    def call(state, x):
        block = nnx.merge(graphdef, state)
        return block(x), nnx.state(block)

    y, state = call(state, x)
    nnx.update(block, state)
    return y


TRANSFORMS = {
    "jit": nnx.jit(Block.__call__),
    "remat": nnx.remat(Block.__call__),
    "split and merge": merged,
    "vmap": nnx.vmap(Block.__call__, in_axes=(None, 0), axis_name="i"),
    "scan": nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_the_transforms_of_nnx(name):
    def made(norm):
        def block(rngs):
            return Block(partial(norm, axis_name="i") if name == "vmap" else norm, rngs=rngs)

        if name != "scan":
            return block(nnx.Rngs(0))
        return nnx.split_rngs(splits=3)(nnx.vmap(block))(nnx.Rngs(0))

    def gradients(norm, state, x):
        block = made(norm)
        nnx.update(block, state)
        call = TRANSFORMS[name]
        args = (lambda b: (x, b)) if name == "scan" else (lambda b: (b, x))
        grads = nnx.grad(lambda block: jnp.sum(jnp.sin(call(*args(block)))))(block)
        return nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(block))

    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    state: Any = nnx.to_pure_dict(nnx.state(made(OURS)))
    state["norm"]["bias"] += 1  # or the next layer's means are sums that cancel to next to nothing
    assert_agree(gradients, OURS, FLAX, state, x)


class Model(nnx.Module):
    """A block and a readout."""

    def __init__(self, norm, *, rngs):
        self.block = Block(norm, rngs=rngs)
        self.readout = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.block(x))


def loaded(norm, state):
    """A model with the variables of `state`."""
    model = Model(norm, rngs=nnx.Rngs(1))
    nnx.update(model, state)
    return model


def step(norm, state, x):
    """The state after a step of gradient descent."""
    model = loaded(norm, state)
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    return nnx.to_pure_dict(nnx.state(model))


def resumed(norm, state, x):
    """The logits of a model with this state, and its state after one more step."""
    model = loaded(norm, state)
    model.eval()
    return model(x), step(norm, state, x)


@pytest.mark.parametrize("source, target", [(FLAX, OURS), (OURS, FLAX)], ids=["from", "to"])
def test_checkpoints_are_those_of_flax(source, target):
    x = jax.random.normal(jax.random.key(0), (8, 4))
    saved = nnx.to_pure_dict(nnx.state(Model(source, rngs=nnx.Rngs(0))))
    for _ in range(3):
        saved = jax.jit(step, static_argnums=0)(source, saved, x)
    graphdef, template = nnx.split(Model(target, rngs=nnx.Rngs(1)))
    restored = serialization.from_bytes(nnx.to_pure_dict(template), serialization.to_bytes(saved))
    chex.assert_trees_all_equal(restored, saved)
    # The state itself, variables and all, fits the other model as well.
    merged = nnx.merge(graphdef, nnx.state(loaded(source, saved)))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(merged)), saved)
    assert_agree(resumed, OURS, FLAX, restored, x)
