"""Sums over the examples, in the order that suits the compiler of each platform.

As in `_compiler`, nothing here changes a result but by rounding. Elementwise functions come as
such, with their inputs, since what is in a sum decides how it is best taken.
"""

from collections.abc import Callable, Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jax_bn import _compiler, _shapes
from jax_bn._compiler import Axes
from jax_bn._platform import on

LARGE = 2**16  # numbers: fewer are summed in no more time than another loop takes to start
NARROW, ROW = 16, 128  # features, and numbers in a row of several examples, see `_in_rows`
PARTS = 8  # that are added up at once, see `_in_parts`
ONE_IN_PARTS = (0, 12)  # the JAX before which a single array takes many times as long in parts


def sum_over(v, axes: Axes):
    """Sum over axes, kept with length 1; on NVIDIA GPUs, if it has few terms, in two steps.

    XLA:GPU itself splits a sum of more than 4096 terms. A shorter one has few threads, and to feed
    these fast XLA first writes v out, in float32 and whole. Two steps write out the sums of groups,
    of one example each, or of as many as make 16 terms.
    """

    def at_once(v):
        return jnp.sum(v, axes, keepdims=True)

    def in_two_steps(v):
        groups = v.shape[batch] // group
        v = v.reshape(*v.shape[:batch], groups, group, *v.shape[batch + 1 :])
        v = jnp.squeeze(jnp.sum(v, [a + 1 for a in axes], keepdims=True), batch + 1)
        return jnp.sum(lax.optimization_barrier(v), batch, keepdims=True)

    few = 0 < _shapes.size(v.shape, axes) <= _compiler.FEW
    if not axes or v.ndim - 1 in axes or not few:  # along the last axis XLA needs no help
        return at_once(v)
    batch, *inner = axes
    group = max(1, 16 // _shapes.size(v.shape, inner))
    # A group that lies on several devices would need communication of its own.
    across = any(_shapes.shards(v, a) > 1 for a in (axes if group > 1 else inner))
    if across or v.shape[batch] % group:
        return at_once(v)
    return on("cuda", in_two_steps, v, otherwise=at_once)


def sum_of(f: Callable, inputs: tuple, axes: Axes):
    """Sum over axes of f(*inputs), which is elementwise, as the platform likes it best."""
    on_cpus = _in_rows_or_parts(lambda *v: (f(*v),), 1, inputs, axes)
    if on_cpus is None:
        return _as_it_lies(f, inputs, axes)

    def otherwise(*inputs):
        return (_as_it_lies(f, inputs, axes),)

    (s,) = on("cpu", on_cpus, *inputs, otherwise=otherwise, alone=True)
    return s


def sums_of(
    terms: Callable, inputs: tuple, axes: Axes, sweep: _compiler.Sweep, *, cast: bool = False
):
    """The sums of the two arrays that `terms(*inputs)` yields: on CPUs in one sweep.

    Else, and there if it takes less time, the second one in a `sweep` of its own. The first input
    is the largest; if the first array is but a `cast` of it, XLA:CPU's library sums that.
    """
    v, *_ = inputs
    narrow = v.dtype.itemsize < 4  # then one loop was measured to take longer than two
    on_cpus = _in_rows_or_parts(terms, 2, inputs, axes, rows_only=narrow)
    if on_cpus is None:
        return _in_turn(terms, (_as_it_lies if cast else sum_of, sum_of), inputs, axes, sweep)

    def otherwise(*inputs):
        return _in_turn(terms, (_as_it_lies, _as_it_lies), inputs, axes, sweep)

    return on("cpu", on_cpus, *inputs, otherwise=otherwise, alone=True)


def sum_both(terms: Callable, inputs: tuple, axes: Axes):
    """`sums_of`, of the first input and of its product with something.

    XLA:GPU weighs what two sums share as if each had to read it alone, and may write it out: on
    NVIDIA GPUs they are one sum, of complex numbers.
    """

    def as_one(*inputs):
        s = sum_over(lax.complex(*terms(*inputs)), axes)
        return jnp.real(s), jnp.imag(s)

    def as_two(*inputs):
        return sums_of(terms, inputs, axes, _compiler.Sweep.GRAD_SUMS, cast=True)

    complex_already = any(map(jnp.iscomplexobj, jax.tree.leaves(inputs)))
    return as_two(*inputs) if complex_already else on("cuda", as_one, *inputs, otherwise=as_two)


def _as_it_lies(f: Callable, inputs: tuple, axes: Axes):
    return sum_over(f(*inputs), axes)


def _in_turn(
    terms: Callable, sums: Sequence[Callable], inputs: tuple, axes: Axes, sweep: _compiler.Sweep
) -> tuple:
    """The sums of `terms(*inputs)`, one or two; of `sums` each takes one, the second in `sweep`."""
    each = inputs, _compiler.apart(inputs, sweep)
    return tuple(sum_(lambda *v, i=i: terms(*v)[i], each[i], axes) for i, sum_ in enumerate(sums))


def _in_rows_or_parts(
    terms: Callable, count: int, inputs: tuple, axes: Axes, *, rows_only: bool = False
) -> Callable | None:
    """inputs -> the `count` sums of `terms(*inputs)` as suits XLA:CPU; None: as they lie."""
    arrays = jax.tree.leaves(inputs)
    shape = np.broadcast_shapes(*(v.shape for v in arrays))
    features_last = tuple(axes) == tuple(range(len(axes)))
    if not axes or not features_last or any(map(_shapes.named, arrays)):
        return None
    in_rows = _in_rows(terms, count, arrays, shape, axes)
    return in_rows if in_rows or rows_only else _in_parts(terms, count, shape, axes)


def _in_rows(
    terms: Callable, count: int, arrays: list, shape: tuple[int, ...], axes: Axes
) -> Callable | None:
    """Of few features, in long rows.

    XLA:CPU works along the last axis. Where that is short, a sum takes many times as long as memory
    does, and one of x - mean longer still. So x is read in rows of k examples, as it lies there, if
    their number n has a divisor k that makes a long row. Each column is summed, every k-th example
    of a feature; then the k sums of a feature.
    """
    features = tuple(1 if a in axes else size for a, size in enumerate(shape))
    n, width = _shapes.size(shape, axes), math.prod(features)
    others = any(v.shape not in (shape, features) and v.size > 1 for v in arrays)  # as some masks
    if not 0 < width <= NARROW or n * width < _compiler.SMALL or others:
        return None
    k = max(k for k in range(1, ROW // width + 1) if n % k == 0)
    if k * width < ROW // 2:
        return None

    def rows(v):
        if v.shape == shape:
            return lax.optimization_barrier(v.reshape(n // k, k * width))
        # Written out, or the loop would compute the place in it of each number.
        row = jnp.tile(v.reshape(1, -1), k if v.shape == features else 1)
        return lax.optimization_barrier(row)

    in_parts = _in_parts(terms, count, (n // k, k * width), (0,))

    def in_turn(*inputs):
        return _in_turn(terms, [_as_it_lies] * count, inputs, (0,), _compiler.Sweep.GRAD_SUMS)

    def summed(*inputs):
        s = (in_parts or in_turn)(*jax.tree.map(rows, inputs))
        s = lax.optimization_barrier(s)
        return tuple(jnp.sum(v.reshape(k, width), 0).reshape(features) for v in s)

    return summed


def _in_parts(terms: Callable, count: int, shape: tuple[int, ...], axes: Axes) -> Callable | None:
    """Of a few parts of x at once, and all sums in one sweep.

    XLA:CPU has sums from a library, each of one array, which casts, but computes piece by piece: of
    x - shift, or of products, that takes longer than memory does, and a selection is first written
    out, whole. So a loop of XLA's own adds up the parts, entry by entry, as one reduction of all
    arrays that are summed; it writes out as much as one part has, and that the library sums.
    """
    if count == 1 and jax.__version_info__ < ONE_IN_PARTS:
        return None
    n, features = _shapes.size(shape, axes), shape[len(axes) :]
    parts = max(k for k in range(1, PARTS + 1) if n % k == 0)
    if math.prod(shape) < LARGE or parts < PARTS // 2:
        return None

    def split(v):
        examples, *others = math.prod(v.shape[: len(axes)]), *v.shape[len(axes) :]
        if examples == 1:
            return v.reshape(1, 1, *others)
        v = jnp.broadcast_to(v, (*shape[: len(axes)], *others))  # it may be a mask
        return v.reshape(parts, n // parts, *others)

    add = _add_alone if count == 1 else _add

    def summed(*inputs):
        each = terms(*jax.tree.map(split, inputs))
        added = lax.reduce(each, tuple(jnp.zeros((), v.dtype) for v in each), add, (0,))
        added = lax.optimization_barrier(added)  # [N/parts, C], or both reductions would be one
        return tuple(jnp.sum(v, 0).reshape((1,) * len(axes) + features) for v in added)

    return summed


def _add(sums: tuple, terms: tuple) -> tuple:
    return tuple(map(jnp.add, sums, terms))


def _add_alone(sums: tuple, terms: tuple) -> tuple:
    """In words of its own: a plain sum of one array XLA:CPU would give to the library."""
    return lax.optimization_barrier(_add(sums, terms))
