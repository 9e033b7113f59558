"""Named residuals: what `jax_bn.remat_policy` keeps, and what a `lax.scan` over layers stacks."""

from functools import partial

import chex
from flax import linen as nn, nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import residual_bytes
import jax_bn
import jax_bn.linen
import jax_bn.nnx

N, C = 512, 8


def arrays(dtype="float32"):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(N, C)), random.normal(size=(C, C))
    scale, bias = random.normal(size=(2, C))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.float32(scale), jnp.float32(bias)


def block(x, w, scale, bias, **options):
    """Of x's size: x, x @ w and y."""
    return jnp.tanh(jax_bn.batch_norm(x @ w, scale, bias, **options)[0])


def small(dtype):
    """What a block may keep beside arrays of x's size."""
    return C * C * jnp.dtype(dtype).itemsize + 16 * C * 4


OPTIONS = {
    "default": {},
    "forward mode": dict(forward_mode=True),
    "activation": dict(activation=jax.nn.gelu),
    "virtual batches": dict(virtual_batch_size=64),
    "masked": dict(mask=np.arange(N) % 5 > 0),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_policy_keeps_inputs_and_statistics(options, dtype):
    args = arrays(dtype)
    f = partial(block, **OPTIONS[options])
    kept = residual_bytes(jax.checkpoint(f, policy=jax_bn.remat_policy), *args)
    mask = N if options == "masked" else 0
    groups = 8 if options == "virtual batches" else 1
    # JAX hands the input of a tangent out of it once more: the same x under two names.
    arrays_of_x = 3 if options == "forward mode" else 2
    assert kept <= arrays_of_x * args[0].nbytes + mask + groups * small(dtype)
    # It is the policy that keeps x @ w, and the lack of one that keeps tanh.
    assert residual_bytes(jax.checkpoint(f), *args) <= args[0].nbytes + mask + small(dtype)
    assert residual_bytes(f, *args) >= 3 * args[0].nbytes


@pytest.mark.parametrize("options", OPTIONS)
def test_it_changes_no_gradient(options):
    def gradients(f, *args):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2, 3))(*args)

    f = partial(block, **OPTIONS[options])
    kept = jax.checkpoint(f, policy=jax_bn.remat_policy)
    chex.assert_trees_all_close(
        jax.jit(partial(gradients, kept))(*arrays()),
        jax.jit(partial(gradients, f))(*arrays()),
        rtol=1e-4,
        atol=1e-5,
    )


