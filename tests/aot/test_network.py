"""A training step of ResNet-50 (batch 128, bfloat16, 224x224), compiled for an H200.

Beside the same network with Flax's layer: bytes moved, peak of temporary memory, convolutions.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
from models import resnet, resnet_nnx
import optax
import pytest

from benchmarks.compiled import bytes_moved, bytes_of_libraries, convolutions, peak_temporary
import jax_bn

IMAGES = jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.bfloat16)
LABELS = jax.ShapeDtypeStruct((128,), jnp.int32)
NETWORKS: dict[str, dict[str, Any]] = {
    "flax": {},
    "fused": dict(fused=True),
    "checkpointed": dict(fused=True, remat_policy=jax_bn.remat_policy),
}


class Counts(NamedTuple):
    """Of a training step; bytes, but for the convolutions."""

    moved: float
    kept: int  # at the peak of temporary memory
    convolutions: int
    by_convolutions: float  # moved by them, and by the last layer's products


def in_linen(**options):
    """(params, stats, images) -> (logits, stats); and the types of params and stats."""
    options = options or dict(batch_norm=flax.linen.BatchNorm)
    network = resnet.resnet50(dtype=jnp.bfloat16, **options)

    def apply(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = network.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def initial(key, images):
        variables = network.init(key, images, train=False)
        return variables["params"], variables["batch_stats"]

    return apply, *jax.eval_shape(initial, jax.random.key(0), IMAGES)


def in_nnx(**options):
    """As `in_linen`."""
    options = options or dict(batch_norm=flax.nnx.BatchNorm)
    make = partial(resnet_nnx.resnet50, dtype=jnp.bfloat16, **options)
    network = flax.nnx.eval_shape(lambda: make(rngs=flax.nnx.Rngs(0)))
    graph, params, stats = flax.nnx.split(network, flax.nnx.Param, flax.nnx.BatchStat)

    def apply(params, stats, images):
        network = flax.nnx.merge(graph, params, stats, copy=True)
        return network(images), flax.nnx.state(network, flax.nnx.BatchStat)

    return apply, params, stats


def training_step(apply, params, stats):
    """One step of gradient descent with momentum, and the types of its arguments."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, stats, momentum, images, labels):
        def loss(params):
            logits, updated = apply(params, stats, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum, params)
        return optax.apply_updates(params, updates), updated, momentum, value

    return step, (params, stats, jax.eval_shape(optimizer.init, params), IMAGES, LABELS)


def by_one_worker(framework):
    """For the tests of one framework, which share what takes longest, its compiled programs."""
    return pytest.param(framework, marks=pytest.mark.xdist_group(framework.__name__))


@pytest.fixture(scope="module", params=map(by_one_worker, (in_linen, in_nnx)), ids=["linen", "nnx"])
def counted(for_h200, request):
    @cache
    def counted(name):
        """Bytes moved, peak of temporary memory, convolutions, bytes that these move."""
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
            step, types = training_step(*request.param(**NETWORKS[name]))
            compiled = for_h200(step, *types)
        moved, kept = bytes_moved(compiled), peak_temporary(compiled)
        return Counts(moved, kept, convolutions(compiled), bytes_of_libraries(compiled))

    return counted


def test_fused_moves_less_and_keeps_less(counted):
    ours, flaxs = counted("fused"), counted("flax")
    assert ours.moved <= 0.94 * flaxs.moved
    assert ours.kept <= 0.94 * flaxs.kept


def test_the_remat_policy_keeps_less_still(counted):
    ours, flaxs = counted("checkpointed"), counted("flax")
    assert ours.kept <= 0.78 * flaxs.kept
    assert ours.moved <= 0.96 * flaxs.moved


def test_no_convolution_is_computed_again(counted):
    # 53 of them: forward, for the kernel and, but for the first, for the input.
    for name in NETWORKS:
        assert counted(name).convolutions == 3 * 53 - 1


def test_where_the_bytes_are(counted):
    """The convolutions move as much whatever the layer is, and three eighths of all."""
    ours, flaxs = counted("fused"), counted("flax")
    assert ours.by_convolutions == pytest.approx(flaxs.by_convolutions, rel=0.001)
    assert ours.by_convolutions / ours.moved == pytest.approx(0.38, abs=0.01)
    assert ours.moved - ours.by_convolutions <= 0.9 * (flaxs.moved - flaxs.by_convolutions)
