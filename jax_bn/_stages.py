"""The four stages of batch normalization in jnp: the arithmetic over whole arrays.

    forward    moments(x)      --merge over devices-->   normalize(x, mean, rstd, scale, bias, ...)
    backward   grad_sums(dy, kept)  --sum over devices-->   grad_input(dy, kept, sums)

`Stages` is what a backend has to provide. The versions here are at once the default backend, the
definition of what every other one must compute, and the oracle it is tested against. A stage works
on the examples it is given: it knows nothing of automatic differentiation and nothing of devices.

Shapes, in every signature: x, dy, y and the residual are [N, C] and stand for any rank; per-feature
arrays are [1, C] (see `_shapes`); the mask is None, or bool and broadcasts to x. N is the number of
examples, count how many of them are valid. Per-feature arrays have dtype T, float32 or wider, and
so has the arithmetic. For complex x T is complex, count and m2 are real; for real x `conj`, `real`
and the casts between the two do nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn import _activations, _shapes

Axes = tuple[int, ...]


class Kept(NamedTuple):
    """What the backward stages know of the forward pass; and nothing else is kept for them."""

    x: Any  # [N, C], as narrow as it came
    mask: Any
    count: Any
    mean: Any  # [1, C], as all that follows but the last
    rstd: Any
    scale: Any  # or None, and so are the bias
    bias: Any
    beside: Any = None  # [N, C]: the residual or y, whichever `_activations.keeps` asks for


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


def normalize(x, mean, rstd, scale, bias, residual=None, *, activation=None, dtype):
    """y = activation((x - mean)*(rstd*scale) + bias + residual). :: [N, C] -> [N, C] in dtype

    Centred before it is scaled: folding the mean into the bias would lose log10(|mean|/std) digits.
    """
    z = (x.astype(mean.dtype) - mean) * _times(rstd, scale)
    z = z if bias is None else z + bias
    z = z if residual is None else z + residual.astype(z.dtype)
    return (z if activation is None else activation(z)).astype(dtype)


def grad_sums(dy, kept: Kept, *, activation=None, axes: Axes):
    """dbias = sum(dz), dscale = sum(dz * x_hat) over these examples. :: [N, C] -> [1, C] twice

    rstd stands outside the sum: inside, XLA:CPU writes x_hat out, in float32 and whole.
    """
    dz = grad_z(dy, kept, activation)
    return _sum(dz, axes), kept.rstd * _sum(dz * centred(kept), axes)


def grad_input(dy, kept: Kept, sums, *, activation=None, dtype):
    """dx of the final equation, and dz. :: [N, C] -> [N, C] in dtype, [N, C] in T

    dx = (rstd/count) * (count*dx_hat - sum(dx_hat) - x_hat*sum(dx_hat*x_hat)),  dx_hat = scale*dz

    `sums` are the two over all examples, scale*dbias and scale*dscale where all share one scale.
    """
    n = jnp.maximum(kept.count, 1)
    dz = grad_z(dy, kept, activation)
    mean_dx_hat = sums[0] / n.astype(dz.dtype)
    slope = kept.rstd * (jnp.real(sums[1]) / n).astype(dz.dtype)
    dx = kept.rstd * (_times(dz, kept.scale) - mean_dx_hat - slope * jnp.conj(centred(kept)))
    return _select(kept.mask, dx).astype(dtype), dz


def grad_z(dy, kept: Kept, activation):
    """dz = dy * activation'(z), 0 where masked. :: [N, C] -> [N, C] in T

    z, the argument of the activation, is computed again, or as much of it as its derivative takes.
    """
    dy = _select(kept.mask, dy.astype(kept.mean.dtype))
    if activation is None:
        return dy
    if (sides := _activations.sides(activation)) is not None:
        return jnp.where(_above(kept, sides), dy, sides.slope * dy)
    (dz,) = jax.vjp(activation, before_activation(kept))[1](dy)
    return dz


def before_activation(kept: Kept):
    """z = bn(x) + residual; where masked, that of zeros. :: [N, C] -> [N, C] in T"""
    x, residual = _select(kept.mask, kept.x), _select(kept.mask, kept.beside)
    mean, rstd, scale, bias = kept.mean, kept.rstd, kept.scale, kept.bias
    return normalize(x, mean, rstd, scale, bias, residual, dtype=mean.dtype)


def _above(kept: Kept, sides: _activations.Sides):
    """Where z lies above the kink of the activation. :: [N, C] -> bool[N, C]

    From y, which has z's sign, where there was a residual. Else from x, by its side of the value at
    which z is 0, and not by the sign of z computed again: XLA:GPU would write that out.
    """
    greater = jnp.greater_equal if sides.closed else jnp.greater
    if kept.beside is not None:
        return greater(kept.beside, 0)
    x, a = kept.x.astype(kept.mean.dtype), _times(kept.rstd, kept.scale)
    bias = jnp.zeros_like(a) if kept.bias is None else kept.bias
    kink = kept.mean - bias / jnp.where(a == 0, 1, a)
    return jnp.where(a > 0, greater(x, kink), jnp.where(a < 0, greater(kink, x), greater(bias, 0)))


def centred(kept: Kept):
    """x - mean in T, 0 where masked. :: [N, C] -> [N, C]"""
    return _select(kept.mask, kept.x.astype(kept.mean.dtype) - kept.mean)


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
        return jnp.squeeze(lax.slice(x, start, stop), axes)

    # Without the barrier XLA:TPU upcasts or copies x whole to slice it.
    three = lax.platform_dependent(
        [example(0), example(1), example(2)], tpu=lax.optimization_barrier, default=lambda v: v
    )
    a, b, c = (v.astype(dtype) for v in three)
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


def _select(mask, v) -> Any:
    """The valid entries of v, 0 elsewhere; selected, since a NaN survives multiplication by 0."""
    return v if mask is None or v is None else jnp.where(mask, v, 0)


def _sum(v, axes: Axes):
    """Sum over axes. On an NVIDIA GPU, if it has few terms, in two steps with a barrier between.

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

    few = 0 < _shapes.size(v.shape, axes) <= 4096
    if not axes or v.ndim - 1 in axes or not few:  # along the last axis XLA needs no help
        return at_once(v)
    batch, *inner = axes
    group = max(1, 16 // _shapes.size(v.shape, inner))
    # A group that lies on several devices would need communication of its own.
    across = any(_shapes.shards(v, a) > 1 for a in (axes if group > 1 else inner))
    if across or v.shape[batch] % group:
        return at_once(v)
    return lax.platform_dependent(v, cuda=in_two_steps, default=at_once)


def _abs2(v):
    return jnp.real(v * jnp.conj(v))


def _times(v, scale):
    return v if scale is None else v * scale
