"""What XLA has to be told, platform by platform, so that it moves no more than the formulas do.

Nothing here changes a result but by rounding, and nothing is needed for one. Each function is named
after what it does, and says which habit of the compiler it answers; `tests/aot` and the benchmarks
count what it is worth.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn._platform import on

Axes = Sequence[int]

SMALL = 2**12  # numbers that XLA:CPU sums without its library
FEW = 2**12  # terms of a sum that XLA:GPU does not split, see `_sums.sum_over`


class Sweep(IntEnum):
    """The sweeps over x, or over dy and x, of one training step: compilers take two alike for one.

    The number is that of the barriers on CPUs that tell the sweep's inputs from the others'. It is
    small where these are many: every barrier takes time to lower.
    """

    FIRST = 0  # the first sum, of the forward and of the backward pass
    GRAD_SUMS = 1
    GRAD_INPUT = 2
    GRAD_Z = 3
    NORMALIZE = 4
    M2 = 5


def apart(v, sweep: Sweep):
    """v for one of several sweeps over it: on CPUs a copy of its own; but no bytes are copied.

    XLA:CPU takes a sum over columns together with the casts and products under it, unless these
    have a second user: then it writes them out, in float32 and whole. So no two sweeps may share
    them. The barriers stand before each array for itself: one over several makes them vary alike
    between devices, and all tangents if one is. A program that is small as it stands has nothing to
    gain, and is compiled sooner without.
    """

    def behind(v):
        for _ in range(sweep):
            v = lax.optimization_barrier(v)
        return v

    return jax.tree.map(partial(_on_cpus, behind, unless_small=v), v)


def once(f: Callable, dy, kept, sweep: Sweep, *, written: bool):
    """f(dy, kept, sweep), which two sweeps want: on CPUs computed and written out once for both.

    The library that sums for XLA:CPU takes no selection: it would be written out in float32.
    Elsewhere each sweep computes it, in words of its own; but where it is `written` anyway, as a
    rule a result of the program, both use the same words: the compiler writes it in the first
    sweep, and the second reads it in the place of all that it is made of. Not XLA:GPU, if the sums
    have to widen it or have few terms: it makes two launches of the first sweep then.
    """

    def shared(dy, kept):
        return lax.optimization_barrier(f(*apart((dy, kept), Sweep.GRAD_Z), Sweep.GRAD_Z))

    def of_its_own(dy, kept):
        return f(dy, kept, sweep)

    def in_the_same_words(dy, kept):
        return f(dy, kept, Sweep.GRAD_SUMS)

    def elsewhere(dy, kept):
        if not written or sweep == Sweep.GRAD_SUMS:
            return of_its_own(dy, kept)
        if dy.dtype != kept.mean.dtype or dy.size <= FEW * kept.mean.size:
            return on("cuda", of_its_own, dy, kept, otherwise=in_the_same_words)
        return in_the_same_words(dy, kept)

    return on("cpu", shared, dy, kept, otherwise=elsewhere)


# What two sweeps say in the same words XLA:GPU makes one, and writes out; a barrier does not tell
# them apart there, other words for the same bits do.


def affine(x, mean, a, bias, sweep: Sweep):
    """(x - mean)*a + bias, to the bit the same in every sweep; a bias of None is none."""
    if sweep == Sweep.GRAD_INPUT:
        product = (mean - x) * -a
    elif sweep == Sweep.NORMALIZE or bias is None:
        product = (x - mean) * a
    else:
        return bias - (mean - x) * a
    return product if bias is None else product + bias


def above(v, kink, *, closed: bool, sweep: Sweep):
    """v > kink, or v >= kink if closed."""
    if sweep == Sweep.GRAD_INPUT:
        return kink <= v if closed else kink < v
    return v >= kink if closed else v > kink


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def widened(residual, dtype):
    """The residual in a wider dtype; on NVIDIA GPUs in a way that XLA does not see through.

    XLA:GPU drops a cast to a narrow dtype and back: the y of one block, the residual of the next,
    would go through memory in float32 too. A bfloat16 is the upper half of a float32.
    """
    if residual.dtype != jnp.bfloat16 or dtype != jnp.float32:
        return residual.astype(dtype)

    def by_bits(v):
        bits = lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32)

    return on("cuda", by_bits, residual, otherwise=lambda v: v.astype(dtype))


@widened.defjvp
def _widened_jvp(dtype, primals, tangents):
    return widened(*primals, dtype), tangents[0].astype(dtype)


def written_out(v, x):
    """v, a few numbers made of x: on CPUs written out before use.

    XLA:CPU would else make them again for every entry of x that they are used with.
    """
    return _on_cpus(lax.optimization_barrier, v, unless_small=x)


def picked(examples):
    """A few examples of x: on TPUs picked from x as it is stored, not from a cast or copied x."""
    return on("tpu", lax.optimization_barrier, examples, otherwise=_as_it_is)


def _on_cpus(f: Callable, v, *, unless_small):
    """f(v), which is v, on CPUs; in a small program, that stands as it is, nowhere."""
    told = partial(on, "cpu", f, otherwise=_as_it_is)
    leaves = jax.tree.leaves(unless_small)
    if all(isinstance(leaf.size, int) and leaf.size < SMALL for leaf in leaves):
        return on("cpu", _as_it_is, v, otherwise=told, alone=True)
    return told(v)


def _as_it_is(v):
    return v
