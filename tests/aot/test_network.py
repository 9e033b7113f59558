"""A training step of ResNet-50 (batch 128, bfloat16, 224x224), compiled for an H200.

Beside the same network with Flax's layer: bytes moved, peak of temporary memory, convolutions.
"""

from functools import cache
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from models import resnet
import optax
import pytest

from benchmarks.compiled import bytes_moved, convolutions, peak_temporary
import jax_bn

NETWORKS: dict[str, dict[str, Any]] = {
    "flax": dict(batch_norm=flax.linen.BatchNorm),
    "fused": dict(fused=True),
    "checkpointed": dict(fused=True, remat_policy=jax_bn.remat_policy),
}


def training_step(network):
    """One step of gradient descent with momentum, and the types of its arguments."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(variables, momentum, images, labels):
        def loss(params):
            logits, updated = network.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        params = variables["params"]
        (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum, params)
        return updated | {"params": optax.apply_updates(params, updates)}, momentum, value

    def initial(key, images):
        variables = network.init(key, images, train=False)
        return variables, optimizer.init(variables["params"])

    images = jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((128,), jnp.int32)
    return step, (*jax.eval_shape(initial, jax.random.key(0), images), images, labels)


@pytest.fixture(scope="module")
def counted(for_h200):
    @cache
    def counted(name):
        """Bytes moved, peak of temporary memory, convolutions."""
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
            step, types = training_step(resnet.resnet50(dtype=jnp.bfloat16, **NETWORKS[name]))
            compiled = for_h200(step, *types)
        return bytes_moved(compiled), peak_temporary(compiled), convolutions(compiled)

    return counted


def test_fused_moves_less_and_keeps_less(counted):
    moved, kept, _ = (a / b for a, b in zip(counted("fused"), counted("flax"), strict=True))
    assert moved <= 0.94
    assert kept <= 0.94


def test_the_remat_policy_keeps_less_still(counted):
    moved, kept, _ = (a / b for a, b in zip(counted("checkpointed"), counted("flax"), strict=True))
    assert kept <= 0.78
    assert moved <= 0.96


def test_no_convolution_is_computed_again(counted):
    # 53 of them: forward, for the kernel and, but for the first, for the input.
    assert counted("checkpointed")[2] == counted("fused")[2] == counted("flax")[2] == 3 * 53 - 1
