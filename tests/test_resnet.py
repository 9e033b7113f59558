"""The networks of examples/models: their sizes, and one set of variables for every option.

Both frameworks are taken as pure functions of variables as Linen has them. What a network has to
compute is said by Linen's in float64 with Flax's own batch normalization.
"""

from functools import cache, partial
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

import jax_bn.linen
import jax_bn.nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
N, SIZE, CLASSES = 8, 8, 5
SMALL: dict[str, Any] = dict(stage_sizes=(1, 1), classes=CLASSES, width=4, small_images=True)
# Together they have each kind of shortcut: x itself, a convolution, and one with a stride.
NETWORKS: dict[str, dict[str, Any]] = dict(
    basic=SMALL | dict(bottleneck=False), bottleneck=SMALL | dict(bottleneck=True)
)
FLAX: dict[str, Any] = dict(linen=nn.BatchNorm, nnx=nnx.BatchNorm)
OURS: dict[str, Any] = dict(linen=jax_bn.linen.BatchNorm, nnx=jax_bn.nnx.BatchNorm)
FRAMEWORKS = "linen", "nnx"
both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
both_networks = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def module(framework: str) -> Any:
    return importlib.import_module(dict(linen="models.resnet", nnx="models.resnet_nnx")[framework])


class Outcome(NamedTuple):
    """Of one pass forward and back; `batch_stats` and `grads` are trees as in Linen."""

    loss: jax.Array
    logits: jax.Array
    batch_stats: Any
    grads: Any


def shapes(framework: str, image=(SIZE, SIZE, 1), constructor="ResNet", **options: Any):
    """The variables, `{"params": ..., "batch_stats": ...}`, as shapes and dtypes."""
    make = getattr(module(framework), constructor)
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
        if framework == "linen":
            key, images = jax.random.key(0), jnp.ones((2, *image))
            return jax.eval_shape(lambda: make(**options).init(key, images, train=True))
        model = nnx.eval_shape(lambda: make(channels_in=image[-1], rngs=nnx.Rngs(0), **options))
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return dict(params=nnx.to_pure_dict(params), batch_stats=nnx.to_pure_dict(batch_stats))


def apply_linen(variables, images, train: bool, **options):
    """Logits and the new `batch_stats`."""
    model = module("linen").ResNet(**options)
    logits, updated = model.apply(variables, images, train=train, mutable=["batch_stats"])
    return logits, updated["batch_stats"]


def apply_nnx(variables, images, train: bool, **options):
    """Logits and the new `batch_stats`."""
    make = module("nnx").ResNet
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: make(channels_in=images.shape[-1], rngs=nnx.Rngs(0), **options))
    )
    states = nnx.State(variables["params"]), nnx.State(variables["batch_stats"])
    model = nnx.merge(graphdef, *states, copy=True)
    model.train() if train else model.eval()
    logits = model(images)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


APPLY = dict(linen=apply_linen, nnx=apply_nnx)