def count(primitive, f, *args):
    """How often a gradient takes it, in the branches for CPUs."""

    def within(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name == primitive
            branches = eqn.params.get("branches")
            inner = branches[-1:] if branches else jax.tree.leaves(list(eqn.params.values()))
            for v in inner:
                if hasattr(v, "eqns") or hasattr(v, "jaxpr"):
                    yield from within(getattr(v, "jaxpr", v))

    gradient = jax.grad(lambda *args: jnp.sum(f(*args)), tuple(range(len(args))))
    return sum(within(jax.make_jaxpr(gradient)(*args).jaxpr))


def test_statistics_are_not_computed_again():
    args = arrays()
    plain = count("reduce_sum", block, *args)
    assert plain > 0
    assert count("reduce_sum", jax.checkpoint(block, policy=jax_bn.remat_policy), *args) == plain
    assert count("reduce_sum", jax.checkpoint(block), *args) > plain


def test_it_composes_with_the_users_policy():
    """The product of two blocks is kept too where somebody asks for it."""
    args = arrays()
    mine = jax.checkpoint_policies.save_only_these_names("mine")
    both = jax.checkpoint_policies.save_from_both_policies(jax_bn.remat_policy, mine)

    def two(x, w, scale, bias):
        h = checkpoint_name(block(x, w, scale, bias), "mine")
        return block(h, w, scale, bias)

    def kept(policy):
        return residual_bytes(jax.checkpoint(two, policy=policy), *args)

    assert kept(jax_bn.remat_policy) <= 3 * args[0].nbytes + 2 * small("float32")
    assert kept(both) >= 4 * args[0].nbytes


class Block(nn.Module):
    """As users write it: convolution, normalization, relu, twice, with a shortcut."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(C, (3, 3), use_bias=False, name="conv1")(x)
        y = nn.relu(jax_bn.linen.BatchNorm(use_running_average=False, name="bn1")(y))
        y = nn.Conv(C, (3, 3), use_bias=False, name="conv2")(y)
        return nn.relu(x + jax_bn.linen.BatchNorm(use_running_average=False, name="bn2")(y))


@pytest.mark.long
def test_no_convolution_is_computed_again_in_linen():
    x = jnp.ones((4, 8, 8, C))

    def convolutions(module):
        variables = module.init(jax.random.key(0), x)

        def apply(params):
            return module.apply(variables | {"params": params}, x, mutable="batch_stats")[0]

        return count("conv_general_dilated", apply, variables["params"])

    kept = convolutions(nn.remat(Block, policy=jax_bn.remat_policy)())
    # forward, for both kernels, and for the input of the second
    assert kept == convolutions(Block()) == 5
    assert convolutions(nn.remat(Block)()) > 5


def test_it_serves_nnx_remat():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(C, C, use_bias=False, rngs=rngs)
            self.bn = jax_bn.nnx.BatchNorm(C, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.bn(self.linear(x)))

    x = arrays()[0]
    graphdef, params, averages = nnx.split(Layer(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def kept(call):
        def apply(params, x):
            return call(nnx.merge(graphdef, params, averages, copy=True), x)

        return residual_bytes(apply, params, x)

    assert kept(Layer.__call__) >= 3 * x.nbytes
    with_policy = nnx.remat(Layer.__call__, policy=jax_bn.remat_policy)
    assert kept(with_policy) <= 2 * x.nbytes + 2 * small("float32")


# ---- scan ----------------------------------------------------------------------------------------


def over_layers(layer, x, weights):
    """A stack of layers as one `scan`: what each keeps is stacked."""
    return lax.scan(lambda h, w: (layer(h, *w), None), x, weights)[0]


@jax.numpy_dtype_promotion("standard")  # as Flax needs it
def flax_layer(x, scale, bias):
    layer = nn.BatchNorm(use_running_average=False, dtype=x.dtype)
    stats = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    return layer.apply(variables, x, mutable="batch_stats")[0]


@pytest.mark.parametrize(
    "dtype, options, of_flax",
    [("bfloat16", {}, 4), ("float32", {}, 2), ("bfloat16", dict(forward_mode=True), 4)],
)
def test_a_scan_over_layers_stacks_one_x_a_layer(dtype, options, of_flax):
    layers = 6
    x, _, scale, bias = arrays(dtype)
    weights = tuple(jnp.tile(v, (layers, 1)) for v in (scale, bias))

    def ours(x, scale, bias):
        return jax_bn.batch_norm(x, scale, bias, **options)[0]

    a_layer = residual_bytes(partial(over_layers, ours), x, weights) / layers
    assert a_layer <= x.nbytes + small("float32")
    assert (
        residual_bytes(partial(over_layers, flax_layer), x, weights) / layers >= of_flax * x.nbytes
    )


def test_a_checkpointed_scan():
    """Whole blocks in a scan, each keeping its input and that of its normalization."""
    layers = 6
    x, w, scale, bias = arrays()
    weights = tuple(jnp.tile(v, (layers, *[1] * v.ndim)) for v in (w, scale, bias))
    kept = jax.checkpoint(block, policy=jax_bn.remat_policy, prevent_cse=False)
    assert residual_bytes(partial(over_layers, kept), x, weights) / layers <= 2 * x.nbytes + small(
        "float32"
    )

    def loss(layer, weights):
        return jnp.sum(jnp.sin(over_layers(layer, x, weights)))

    chex.assert_trees_all_close(
        jax.jit(jax.grad(partial(loss, kept)))(weights),
        jax.jit(jax.grad(partial(loss, block)))(weights),
        rtol=1e-3,
        atol=1e-4,
    )
