"""Batch normalizations to compare, each as a pure function of (x, scale, bias, state).

All take x with the features last, scale and bias in float32, and update their running averages, as
a training step does. Haiku and Equinox get scale and bias in x's dtype: they make them so, or else
y would be float32. Equinox is written for one example: it is mapped over all of them, flattened.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.failures import FUSED, OURS, attempt
import jax_bn
from jax_bn import reference

FLAX, NNX = "flax.linen", "flax.nnx"
MOMENTUM = 0.9

# (x, scale, bias, state) -> (y, state)
Apply = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Peer(NamedTuple):
    """An implementation.

    Attributes:
        make: from x, or its shape and dtype, to the function and its first state; `momentum=`
            weighs the running averages before it.
        needs: the module to import; what is not installed is reported, with the reason.
        fused: whether relu and residual are its own: then it normalizes only where these are.
        masks: whether its function takes `mask=`, which broadcasts to x.
    """

    make: Callable[..., tuple[Apply, Any]]
    needs: str = "jax"
    fused: bool = False
    masks: bool = False


def averages(x) -> tuple[jax.Array, jax.Array]:
    features = x.shape[-1:]
    return jnp.zeros(features), jnp.ones(features)


def _ours(x, fused=False, momentum=MOMENTUM):
    def apply(x, scale, bias, state, mask=None):
        own: dict[str, Any] = dict(residual=x, activation=jax.nn.relu) if fused else {}
        y, stats = jax_bn.batch_norm(x, scale, bias, mask=mask, **own)
        mean, var = state
        return y, jax_bn.update_running_stats(mean, var, stats, momentum=momentum)

    return apply, averages(x)


def _definition(x, momentum=MOMENTUM):
    def apply(x, scale, bias, state, mask=None):
        y, now = reference.batch_norm(x, scale, bias, mask=mask)
        updated = (momentum * a + (1 - momentum) * b for a, b in zip(state, now[:2], strict=True))
        return y, tuple(updated)

    return apply, averages(x)


def _linen(x, momentum=MOMENTUM, **fields):
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False, momentum=momentum, dtype=x.dtype, **fields)

    def apply(x, scale, bias, state, mask=None):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        y, updated = layer.apply(variables, x, mask=mask, mutable="batch_stats")
        return y, updated["batch_stats"]

    return apply, _named_averages(x)


def _named_averages(x):
    return dict(zip(("mean", "var"), averages(x), strict=True))


def _nnx(x, momentum=MOMENTUM):
    from flax import nnx

    made = nnx.BatchNorm(x.shape[-1], momentum=momentum, dtype=x.dtype, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(made)

    def apply(x, scale, bias, state, mask=None):
        params = {"scale": nnx.Param(scale), "bias": nnx.Param(bias)}
        stats = {name: nnx.BatchStat(value) for name, value in state.items()}
        layer = nnx.merge(graph, nnx.State(params | stats))
        y = layer(x, mask=mask)
        return y, {name: getattr(layer, name)[...] for name in state}

    return apply, _named_averages(x)


def _haiku(x, momentum=MOMENTUM):
    import haiku as hk  # pyright: ignore[reportMissingImports]

    def layer(x):
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=momentum)(x, True)

    f = hk.transform_with_state(layer)
    per_feature = (1,) * (len(x.shape) - 1) + x.shape[-1:]
    _, state = f.init(None, jnp.zeros(per_feature, x.dtype))

    def apply(x, scale, bias, state):
        names = {"scale": scale, "offset": bias}
        params = {k: v.astype(x.dtype).reshape(per_feature) for k, v in names.items()}
        return f.apply({"batch_norm": params}, state, None, x)

    return apply, state


def _equinox(x, momentum=MOMENTUM):
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    layer, state = make(x.shape[-1], "examples", momentum=momentum, mode="batch")
    leaves, tree = jax.tree.flatten(state)  # a State can be used only once

    def apply(x, scale, bias, leaves):
        weights = scale.astype(x.dtype), bias.astype(x.dtype)
        here = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights)
        state = jax.tree.unflatten(tree, leaves)
        mapped = jax.vmap(here, axis_name="examples", in_axes=(0, None), out_axes=(0, None))
        y, state = mapped(x.reshape(-1, x.shape[-1]), state)
        return y.reshape(x.shape).astype(x.dtype), jax.tree.leaves(state)

    return apply, leaves


PEERS = {
    OURS: Peer(_ours, masks=True),
    FUSED: Peer(partial(_ours, fused=True), fused=True, masks=True),
    FLAX: Peer(_linen, "flax", masks=True),
    NNX: Peer(_nnx, "flax", masks=True),
    "haiku": Peer(_haiku, "haiku"),
    "equinox": Peer(_equinox, "equinox"),
    "definition": Peer(_definition, masks=True),
}


def block(peer: Peer, apply: Apply) -> Apply:
    """relu(bn(x) + x), by the peer itself if it is fused."""

    def separate(x, scale, bias, state):
        y, state = apply(x, scale, bias, state)
        return jax.nn.relu(y + x), state

    return apply if peer.fused else separate


@cache
def why_missing(name: str) -> str | None:
    """Why a peer cannot be measured here; None where it can."""
    failed: dict[str, str] = {}
    with attempt(name, failed):
        importlib.import_module(PEERS[name].needs)
        _check(PEERS[name])
    return failed.get(name)


def _check(peer: Peer) -> None:
    """The peer agrees with the definition, by far better than by chance."""
    x = 3 + jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    results = []
    with loose():
        for judged in (peer, PEERS["definition"]):
            apply, state = judged.make(x)
            run = block(judged, apply) if peer.fused else apply

            @jax.jit
            def y_and_gradients(*args, run=run, state=state):
                y, pull = jax.vjp(lambda *args: run(*args, state)[0], *args)
                return y, *pull(jnp.sin(args[0]))

            results.append(y_and_gradients(x, jnp.linspace(0.5, 1.5, 8), jnp.linspace(-1, 1, 8)))
    for name, a, b in zip(("y", "dx", "dscale", "dbias"), *results, strict=True):
        largest = float(jnp.max(jnp.abs(a - b)))
        if not largest <= 1e-2 * (1 + float(jnp.max(jnp.abs(b)))):
            raise ArithmeticError(f"{name} differs by {largest:.2g} from the definition's")


@contextmanager
def loose():
    """JAX's own rules of promotion: the peers need them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
