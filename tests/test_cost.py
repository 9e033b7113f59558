"""What is not differentiated is not computed, counted in operations of the compiled program.

Beside each program stands the same one written out, of the stages that it needs and no others. At
the end: what a whole training step holds in memory, beside Flax's.
"""

from functools import partial
import re

import digits
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.compiled import peak_temporary
import jax_bn
from jax_bn import _stages
import jax_bn.linen
import jax_bn.nnx

N, C = 4096, 8
X = jax.ShapeDtypeStruct((N, C), jnp.float32)
V = jax.ShapeDtypeStruct((C,), jnp.float32)


def operations(f, *args):
    """Floating-point operations per entry of x on a CPU; those per feature round away."""
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(f).lower(*args).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    return round(cost["flops"] / (N * C), 1)


def forward(x, scale, bias):
    count, shift, offset, m2 = _stages.moments(x, None, axes=(0,), dtype=jnp.dtype("float32"))
    mean, rstd = shift + offset, lax.rsqrt(m2 / count + 1e-5)
    y = _stages.normalize(x, mean, rstd, scale, bias, dtype=x.dtype)
    return y, _stages.Kept(x, None, count, mean, rstd, scale, bias)


def written_out(x, scale, bias, *, sums=True, dx=True):
    """The gradients of `loss` by the stages."""
    y, kept = forward(x, scale[None], bias[None])
    dy = jnp.cos(y)
    here = _stages.grad_sums(dy, kept, axes=(0,)) if sums or dx else ()
    scaled = [s * kept.scale for s in here]
    return here, _stages.grad_input(dy, kept, scaled, dtype=x.dtype)[0] if dx else None


def loss(x, scale, bias, use_stats=False, **options):
    y, stats = jax_bn.batch_norm(x, scale, bias, **options)
    return jnp.sum(jnp.sin(y)) + (jnp.sum(stats.mean * stats.var) if use_stats else 0)


ALL = operations(written_out, X, V, V)
NO_DX = operations(partial(written_out, dx=False), X, V, V)


def test_the_rule_of_unused_statistics_is_not_run():
    used = operations(jax.grad(partial(loss, use_stats=True), (0, 1, 2)), X, V, V)
    unused = operations(jax.grad(loss, (0, 1, 2)), X, V, V)
    assert unused <= ALL < ALL + 2 <= used


def test_no_dx_for_data():
    assert operations(jax.grad(loss, (1, 2)), X, V, V) <= NO_DX < NO_DX + 4 <= ALL


def test_no_gradient_of_what_is_frozen():
    """The sums of a frozen scale and bias are still those that dx needs."""
    assert operations(jax.grad(loss), X, V, V) <= ALL

    def frozen(x, scale, bias):
        return loss(x, *lax.stop_gradient((scale, bias)))

    assert operations(jax.grad(frozen), X, V, V) <= ALL
    # Of the bias alone a single sum is left, and no x_hat.
    assert operations(jax.grad(loss, 2), X, V, V) <= NO_DX - 2


def test_nothing_differentiated_nothing_computed():
    """A layer on data without parameters, under a network that is trained."""

    def head(w, x):
        return jnp.sum(jnp.sin(jax_bn.batch_norm(x)[0]) * w[None])

    def plain(w, x):
        return jnp.sum(jnp.sin(forward(x, None, None)[0]), 0) * w

    assert operations(jax.grad(head), V, X) <= operations(plain, V, X)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_forward_mode_computes_the_tangents_that_move(moving):
    def pushed(*args):
        def f(*some):
            full = list(args)
            for i, v in zip(moving, some, strict=True):
                full[i] = v
            return jax_bn.batch_norm(*full, forward_mode=True)[0]

        some = tuple(args[i] for i in moving)
        return jax.jvp(f, some, some)

    of_y = operations(lambda *args: forward(args[0], args[1][None], args[2][None])[0], X, V, V)
    # dx: two sums of x_hat*dx and dx, and what D14 makes of them. Scale and bias: one product.
    at_most = {(0,): 12, (1,): 4, (2,): 1, (1, 2): 5}[moving]
    assert operations(pushed, X, V, V) <= of_y + at_most


# ---- through the layers --------------------------------------------------------------------------


def linen_step(wanted):
    layer = jax_bn.linen.BatchNorm(use_running_average=False)

    def step(x, scale, bias):
        stats = {"mean": bias, "var": scale}

        def of(x, scale, bias):
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
            y, updated = layer.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), updated

        return jax.grad(of, wanted, has_aux=True)(x, scale, bias)

    return step


def nnx_step(wanted):
    graphdef, params, averages = nnx.split(
        jax_bn.nnx.BatchNorm(C, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )

    def step(x, scale, bias):
        def of(x, scale, bias):
            new = jax.tree.map(lambda v: v, params)
            new["scale"], new["bias"] = nnx.Param(scale), nnx.Param(bias)
            layer = nnx.merge(graphdef, new, averages, copy=True)
            return jnp.sum(jnp.sin(layer(x))), nnx.state(layer, nnx.BatchStat)

        return jax.grad(of, wanted, has_aux=True)(x, scale, bias)

    return step


@pytest.mark.parametrize("step", [linen_step, nnx_step])
def test_layers_cost_no_more(step):
    """Though they hand on the statistics, for the running averages."""
    assert operations(step((0, 1, 2)), X, V, V) <= ALL
    assert operations(step((1, 2)), X, V, V) <= NO_DX
    assert operations(step((0,)), X, V, V) <= ALL


def test_layers_of_one_shape_are_traced_once():
    """A deep network does not pay for each; the activation counts how often it is traced."""
    traced = []

    def activation(z):
        traced.append(z)
        return jnp.tanh(z)

    def network(layers, x, scale, bias):
        for _ in range(layers):
            x, _ = jax_bn.batch_norm(x, scale, bias, activation=activation)
        return jnp.sum(x)

    def trace(layers):
        before = len(traced)
        jax.jit(jax.grad(partial(network, layers), (0, 1, 2))).trace(X, V, V)
        return len(traced) - before

    first, second, deep = trace(1), trace(1), trace(10)
    assert first > second  # each call looks at it once, to check that it is elementwise
    assert deep == 10 * second


def test_each_stage_is_a_function_of_its_own():
    """In every program, so that it is traced once; without `jit` it is then compiled as a whole."""
    gradient = jax.make_jaxpr(jax.grad(partial(loss, use_stats=True)))(X, V, V)
    compiled = set(re.findall(r"\bjit\[\s*name=(\w+)", str(gradient)))
    assert compiled >= {name for name, f in _stages.XLA._asdict().items() if f is not None}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="temporaries of XLA:CPU")
def test_a_training_step_holds_less_than_with_flax():
    """The demo's network, small: x of each layer and nothing beside it. Two sweeps that share so
    much as a broadcast mean hold x_hat too, and all of the saving is gone; see `_compiler.apart`.
    """
    batch = digits.Images(np.zeros((64, 8, 8, 1), np.float32), np.zeros(64, np.int32))

    def temporaries(layer):
        trainer, state = digits.create(layer, width=8, seed=0, optimizer=optax.sgd(0.1))
        return peak_temporary(jax.jit(trainer.step).lower(state, batch).compile())

    assert temporaries(jax_bn.nnx.BatchNorm) <= 0.75 * temporaries(nnx.BatchNorm)
