"""The four stages of batch normalization in jnp: the arithmetic over whole arrays.

    forward    moments(x)       --merge over devices-->   normalize(x, mean, rstd, scale, bias)
    backward   grad_sums(dy, x) ---sum over devices--->   grad_input(dy, x, ..., sums)

`Stages` is what a backend has to provide. The versions here are at once the default backend, the
definition of what every other one must compute, and the oracle it is tested against. A stage works
on the examples it is given: it knows nothing of automatic differentiation and nothing of devices.

Shapes, in every signature: x, dy and y are [N, C] and stand for any rank; per-feature arrays are
[1, C] (see `_shapes`); the mask is None, or bool and broadcasts to x. N is the number of examples,
count how many of them are valid. Per-feature arrays have dtype T, float32 or wider, and so has the
arithmetic. For complex x T is complex, count and m2 are real; for real x `conj`, `real` and the
casts between the two do nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp

from jax_bn import _shapes

Axes = tuple[int, ...]


class Stages(NamedTuple):
    """A backend: four pure functions with the signatures of those below."""

    moments: Callable
    normalize: Callable
    grad_sums: Callable
    grad_input: Callable


def moments(x, mask, *, axes: Axes, dtype):
    """count, shift, offset and m2 of each feature. :: [N, C] -> [1, C] each, or [1, 1]

    mean = shift + offset, not yet added: the sum rounds at the size of the mean, and to compare the
    means of two devices takes what that loses. m2 = sum |x - mean|^2.

    One sweep: sums of d = x - shift and of |d|^2, with a shift close to the mean, so that the
    difference in m2 cancels next to nothing (Chan, Golub, LeVeque 1983):

        offset = sum(d)/count        m2 = sum |d|^2 - |sum(d)|^2/count
    """
    count = _count(x, mask, axes, dtype)
    n = jnp.maximum(count, 1)
    shift = lax.stop_gradient(_shift(x, mask, n, axes, dtype))  # no result depends on it
    d = _select(mask, x.astype(dtype) - shift)
    s = _sum(d, axes)
    m2 = _sum(_abs2(d), axes) - _abs2(s) / n
    return count, shift, s / n.astype(dtype), jnp.where(m2 < 0, 0, m2)


def normalize(x, mean, rstd, scale, bias, *, dtype):
    """y = (x - mean) * (rstd * scale) + bias. :: [N, C] -> [N, C] in dtype

    Centred before it is scaled: folding the mean into the bias would lose log10(|mean|/std) digits.
    """
    y = (x.astype(mean.dtype) - mean) * _times(rstd, scale)
    return (y if bias is None else y + bias).astype(dtype)


def grad_sums(dy, x, mask, mean, rstd, *, axes: Axes):
    """dbias = sum(dy), dscale = sum(dy * x_hat) over these examples. :: [N, C] -> [1, C] twice

    rstd stands outside the sum: inside, XLA:CPU writes x_hat out, in float32 and whole.
    """
    dy = _select(mask, dy.astype(mean.dtype))
    return _sum(dy, axes), rstd * _sum(dy * centred(x, mask, mean), axes)


def grad_input(dy, x, mask, mean, rstd, scale, sums, count):
    """dx of the final equation. :: [N, C] -> [N, C] in x's dtype

    dx = (rstd/count) * (count*dx_hat - sum(dx_hat) - x_hat*sum(dx_hat*x_hat)),  dx_hat = scale*dy

    `sums` are the two over all examples, scale*dbias and scale*dscale where all share one scale.
    """
    n = jnp.maximum(count, 1)
    dx_hat = _times(_select(mask, dy.astype(mean.dtype)), scale)
    mean_dx_hat = sums[0] / n.astype(mean.dtype)
    slope = rstd * (jnp.real(sums[1]) / n).astype(mean.dtype)
    dx = rstd * (dx_hat - mean_dx_hat - slope * jnp.conj(centred(x, mask, mean)))
    return _select(mask, dx).astype(x.dtype)


def centred(x, mask, mean):
    """x - mean in T, 0 where masked. :: [N, C] -> [N, C]"""
    return _select(mask, x.astype(mean.dtype) - mean)


XLA = Stages(moments, normalize, grad_sums, grad_input)


def _shift(x, mask, n, axes: Axes, dtype):
    """A number near each feature's mean; any will do, the closer the fewer digits `moments` loses.

    The median of three examples, so that no single outlier sets it: it costs no sweep. Where the
    examples cannot be picked (some may be masked; the batch axis is sharded over an explicit mesh;
    complex numbers have no order) it is the mean itself, for one more sweep.
    """
    sharded = any(_shapes.shards(x, a) > 1 for a in axes)
    if mask is not None or sharded or jnp.iscomplexobj(x):
        return _sum(_select(mask, x.astype(dtype)), axes) / n.astype(dtype)
    if not axes:
        return x.astype(dtype)
    batch, *_ = axes

    def example(i):  # the i-th along the batch axis, in the middle of the other reduced ones
        start = [size // 2 if a in axes else 0 for a, size in enumerate(x.shape)]
        start[batch] = min(i, x.shape[batch] - 1)
        stop = [start[a] + 1 if a in axes else size for a, size in enumerate(x.shape)]
        # Squeezed: with a batch axis of length 1 the compiler would go on sharding it.
        return jnp.squeeze(lax.slice(x, start, stop), axes).astype(dtype)

    a, b, c = example(0), example(1), example(2)
    median = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    return jnp.expand_dims(median, axes)


def _count(x, mask, axes: Axes, dtype):
    """How many examples of each feature are valid, as a real array that broadcasts with [1, C]."""
    n = _shapes.size(x.shape, axes)
    real = jnp.finfo(dtype).dtype
    if mask is None:
        return jnp.full((1,) * x.ndim, n, real)
    per_entry = n // _shapes.size(mask.shape, axes)  # how many examples one mask entry stands for
    return _sum(mask.astype(real), axes) * per_entry


def _select(mask, v):
    """The valid entries of v, 0 elsewhere; selected, since a NaN survives multiplication by 0."""
    return v if mask is None else jnp.where(mask, v, 0)


def _sum(v, axes: Axes):
    return jnp.sum(v, axes, keepdims=True)


def _abs2(v):
    return jnp.real(v * jnp.conj(v))


def _times(v, scale):
    return v if scale is None else v * scale
