"""What has to hold before a kernel is timed: it ends, it is right, and it is right every time.

Right is what the tests mean by it (`tests/tolerance.py`): at most twice the error of the XLA
stages, both against float64, plus rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
import math
import threading
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.failures import OURS
from benchmarks.gpu_programs import KERNELS, After, inputs, peer
from benchmarks.measure import Inputs, functions

FAR_OFF = 1e9  # an error that is no number, which JSON does not have
KINK = 1e-4  # nearer than this, rounding may put z on the other side of relu's kink; generous


@contextmanager
def limited(seconds: float, what: str, give_up: Callable[[str], None]) -> Iterator[None]:
    """Calls `give_up` if what is within does not end: nothing interrupts a kernel that waits."""
    why = f"{what} did not end within {seconds:.0f} s"
    timer = threading.Timer(seconds, give_up, (why,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Check(NamedTuple):
    """Forward and backward of one case, compiled."""

    inputs: Callable[[], Inputs]
    examples: int
    kernels: Callable
    of_xla: Callable
    in_float64: Callable

    @staticmethod
    def compiled(shape: tuple[int, ...], dtype: str, after: After) -> "Check":
        make = partial(inputs, shape, dtype, after, rotated=1)
        types = _arguments(jax.eval_shape(make))
        kernels, of_xla = (
            jax.jit(_step(name, after)).lower(*types).compile() for name in (KERNELS, OURS)
        )
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.float64), types)
            in_float64 = jax.jit(_step(OURS, after)).lower(*wide).compile()
        made = partial(_off_the_kink, make, after)
        return Check(made, math.prod(shape[:-1]), kernels, of_xla, in_float64)

    def run(self, repetitions: int) -> dict:
        """The error of all results, and how often their bits differ from the first ones.

        `error`: the largest of all results, in units of what is allowed; at most 1 is right.
        """
        args = _arguments(self.inputs())
        first = jax.block_until_ready(self.kernels(*args))
        with jax.enable_x64(True):
            oracle = self.in_float64(*jax.tree.map(lambda v: v.astype(jnp.float64), args))
        error = _error(first, self.of_xla(*args), oracle, self.examples)
        differing = jnp.zeros((), jnp.int32)
        for _ in range(repetitions):
            differing += _differ(first, self.kernels(*args))
            differing.block_until_ready()
        return dict(error=error, repetitions=repetitions, differing=int(differing))


def _off_the_kink(make: Callable[[], Inputs], after: After) -> Inputs:
    """Inputs with a dy of 0 where z is so near to 0 that its sign is a matter of rounding.

    Of fifty million z a few lie so near, and one dy more or less shows in a float32 sum.
    """
    data = make()
    if not after.relu:
        return data

    @jax.jit
    def tamed(xs, dy, scale, bias):
        x, *residual = (v.astype(jnp.float64) for v in xs)
        axes = tuple(range(x.ndim - 1))
        x_hat = (x - x.mean(axes)) * lax.rsqrt(x.var(axes) + 1e-5)
        z = sum(residual, x_hat * scale + bias)
        return jnp.where(jnp.abs(z) < KINK, 0, dy)

    ((xs, dy),) = data.pairs
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return data._replace(pairs=[(xs, tamed(xs, dy, data.scale, data.bias))])


def _arguments(data: Inputs) -> tuple:
    (xs, dy), *_ = data.pairs
    return xs, dy, data.scale, data.bias


def why_wrong(row: dict) -> str | None:
    """What of a row of `checked` does not hold; None where all does."""
    if row["error"] > 1:
        return f"the error is {row['error']:.3g} times what is allowed"
    if row["differing"]:
        return f"{row['differing']} of {row['repetitions']} repetitions have other bits"
    return None


def _step(name: str, after: After) -> Callable:
    """y, the averages and the gradients of all arguments."""

    def step(xs, dy, scale, bias):
        apply, state = peer(name, after).make(xs)
        state = jax.tree.map(lambda v: v.astype(scale.dtype), state)
        return functions(peer(name, after), apply)["step"](xs, dy, scale, bias, state)

    return step


def _error(actual, of_xla, oracle, examples: int) -> float:
    """The largest error, in units of what is allowed."""

    def one(a, x, o):
        eps = float(jnp.finfo(a.dtype).eps)
        error, of_xla = (jnp.abs(v.astype(jnp.float64) - o).max() for v in (a, x))
        return error / (2 * of_xla + eps * math.sqrt(examples) * jnp.abs(o).max())

    with jax.enable_x64(True):
        errors = map(one, *map(jax.tree.leaves, (actual, of_xla, oracle)))
        error = np.max([float(e) for e in errors])
    return float(error) if np.isfinite(error) else FAR_OFF


@jax.jit
def _differ(a, b) -> jax.Array:
    """1 if any bit of the two trees differs, else 0; NaN equals itself."""

    def bits(v):
        return lax.bitcast_convert_type(v, f"uint{8 * v.dtype.itemsize}")

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.any(jnp.stack([jnp.any(bits(a) != bits(b)) for a, b in pairs])).astype(jnp.int32)
