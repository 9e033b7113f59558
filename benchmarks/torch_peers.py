"""PyTorch's batch normalization, eager, in its two layouts of memory.

`channels-last` is the layout of the JAX programs and takes their x as it is; `contiguous` has the
same numbers with the features second, PyTorch's default. Scale, bias and averages are in float32.
"""

from collections.abc import Callable
from functools import cache
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.failures import attempt
from benchmarks.peers import MOMENTUM
from benchmarks.timing import Program

CHANNELS_LAST, CONTIGUOUS = "torch channels-last", "torch contiguous"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS)


@cache
def why_missing() -> str | None:
    """Why PyTorch cannot be measured on the device that JAX uses; None where it can."""
    failed: dict[str, str] = {}
    with attempt("torch", failed):
        torch = importlib.import_module("torch")
    if failed:
        return failed["torch"]
    if (platform := jax.default_backend()) == "cpu":
        return None
    if platform != "gpu":
        return f"PyTorch does not run on a {platform}"
    return None if torch.cuda.is_available() else "this PyTorch has no GPU"


def why_unfair(layout: str, measure: str, shape: tuple[int, ...]) -> str | None:
    """Why a measurement would compare two different things; None where it is fair."""
    if measure == "resnet":
        return "the network is a Flax one: its convolutions would be compared too"
    if layout == CONTIGUOUS and len(shape) == 2:
        return "a matrix has one layout: see channels-last"
    return None


def results(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, dy: np.ndarray) -> dict[str, Any]:
    """y, the statistics of the batch and the gradients of one training step on the CPU, x [N, C].

    PyTorch averages the unbiased variance: `var` is what it was before, in float64.
    """
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(v: np.ndarray) -> Any:
        return torch.from_numpy(v.astype(np.float32)).to(getattr(torch, v.dtype.name))

    inputs = tensor(x).requires_grad_(), tensor(scale).requires_grad_()
    mean, var = torch.zeros(scale.size), torch.ones(scale.size)
    batch_norm = torch.nn.functional.batch_norm
    y = batch_norm(inputs[0], mean, var, inputs[1], tensor(bias), training=True, momentum=1.0)
    dx, dscale = torch.autograd.grad(y, inputs, tensor(dy))
    found = dict(y=y, mean=mean, dx=dx, dscale=dscale)
    arrays = {name: v.detach().float().numpy() for name, v in found.items()}
    return arrays | dict(var=var.numpy().astype(np.float64) * (1 - 1 / len(x)))


def program(layout: str, measure: str, pairs, scale, bias, depth: int) -> Program:
    """The program of a measure; `pairs`: of x and dy as JAX arrays, the buffers to rotate."""
    import torch  # pyright: ignore[reportMissingImports]

    on = "cuda" if jax.default_backend() == "gpu" else "cpu"

    def tensor(v: jax.Array) -> Any:
        dtype = getattr(torch, v.dtype.name)
        t = torch.from_numpy(np.array(v.astype(jnp.float32))).to(on, dtype)
        if t.ndim > 2:
            t = t.movedim(-1, 1)
        return t.contiguous() if layout == CONTIGUOUS else t

    copies = [tuple(map(tensor, pair)) for pair in pairs]
    features = scale.size
    weights = [tensor(v).requires_grad_() for v in (scale, bias) for _ in range(depth)]
    scales, biases = weights[:depth], weights[depth:]
    mean, var = torch.zeros(features, device=on), torch.ones(features, device=on)
    for x, _ in copies:
        x.requires_grad_()

    def bn(x, i=0):
        f = torch.nn.functional.batch_norm
        return f(x, mean, var, scales[i], biases[i], training=True, momentum=1 - MOMENTUM)

    def forward(x, dy):
        with torch.no_grad():
            return bn(x)

    def backward(y, inputs, dy):
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def step(x, dy):
        y = bn(x)
        return y, torch.autograd.grad(y, (x, scales[0], biases[0]), dy)

    def network(x, dy):
        y = x
        for i in range(depth):
            y = torch.relu(bn(y, i) + y)
        return torch.autograd.grad(y, (x, *weights), dy)

    def wait(_):
        if on == "cuda":
            torch.cuda.synchronize()

    calls: dict[str, Callable] = dict(forward=forward, step=step, network=network)
    if measure == "backward":
        kept = [(bn(x), (x, scales[0], biases[0]), dy) for x, dy in copies]
        return Program(backward, kept, wait)
    return Program(calls[measure], copies, wait)
