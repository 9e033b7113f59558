"""What `benchmarks.gpu` times: batch normalization, alone and with what follows it in a ResNet.

By our XLA stages, our kernels, Flax and PyTorch. x is a tuple here, (x,) or (x, residual): all of
it is differentiated. Running averages are updated as in training.
"""

from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import measure, torch_peers
from benchmarks.failures import OURS
from benchmarks.peers import FLAX, MOMENTUM, PEERS, Peer, averages, loose
from benchmarks.timing import Program
import jax_bn

KERNELS, TORCH = "jax_bn kernels", torch_peers.CHANNELS_LAST
COPY, NEGATIVE = "copy", "-x"  # by the driver; by XLA
COPIES = (COPY, NEGATIVE)
IMPLEMENTATIONS = (FLAX, OURS, KERNELS, TORCH)
MEASURES = ("forward", "backward", "step")  # as in `measure`


class After(NamedTuple):
    """What follows the normalization, and the passes over arrays beyond the caches of four sweeps.

    Of an x that stays on the chip each array is read once: its rates are those of passes saved; and
    so it is where one program reads x once for y and for dx, or keeps dresidual for the last sweep.
    """

    relu: bool
    residual: bool
    forward: int  # x twice and y; with a residual that too
    backward: int  # twice x and dy, and dx; with a residual twice y, and dresidual

    def passes(self, measure: str) -> int:
        each = dict(forward=self.forward, backward=self.backward)
        return each.get(measure, self.forward + self.backward)


AFTER = {
    "nothing": After(False, False, 3, 5),
    "relu": After(True, False, 3, 5),
    "residual, relu": After(True, True, 4, 8),
}


def inputs(shape: tuple[int, ...], dtype: str, after: After, rotated: int) -> measure.Inputs:
    """x, a residual if there is to be one, and dy; scale and bias.

    The former at several addresses, of so many bytes together.
    """
    *keys, a, b = jax.random.split(jax.random.key(0), 5)
    x, residual, dy = (jax.random.normal(key, shape, dtype) for key in keys)
    xs = (3 + 2 * x, residual) if after.residual else (3 + 2 * x,)
    arrays = len(xs) + 1
    copies = min(measure.MOST_COPIES, -(-rotated // (arrays * x.size * x.dtype.itemsize)))
    pairs: Any = [jax.tree.map(jnp.copy, (xs, dy)) for _ in range(copies)]
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in (a, b))
    return measure.Inputs(pairs, 1 + scale / 8, bias / 8)


def peer(name: str, after: After) -> Peer:
    """Flax's layer or ours."""

    def flax(x):
        layer, state = PEERS[FLAX].make(x[0])

        def apply(x, scale, bias, state):
            y, state = layer(x[0], scale, bias, state)
            y = y + x[1] if after.residual else y
            return jax.nn.relu(y) if after.relu else y, state

        return apply, state

    def ours(x):
        own: dict[str, Any] = dict(activation=jax.nn.relu) if after.relu else {}
        own |= dict(implementation="mosaic_gpu" if name == KERNELS else "xla")

        def apply(x, scale, bias, state):
            x, residual = x if after.residual else (*x, None)
            y, stats = jax_bn.batch_norm(x, scale, bias, residual=residual, **own)
            mean, var = state
            return y, jax_bn.update_running_stats(mean, var, stats, momentum=MOMENTUM)

        return apply, averages(x[0])

    return Peer(flax if name == FLAX else ours)


def program(name: str, measured: str, after: After, data: measure.Inputs) -> Program:
    """What to time; compiled."""
    if name in COPIES:
        copied: list[tuple] = [(x,) for (x, *_), _ in data.pairs]
        f = jnp.copy if name == COPY else jax.lax.neg
        return Program(jax.jit(f).lower(*copied[0]).compile(), copied)
    if name == TORCH:
        return _torch(measured, after, data)
    with loose():
        return measure.program(peer(name, after), measured, data)[0]


def _torch(measured: str, after: After, data: measure.Inputs) -> Program:
    """PyTorch, eager, its tensors in the memory of the JAX arrays: features last, as they are."""
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(v: jax.Array) -> Any:
        t = torch.from_dlpack(jax.block_until_ready(v))
        return (t.movedim(-1, 1) if t.ndim > 2 else t).detach()

    device = tensor(data.scale).device
    scale, bias = (tensor(v).requires_grad_() for v in (data.scale, data.bias))
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    pairs = [jax.tree.map(tensor, pair) for pair in data.pairs]
    for xs, _ in pairs:
        for v in xs:
            v.requires_grad_()

    def y(x, residual=None):
        f = torch.nn.functional.batch_norm
        y = f(x, mean, var, scale, bias, training=True, momentum=1 - MOMENTUM)
        y = y if residual is None else y + residual
        return torch.relu(y) if after.relu else y

    def forward(xs, dy):
        with torch.no_grad():
            return y(*xs)

    def backward(y, xs, dy):
        return torch.autograd.grad(y, (*xs, scale, bias), dy, retain_graph=True)

    def step(xs, dy):
        now = y(*xs)
        return now, torch.autograd.grad(now, (*xs, scale, bias), dy)

    def wait(_):
        if device.type == "cuda":
            torch.cuda.synchronize()

    if measured == "backward":
        return Program(backward, [(y(*xs), xs, dy) for xs, dy in pairs], wait)
    return Program(forward if measured == "forward" else step, pairs, wait)


@contextmanager
def interpreted():
    """The kernels, where there is no GPU: interpreted. For races the tests look."""
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # older ones have no interpreter
    with plgpu.force_gpu_interpret_mode():
        yield
