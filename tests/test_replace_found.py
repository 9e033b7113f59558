"""replace_batch_norm on models that others have published, as they install from PyPI.

`make peers` brings those whose requirements fit ours. jaxnn asks for certain
versions of JAX and Flax, but works with later ones: `pip install --no-deps jaxnn==0.1.1 pillow`, on
Python 3.12.
"""

from functools import partial

import chex
from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from layers import assert_agree
import pytest

from jax_bn.linen import replace_batch_norm as within
from jax_bn.nnx import replace_batch_norm


def images():
    return 3 + 2 * jax.random.normal(jax.random.key(0), (4, 16, 16, 3))


@pytest.fixture(autouse=True)
def promotion():
    """These models add arrays of different ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_jax_resnet():
    """A Linen model, which trains where it may update `batch_stats`."""
    found = pytest.importorskip("jax_resnet", reason="not installed: make peers")
    sizes = dict(stage_sizes=(1,), hidden_sizes=(8,), n_classes=3)
    model = found.ResNet(found.ResNetBlock, **sizes)
    init = partial(model.init, jax.random.key(1), images())
    variables = jax.jit(init)()
    with within() as replaced:
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(init), variables)
    layers = {path[:-1] for path in flatten_dict(variables["batch_stats"])}
    assert set(replaced) == layers and len(layers) == 4

    def results(replace, variables, x):
        def loss(params):
            y, updated = model.apply(variables | {"params": params}, x, mutable="batch_stats")
            return jnp.sum(jnp.sin(y)), updated

        def both():
            gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
            return gradients, updated, model.apply(variables | updated, x)

        if not replace:
            return both()
        with within() as replaced:
            out = both()
        assert set(replaced) == layers
        return out

    assert_agree(results, True, False, variables, images())


@pytest.mark.filterwarnings("ignore:'.value' .* is now deprecated")  # jaxnn's own
def test_jaxnn():
    """An NNX model, with layers as attributes, in lists and in nnx.Sequential."""
    found = pytest.importorskip("jaxnn", reason="needs pip install --no-deps jaxnn==0.1.1 pillow")
    resnet = partial(found.models.ResNet, found.models.BasicBlock, (1, 1, 1, 1), num_classes=3)

    def results(replace, state, x):
        model = resnet(channels=(8, 8, 8, 8), rngs=nnx.Rngs(0))
        nnx.update(model, state)
        if replace:
            assert len(replace_batch_norm(model)) == 13
        gradients = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        model.eval()
        return nnx.to_pure_dict(gradients), state, model(x)

    state = nnx.state(resnet(channels=(8, 8, 8, 8), rngs=nnx.Rngs(0)), (nnx.Param, nnx.BatchStat))
    assert_agree(results, True, False, nnx.to_pure_dict(state), images())
