"""What is measured: forward, backward, step, a network of four blocks; and how fast memory is.

forward     y and the new running averages
backward    dx, dscale, dbias from dy and what forward has kept
step        both, in one program
masked      a step of which every fifth example does not count
network     four times relu(bn(x) + x), and the gradients, in one program
"""

from collections.abc import Callable, Iterable
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_peers
from benchmarks.compiled import bytes_moved, kernels, peak_temporary
from benchmarks.failures import attempt
from benchmarks.peers import FLAX, PEERS, Apply, Peer, block, loose, why_missing
from benchmarks.timing import Effort, Program, Timing, time_all

MEASURES = ("forward", "backward", "step", "masked", "network")
PASSES = {"forward": 3, "backward": 5, "step": 8}  # over x: the fewest, of arrays beyond the caches
DEPTH = 4  # blocks of the network
COLD = 2**27  # bytes of buffers to rotate: more than the caches hold
MOST_COPIES = 64


class Inputs(NamedTuple):
    """x and dy several times over, at different addresses."""

    pairs: list[tuple[jax.Array, jax.Array]]
    scale: jax.Array
    bias: jax.Array

    @property
    def x(self) -> jax.Array:
        return self.pairs[0][0]


def inputs(shape: tuple[int, ...], dtype: str) -> Inputs:
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, shape, dtype) for key in keys)
    copies = min(MOST_COPIES, math.ceil(COLD / (2 * x.nbytes)))
    pairs = [(x, dy), *[(jnp.copy(x), jnp.copy(dy)) for _ in range(copies - 1)]]
    features = shape[-1:]
    return Inputs(pairs, jnp.full(features, 1.5), jnp.full(features, 0.5))


def functions(peer: Peer, apply: Apply) -> dict[str, Callable]:
    """The measures as functions to compile; `backward` takes what `vjp` returns second."""

    def vjp(f, state, *args):
        return jax.vjp(lambda *args: f(*args, state), *args, has_aux=True)

    def step(x, dy, scale, bias, state, **mask):
        y, pull, state = vjp(partial(apply, **mask), state, x, scale, bias)
        return y, state, pull(dy)

    def masked(x, dy, scale, bias, state, mask):
        return step(x, dy, scale, bias, state, mask=mask)

    def blocks(x, scales, biases, states):
        updated = []
        for scale, bias, state in zip(scales, biases, states, strict=True):
            x, state = block(peer, apply)(x, scale, bias, state)
            updated.append(state)
        return x, updated

    def network(x, dy, scales, biases, states):
        _, pull, states = vjp(blocks, states, x, scales, biases)
        return states, pull(dy)

    return dict(
        forward=lambda x, scale, bias, state: apply(x, scale, bias, state),
        vjp=lambda x, scale, bias, state: vjp(apply, state, x, scale, bias),
        backward=lambda pull, dy: pull(dy),
        step=step,
        masked=masked,
        network=network,
    )


def arguments(measure: str, data: Inputs, state: Any, vjp: Callable) -> Iterable[tuple]:
    """Arguments of a measure, of each pair of x and dy; `vjp`: how to make what is kept."""
    scale, bias = data.scale, data.bias
    for x, dy in data.pairs:
        if measure == "forward":
            yield x, scale, bias, state
        elif measure == "step":
            yield x, dy, scale, bias, state
        elif measure == "masked":
            mask = jnp.arange(len(x)) % 5 > 0
            yield x, dy, scale, bias, state, jnp.expand_dims(mask, tuple(range(1, x.ndim)))
        elif measure == "network":
            yield x, dy, *[[v] * DEPTH for v in (scale, bias, state)]
        else:
            yield vjp(x, scale, bias, state)[1], dy


def program(peer: Peer, measure: str, data: Inputs) -> tuple[Program, jax.stages.Compiled]:
    apply, state = peer.make(data.x)
    fs = functions(peer, apply)
    vjp = jax.jit(fs["vjp"])
    args = list(arguments(measure, data, state, vjp))
    compiled = jax.jit(fs[measure]).lower(*args[0]).compile()
    return Program(compiled, args), compiled


def why_not(name: str, measure: str, shape: tuple[int, ...]) -> str | None:
    """Why an implementation is not measured; None if it is."""
    if measure == "masked" and not (name in PEERS and PEERS[name].masks):
        return "takes no mask"
    if name in torch_peers.LAYOUTS:
        return torch_peers.why_missing() or torch_peers.why_unfair(name, measure, shape)
    if PEERS[name].fused and measure != "network":
        return "no relu in this measure: the same as unfused"
    return why_missing(name)


def measured(
    measure: str, data: Inputs, names: Iterable[str], effort: Effort, bandwidth: float | None
) -> tuple[list[dict], list[dict]]:
    """Rows of results, of one measure and one shape; and rows of what was not measured, and why."""
    shape, dtype = data.x.shape, data.x.dtype.name
    programs: dict[str, Program] = {}
    counts: dict[str, dict] = {}
    reasons: dict[str, str] = {}
    with loose():
        for name in names:
            if why := why_not(name, measure, shape):
                reasons[name] = why
                continue
            with attempt(name, reasons):
                if name in torch_peers.LAYOUTS:
                    programs[name] = torch_peers.program(name, measure, *data, DEPTH)
                else:
                    programs[name], compiled = program(PEERS[name], measure, data)
                    counts[name] = counted(compiled)
        timings, failed = time_all(programs, FLAX, effort)
    case = dict(measure=measure, shape=list(shape), dtype=dtype)
    bound = None
    if bandwidth and measure in PASSES:
        bound = PASSES[measure] * data.x.nbytes / bandwidth
    rows = [
        case | dict(implementation=name) | row(t) | dict(bound_seconds=bound) | counts.get(name, {})
        for name, t in timings.items()
    ]
    left_out = [
        case | dict(implementation=name, reason=why) for name, why in (reasons | failed).items()
    ]
    return rows, left_out


def row(timing: Timing) -> dict:
    """A timing, as it stands in the JSON file."""
    return dict(
        seconds=timing.seconds._asdict(),
        over_flax=timing.ratio and timing.ratio._asdict(),
        rounds=timing.rounds,
        calls=timing.calls,
    )


def counted(compiled: jax.stages.Compiled) -> dict:
    """What this device's compiler says of a program."""
    counts: dict[str, float | None] = dict(
        bytes_moved=bytes_moved(compiled), peak_temporary_bytes=peak_temporary(compiled)
    )
    if jax.default_backend() == "gpu":
        try:
            counts["kernels"] = kernels(compiled)
        except NotImplementedError:  # an instruction without a rule: the timing stands
            counts["kernels"] = None
    return counts


def bandwidth(nbytes: int, effort: Effort) -> dict:
    """Bytes a second to and from memory, by y = -x over a large array; buffers rotate."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    copies = [(x,), *[(jnp.copy(x),) for _ in range(2)]]
    timings, _ = time_all({"copy": Program(jax.jit(lax.neg), copies)}, None, effort)
    seconds = timings["copy"].seconds
    return dict(
        bytes_per_second=2 * x.nbytes / seconds.median,
        array_bytes=x.nbytes,
        seconds=seconds._asdict(),
    )


def as_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), v.dtype), tree)