def train(framework: str, variables, images, labels, **options) -> Outcome:
    """The mean cross entropy of a batch and its gradient."""

    def loss(params):
        changed = variables | dict(params=params)
        logits, batch_stats = APPLY[framework](changed, images, train=True, **options)
        chosen = jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, CLASSES)
        return -chosen.sum(-1).mean(), (logits, batch_stats)

    params = variables["params"]
    (value, (logits, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return Outcome(value, logits, batch_stats, grads)


@cache
def arguments(network: str):
    """Variables unlike those that a network starts from, images, labels."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        match path[-1].key:
            case "kernel":
                return values / np.sqrt(values[..., 0].size, dtype=leaf.dtype)
            case "scale" | "var":
                return np.exp(values / 4)
            case _:
                return values / 4

    variables = jax.tree_util.tree_map_with_path(draw, shapes("linen", **NETWORKS[network]))
    images = rng.normal(size=(N, SIZE, SIZE, 1)).astype(np.float32)
    return variables, images, rng.integers(CLASSES, size=N, dtype=np.int32)


def compiled(framework: str, network: str, **options):
    """`train` as a function of `arguments`; compiled in haste, which halves the time of a test."""
    f = partial(train, framework, **NETWORKS[network], **options)
    return jax.jit(f, compiler_options=dict(xla_backend_optimization_level=0))


@cache
def trained(framework: str, network: str, **options) -> Outcome:
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
        return compiled(framework, network, **options)(*arguments(network))


@cache
def oracle(network: str) -> Outcome:
    wide = compiled("linen", network, batch_norm=FLAX["linen"], dtype=jnp.float64)
    with jax.numpy_dtype_promotion("standard"):
        return in_float64(wide, *arguments(network))


@both_frameworks
@pytest.mark.parametrize(
    ("constructor", "count"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)]
)
def test_number_of_parameters(framework, constructor, count):
    variables = shapes(framework, (224, 224, 3), constructor)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    chex.assert_trees_all_equal(variables, shapes("linen", (224, 224, 3), constructor))


@both_networks
@both_frameworks
def test_variables_are_the_same_whatever_the_options(framework, network):
    expected = shapes("linen", **NETWORKS[network])
    changes: list[dict[str, Any]] = [
        dict(batch_norm=FLAX[framework]),
        dict(batch_norm=OURS[framework]),
        dict(remat_policy=jax.checkpoint_policies.everything_saveable),
        dict(dtype=jnp.bfloat16),
    ]
    for change in changes:
        found = shapes(framework, **NETWORKS[network], **change)
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.long
@both_networks
@both_frameworks
def test_trains_as_linen_with_the_layer_of_flax(framework, network):
    definition = trained("linen", network, batch_norm=FLAX["linen"])
    # Within a layer rounding averages; over the layers, forward and back, it adds up.
    layers = len(jax.tree.leaves(definition.batch_stats)) // 2
    examples = N * SIZE**2 * (2 * layers) ** 2
    for options in ({}, dict(batch_norm=FLAX[framework])):
        found = trained(framework, network, **options)
        assert_as_accurate(found, definition, oracle(network), examples)


@pytest.mark.long
@both_frameworks
def test_remat_changes_no_number(framework):
    asked = set()

    def save_nothing(primitive, *_, **__):
        asked.add(primitive.name)
        return False

    found = trained(framework, "basic", remat_policy=save_nothing)
    assert "conv_general_dilated" in asked
    chex.assert_trees_all_close(found, trained(framework, "basic"), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@both_frameworks
def test_bfloat16_within_and_float32_at_the_ends(framework):
    found = trained(framework, "basic", dtype=jnp.bfloat16)
    chex.assert_tree_all_finite(found)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    # Of the order of bfloat16's eps, 2**-7, so computed in it; float32's is 2**-23.
    difference = np.abs(found.logits - oracle("basic").logits).max()
    assert 2**-12 < difference < 2**-3


def test_evaluation_is_the_same_in_linen_and_nnx():
    variables, images, _ = arguments("basic")
    logits = []
    for framework in FRAMEWORKS:
        apply = partial(APPLY[framework], **NETWORKS["basic"], train=False)
        found, batch_stats = jax.jit(apply)(variables, images)
        chex.assert_trees_all_equal(batch_stats, variables["batch_stats"])
        logits.append(found)
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@both_networks
@both_frameworks
def test_any_image_size_gives_logits(framework, network):
    for small_images in (False, True):
        options: dict[str, Any] = NETWORKS[network] | dict(small_images=small_images)
        variables = shapes(framework, (37, 45, 3), **options)
        apply = partial(APPLY[framework], **options, train=True)
        logits, _ = jax.eval_shape(apply, variables, jnp.ones((2, 37, 45, 3)))
        assert logits.shape == (2, CLASSES)


@both_networks
def test_halved_sizes_are_rounded_up(network):
    model = module("linen").ResNet(**NETWORKS[network] | dict(small_images=False))
    init = partial(model.init, jax.random.key(0), train=True, capture_intermediates=True)
    results = jax.eval_shape(init, jnp.ones((2, 37, 45, 3)))["intermediates"]

    def size(layer):
        return layer["__call__"][0].shape[1:3]

    assert size(results["conv_stem"]) == (19, 23)
    assert size(results["stage1_block1"]) == (10, 12)  # after the max pool
    assert size(results["stage2_block1"]) == (5, 6)
    strided = dict(basic="conv1", bottleneck="conv2")[network]  # v1.5: the 3x3 convolution
    sizes = {name: size(results["stage2_block1"][name]) for name in ("conv1", "conv2")}
    assert sizes == dict(conv1=(10, 12), conv2=(5, 6)) | {strided: (5, 6)}
