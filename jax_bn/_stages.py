"""The four stages of batch normalization in jnp: the arithmetic over whole arrays.

    forward    moments(x)      --merge over devices-->   normalize(x, mean, rstd, scale, bias, ...)
    backward   grad_sums(dy, kept)  --sum over devices-->   grad_input(dy, kept, sums)

On one device nothing has to happen at the arrows: a backend may have each line as one function.

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
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn import _activations, _compiler, _shapes, _sums
from jax_bn._compiler import Sweep

Axes = tuple[int, ...]


class Kept(NamedTuple):
    """What the backward stages know of the forward pass; and nothing else is kept for them."""

    x: Any  # [N, C], as narrow as it came
    mask: Any
    count: Any
    mean: Any  # [1, C], and so are rstd, scale and bias
    rstd: Any
    scale: Any = None
    bias: Any = None
    residual: Any = None  # [N, C]; kept where the derivative of the activation takes z
    # [N, C]; kept where it takes the sign of z, and x alone does not tell that. And on its way into
    # the rule, where `Stages.forward` has made it.
    y: Any = None


class Stages(NamedTuple):
    """A backend: four pure functions with the signatures of those below; and, if it has them, two.

    A whole pass is used in the place of its two stages where there is no mask and nothing is summed
    over devices; the forward one where, beside, scale and bias do not depend on the statistics.
    """

    moments: Callable
    normalize: Callable
    grad_sums: Callable
    grad_input: Callable
    forward: Callable | None = None
    backward: Callable | None = None


def _jit(*static: str) -> Any:
    """Traced once for each shape, and where no program is being traced also compiled once."""
    return partial(jax.jit, static_argnames=static)


@_jit("axes", "dtype")
def moments(x, mask, *, axes: Axes, dtype):
    """count, shift, offset and m2 of each feature. :: [N, C] -> [1, C] each, or [1, 1]

    mean = shift + offset, not yet added: the sum rounds at the size of the mean, and to compare the
    means of two devices takes what that loses. m2 = sum |x - mean|^2.

    One sweep: sums of d = x - shift and of |d|^2, with a shift close to the mean, so that the
    difference in m2 cancels next to nothing (Chan, Golub, LeVeque 1983):

        offset = sum(d)/count        m2 = sum |d|^2 - |sum(d)/sqrt(count)|^2

    written so that |sum(d)|^2, count times larger than m2 may ever be, is nowhere to overflow. (Not
    as sum(d)*conj(offset): XLA would sum the offset over devices once more.)
    """
    count = _count(x, mask, axes, dtype)
    n = jnp.maximum(count, 1)
    shift = lax.stop_gradient(_shift(x, mask, n, axes, dtype))  # no result depends on it

    def terms(x, shift, mask):
        d = _select(mask, x.astype(dtype) - shift)
        return d, _abs2(d)

    s, squares = _sums.sums_of(terms, (x, shift, mask), axes, Sweep.M2)
    m2 = squares - _abs2(s / jnp.sqrt(n).astype(dtype))
    return count, shift, s / n.astype(dtype), jnp.maximum(m2, 0)


@_jit("activation", "dtype")
def normalize(x, mean, rstd, scale, bias, residual=None, *, activation=None, dtype):
    """y = activation((x - mean)*(rstd*scale) + bias + residual). :: [N, C] -> [N, C] in dtype

    Centred before it is scaled: folding the mean into the bias would lose log10(|mean|/std) digits.
    """
    x = _compiler.apart(x, Sweep.NORMALIZE)
    z = _z(x, mean, rstd, scale, bias, residual, Sweep.NORMALIZE)
    return (z if activation is None else activation(z)).astype(dtype)


@_jit("activation", "axes")
def grad_sums(dy, kept: Kept, *, activation=None, axes: Axes):
    """dbias = sum(dz), dscale = sum(dz * x_hat) over these examples. :: [N, C] -> [1, C] twice

    rstd stands outside the sum: inside, XLA:CPU's library has x_hat written out, whole.
    """

    def terms(dz, kept):
        dz = dz.astype(kept.mean.dtype)
        return dz, dz * centred(kept)

    dz = grad_z(dy, kept, activation, Sweep.GRAD_SUMS)
    # Each input of a sum is looked at, and split, on its own.
    needed = Kept(x=kept.x, mask=kept.mask, count=None, mean=kept.mean, rstd=None)
    s, along = _sums.sum_both(terms, (dz, needed), axes)
    return s, kept.rstd * along


@_jit("activation", "dtype")
def grad_input(dy, kept: Kept, sums, *, activation=None, dtype):
    """dx of the final equation, and dz. :: [N, C] -> [N, C] in dtype, [N, C] in T

    dx = (rstd/count) * (count*dx_hat - sum(dx_hat) - x_hat*sum(dx_hat*x_hat)),  dx_hat = scale*dz

    `sums` are the two over all examples, scale*dbias and scale*dscale where all share one scale.
    """
    n = jnp.maximum(kept.count, 1)
    dz = grad_z(dy, kept, activation, Sweep.GRAD_INPUT)
    dz, kept = _compiler.apart((dz, kept), Sweep.GRAD_INPUT)
    dz = dz.astype(kept.mean.dtype)
    mean_dx_hat = sums[0] / n.astype(dz.dtype)
    slope = kept.rstd * (jnp.real(sums[1]) / n).astype(dz.dtype)
    dx = kept.rstd * (_times(dz, kept.scale) - mean_dx_hat - slope * jnp.conj(centred(kept)))
    return _select(kept.mask, dx).astype(dtype), dz


def grad_z(dy, kept: Kept, activation, sweep: Sweep):
    """dz = dy * activation'(z), 0 where masked. :: [N, C] -> [N, C] in dy's dtype if that is exact

    z, the argument of the activation, is computed again, or as much of it as its derivative takes.
    """
    dy = _select(kept.mask, dy)
    if activation is None:
        return dy

    sides, narrow = _activations.sides(activation), dy.dtype
    selects = sides is not None and sides.slope == 0

    def dz(dy, kept, sweep):
        dy = dy.astype(kept.mean.dtype)
        if sides is None:
            return jax.vjp(activation, before_activation(kept, sweep))[1](dy)[0]
        above = _compiler.above(*_side(kept), closed=sides.closed, sweep=sweep)
        if selects:  # dy or 0, whatever dy is: not 0*dy
            return jnp.where(above, dy, 0).astype(narrow)
        return jnp.where(above, dy, sides.slope * dy)

    is_result = kept.y is not None or kept.residual is not None  # its cotangent
    written = is_result and (selects or narrow == kept.mean.dtype)
    return _compiler.once(dz, dy, kept, sweep, written=written)


def before_activation(kept: Kept, sweep: Sweep):
    """z = bn(x) + residual; where masked, the bias. :: [N, C] -> [N, C] in T

    Not that of zeros: far from the mean the activation may overflow, and 0*inf is NaN.
    """
    x, residual = kept.x.astype(kept.mean.dtype), _select(kept.mask, kept.residual)
    x = x if kept.mask is None else jnp.where(kept.mask, x, kept.mean)
    return _z(x, kept.mean, kept.rstd, kept.scale, kept.bias, residual, sweep)


def _z(x, mean, rstd, scale, bias, residual, sweep: Sweep):
    z = _compiler.affine(x.astype(mean.dtype), mean, _times(rstd, scale), bias, sweep)
    return z if residual is None else z + _compiler.widened(residual, z.dtype)


def _side(kept: Kept):
    """v [N, C] and kink, of which z > 0 says v > kink, and z = 0 v = kink.

    y, which has z's sign, and 0 where there was a residual. Else x - mean, mirrored if need be, and
    where z is 0. Centred: the same of x itself would be rounded to the steps of x, and whole steps
    would lie on the wrong side.
    """
    if kept.y is not None:
        return kept.y, jnp.zeros((), kept.y.dtype)
    # a*(x - mean) + bias > 0  where  sign(a)*(x - mean) > -bias/|a|;  if a = 0 where bias > 0
    a = _times(kept.rstd, kept.scale)
    bias = jnp.zeros_like(a) if kept.bias is None else kept.bias
    kink = -bias / jnp.where(a == 0, 1, jnp.abs(a))
    return jnp.sign(a) * (kept.x.astype(a.dtype) - kept.mean), kink


def centred(kept: Kept):
    """x - mean in T, 0 where masked. :: [N, C] -> [N, C]"""
    return _select(kept.mask, kept.x.astype(kept.mean.dtype) - kept.mean)


XLA = Stages(moments, normalize, grad_sums, grad_input)


# ---- whole passes --------------------------------------------------------------------------------


def forward(x, scale, bias, residual, *, axes: Axes, epsilon, activation=None, dtype, y_dtype):
    """`moments` and `normalize`. :: [N, C] -> y[N, C] in y_dtype; count, mean, var, rstd [1, C]"""
    count, shift, offset, m2 = moments(x, None, axes=axes, dtype=dtype)
    mean, var, rstd = statistics(count, shift, offset, m2, epsilon)
    y = normalize(x, mean, rstd, scale, bias, residual, activation=activation, dtype=y_dtype)
    return y, count, mean, var, rstd


def backward(dy, kept: Kept, *, activation=None, axes: Axes, dtype):
    """`grad_sums` and `grad_input`. :: [N, C] -> (dbias, dscale) [1, C], dx[N, C], dz[N, C]"""
    sums = grad_sums(dy, kept, activation=activation, axes=axes)
    return sums, *grad_input(dy, kept, scaled(sums, kept), activation=activation, dtype=dtype)


WHOLE = XLA._replace(forward=forward, backward=backward)  # what each of the six has to compute


def statistics(count, shift, offset, m2, epsilon):
    """mean, var and rstd of what `moments` gives.

    One example, or none, has no x_hat: rstd = 0 makes it 0, so that y = bias and dx = 0, exactly.
    """
    mean, var = shift + offset, m2 / jnp.maximum(count, 1)
    return mean, var, jnp.where(count > 1, lax.rsqrt(var + epsilon), 0).astype(mean.dtype)


def scaled(sums, kept: Kept):
    """The two sums of dx_hat = scale*dz."""
    return tuple(_times(v, kept.scale) for v in sums)


def _shift(x, mask, n, axes: Axes, dtype):
    """A number near each feature's mean; any will do, the closer the fewer digits `moments` loses.

    The median of three examples, so that no single outlier sets it: it costs no sweep. Where the
    examples cannot be picked (some may be masked; the batch axis is sharded over an explicit mesh;
    complex numbers have no order) it is the mean itself, for one more sweep.
    """
    sharded = any(_shapes.shards(x, a) > 1 for a in axes)
    if mask is not None or sharded or jnp.iscomplexobj(x):

        def valid(x, mask):
            return _select(mask, x.astype(dtype))

        return _sums.sum_of(valid, (x, mask), axes) / n.astype(dtype)
    if not axes:
        return x.astype(dtype)
    batch, *_ = axes
    x = _compiler.apart(x, Sweep.NORMALIZE)  # not with a sum; with what else, does not matter

    def example(i):  # the i-th along the batch axis, in the middle of the other reduced ones
        start = [size // 2 if a in axes else 0 for a, size in enumerate(x.shape)]
        start[batch] = min(i, x.shape[batch] - 1)
        stop = [start[a] + 1 if a in axes else size for a, size in enumerate(x.shape)]
        # Squeezed: with a batch axis of length 1 the compiler would go on sharding it.
        return jnp.squeeze(lax.slice(x, start, stop), axes)

    a, b, c = (v.astype(dtype) for v in _compiler.picked([example(0), example(1), example(2)]))
    median = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    return _compiler.written_out(jnp.expand_dims(median, axes), x)


def _count(x, mask, axes: Axes, dtype):
    """How many examples of each feature are valid, as a real array that broadcasts with [1, C]."""
    n = _shapes.size(x.shape, axes)
    real = jnp.finfo(dtype).dtype
    if mask is None:
        return jnp.full((1,) * x.ndim, n, real)
    per_entry = n // _shapes.size(mask.shape, axes)  # how many examples one mask entry stands for
    return _sums.sum_over(mask.astype(real), axes) * per_entry


def _select(mask, v) -> Any:
    """The valid entries of v, 0 elsewhere; selected, since a NaN survives multiplication by 0."""
    return v if mask is None or v is None else jnp.where(mask, v, 0)


def _abs2(v):
    return jnp.real(v * jnp.conj(v))


def _times(v, scale):
    return v if scale is None else v * scale
