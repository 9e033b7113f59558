"""The stages for Hopper GPUs, each of them one kernel (Pallas Mosaic GPU); two passes of one too.

Knows arrays, as `_stages` does, which defines what every function here has to compute; nothing of
derivatives or devices. How a kernel moves data is in `_stream`, and for an x that fits on the chip
in `_resident`, which has whole passes; `why_not` says what none can run.

The second sweep of each pass, `bn_normalize` and `bn_grad_input`, walks x backwards: what the first
sweep read last is what is still in the L2 cache. Sums run over x - shift and its square, as in
`_stages.moments`; all arithmetic is in float32, and x is centred before it is scaled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax._src import config  # JAX does not say otherwise whether its interpreter is on
import jax.numpy as jnp

from jax_bn import _activations, _shapes, _stages
from jax_bn._stages import Kept, Stages
from jax_bn.kernels._resident import resident
from jax_bn.kernels._slabs import fitting
from jax_bn.kernels._stream import stream, tiling

Axes = tuple[int, ...]
DTYPES = ("bfloat16", "float16", "float32")


def why_not_here() -> str | None:
    """Why there is no device for these kernels; None where one is, or the interpreter stands in."""
    if config.pallas_tpu_interpret_mode_context_manager.value is not None:  # of all of Pallas
        return None
    compiled_for = jax.sharding.get_abstract_mesh().abstract_device  # a device that is not here
    if compiled_for is not None and compiled_for.platform == "gpu":
        return None
    if jax.default_backend() != "gpu":
        return f"the device is a {jax.default_backend()}; expected an NVIDIA GPU, an H100 or H200"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "none"))
    if capability.split(".")[0] != "9":  # AMD's are of another form
        return f"the GPU has compute capability {capability}; expected 9.0 (Hopper)"
    return None


def why_not(x, mask, residual, *, axes: Axes, activation, dtype, y_dtype) -> str | None:
    """Why these kernels cannot run this; None where they can."""
    if mask is not None:
        return "mask is given; expected None"
    if axes != tuple(range(x.ndim - 1)) or x.ndim < 2:
        return f"the reduced axes of x, of rank {x.ndim}, are {axes}; expected all but the last"
    found = [x.dtype.name, jnp.dtype(y_dtype).name]
    found += [] if residual is None else [residual.dtype.name]
    if len(set(found)) > 1 or found[0] not in DTYPES or dtype != jnp.float32:
        return (
            f"x, y and the residual have dtypes {found} and the arithmetic {dtype}; expected one "
            f"of {DTYPES} for all three, and float32"
        )
    if activation is not None and _activations.sides(activation) is None:
        return f"activation={activation!r}; expected jax.nn.relu, jax.nn.leaky_relu or None"
    if any(_shapes.shards(x, a) > 1 for a in range(x.ndim)):
        return "x is spread over an explicit mesh; expected one device, or the inside of shard_map"
    try:
        tiling(x.size // x.shape[-1], x.shape[-1], x.dtype.itemsize, 1)
    except NotImplementedError as e:
        return str(e)
    return None


# ---- the stages ----------------------------------------------------------------------------------


def moments(x, mask, *, axes: Axes, dtype):
    """count, shift, offset and m2 of each feature; see `_stages.moments`."""
    n = x.size // x.shape[-1]
    shift = _stages._shift(x, mask, n, axes, dtype)
    s, squares = _sums(_moments, (x,), (shift,), "bn_moments")
    count = jnp.full((1,) * x.ndim, n, dtype)
    return count, shift, s / n, _m2(s, squares, n)


def normalize(x, mean, rstd, scale, bias, residual=None, *, activation=None, dtype):
    """y = activation((x - mean)*(rstd*scale) + bias + residual); see `_stages.normalize`."""
    del dtype  # x's
    arrays = (x,) if residual is None else (x, residual)
    vectors = _affine(mean, rstd, scale, bias)
    (y,) = _written(partial(_normalize, activation), arrays, vectors, 1, "bn_normalize")
    return y


def grad_sums(dy, kept: Kept, *, activation=None, axes: Axes):
    """dbias = sum(dz), dscale = sum(dz * x_hat); see `_stages.grad_sums`."""
    del axes  # all but the last
    arrays, vectors = _operands(dy, kept, activation), _affine_of(kept)
    s, along = _sums(partial(_grad_sums, activation), arrays, vectors, "bn_grad_sums")
    return s, kept.rstd * along


def grad_input(dy, kept: Kept, sums, *, activation=None, dtype):
    """dx of the final equation, and dz; see `_stages.grad_input`."""
    del dtype  # x's
    arrays, outputs = _operands(dy, kept, activation), _outputs(kept, activation)
    vectors = *_affine_of(kept), kept.rstd, *_slopes(sums, kept.rstd, jnp.maximum(kept.count, 1))
    terms = partial(_grad_input, activation, outputs)
    dx, *dz = _written(terms, arrays, vectors, outputs, "bn_grad_input")
    return dx, _dz_of(dz, dy, kept, activation)


def forward(x, scale, bias, residual, *, axes: Axes, epsilon, activation=None, dtype, y_dtype):
    """y, count, mean, var and rstd; see `_stages.forward`.

    x stays on the chip, where one more sweep is cheap: the shift is the mean, as well as the sum of
    x - its first example gives it.
    """
    del axes, y_dtype  # all but the last; x's
    n = x.size // x.shape[-1]
    given = [v for v in (scale, bias) if v is not None]

    def program(slab, *of_slab):
        first = slab.first_example()
        (s,) = slab.sums(lambda x, first: (x - first,), first, sums=1, arrays=1)
        shift = first + s / n
        s, squares = slab.sums(_moments, shift, sums=2, arrays=1)
        mean, var = shift + s / n, _m2(s, squares, n) / n
        rstd = lax.rsqrt(var + epsilon)  # of more than one example: fewer are not resident
        of = iter(of_slab)
        affine = [None if v is None else next(of) for v in (scale, bias)]
        slab.write(partial(_normalize, activation), *_affine(mean, rstd, *affine))
        return mean, var, rstd

    arrays = (x,) if residual is None else (x, residual)
    y, *statistics = resident(program, arrays, given, 1, 3, "bn_forward")
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    count = jnp.full((1,) * x.ndim, n, dtype)
    return y, count, *(v.reshape(shape) for v in statistics)


def backward(dy, kept: Kept, *, activation=None, axes: Axes, dtype):
    """dbias and dscale, dx, dz; see `_stages.backward`."""
    del axes, dtype  # all but the last; x's
    n, outputs = dy.size // dy.shape[-1], _outputs(kept, activation)
    arrays = _operands(dy, kept, activation)
    given = [v for v in (kept.mean, kept.rstd, kept.scale, kept.bias) if v is not None]

    def program(slab, mean, rstd, *of_slab):
        of = iter(of_slab)
        scale, bias = (None if v is None else next(of) for v in (kept.scale, kept.bias))
        here = kept._replace(mean=mean, rstd=rstd, scale=scale, bias=bias)
        affine, terms = _affine_of(here), partial(_grad_sums, activation)
        s, along = slab.sums(terms, *affine, sums=2, arrays=len(arrays))
        sums = s, rstd * along
        slopes = _slopes(_stages.scaled(sums, here), rstd, n)
        slab.write(partial(_grad_input, activation, outputs), *affine, rstd, *slopes)
        return sums

    *written, s, along = resident(program, arrays, given, outputs, 2, "bn_backward")
    dx, *dz = written
    sums = s.reshape(kept.mean.shape), along.reshape(kept.mean.shape)
    return sums, dx, _dz_of(dz, dy, kept, activation)


STREAMING = Stages(moments, normalize, grad_sums, grad_input)
ON_CHIP = STREAMING._replace(forward=forward, backward=backward)


def stages(x, residual, activation) -> Stages:
    """Those for an x of this size; the backward pass holds most, x, dy, and y if that is kept."""
    arrays = 2 if residual is None or activation is None else 3
    fits = fitting(x.size // x.shape[-1], x.shape[-1], x.dtype.itemsize, arrays)
    return STREAMING if fits is None else ON_CHIP


# ---- what they compute of each number ------------------------------------------------------------
#
# Of a run of each array, in float32, and of vectors repeated along it.


def _moments(x, shift):
    d = x - shift
    return d, d * d


def _normalize(activation, x, *others):
    *residual, mean, a, bias = others
    z = (x - mean) * a + bias
    z = z + residual[0] if residual else z
    return (z if activation is None else _sided(activation, z, z),)


def _grad_sums(activation, x, dy, *others):
    *y, mean, a, bias = others
    dz = _dz(activation, x, dy, y, mean, a, bias)
    return dz, dz * (x - mean)


def _grad_input(activation, outputs: int, x, dy, *others):
    *y, mean, a, bias, rstd, constant, slope = others
    dz = _dz(activation, x, dy, y, mean, a, bias)
    dx = a * dz - rstd * (constant + slope * (x - mean))
    return (dx, dz)[:outputs]


def _dz(activation, x, dy, y, mean, a, bias):
    """dz = dy*activation'(z). `y`: [y], which has z's sign, or [] and z is computed again."""
    if activation is None:
        return dy
    (z,) = y or [(x - mean) * a + bias]
    return _sided(activation, z, dy)


def _sided(activation, z, v):
    """v above the activation's kink, slope*v below it; 0, whatever v is, where the slope is 0."""
    sides: Any = _activations.sides(activation)
    below = jnp.zeros_like(v) if sides.slope == 0 else v * sides.slope
    # A NaN is neither above nor below, and is to be seen.
    return jnp.where(z < 0 if sides.closed else z <= 0, below, v)


# ---- their arrays and vectors --------------------------------------------------------------------


def _m2(s, squares, n):
    """sum((x - mean)^2) of the sums over x - shift and its square."""
    m2 = squares - s * (s / n)
    return jnp.where(m2 < 0, 0, m2)


def _affine(mean, rstd, scale, bias) -> tuple:
    """mean, a and bias of z = (x - mean)*a + bias; the same for three kernels, so packed once."""
    bias = jnp.zeros_like(mean) if bias is None else bias
    return mean, rstd if scale is None else rstd * scale, bias


def _affine_of(kept: Kept) -> tuple:
    return _affine(kept.mean, kept.rstd, kept.scale, kept.bias)


def _slopes(sums, rstd, n) -> tuple:
    """Of dx = a*dz - rstd*(constant + slope*(x - mean)); apart, since rstd^2 may underflow."""
    return sums[0] / n, rstd * sums[1] / n


def _operands(dy, kept: Kept, activation) -> tuple:
    """The arrays of the backward pass: y where z cannot be computed again from x."""
    with_y = activation is not None and kept.y is not None
    return (kept.x, dy, kept.y) if with_y else (kept.x, dy)


def _outputs(kept: Kept, activation) -> int:
    """Of the backward pass: dx, and dz where there is a residual that it is not dy for."""
    return len(_operands(None, kept, activation)) - 1


def _dz_of(written, dy, kept: Kept, activation):
    """dz, in float32: [dz] as a kernel has written it, or []."""
    if written:
        return written[0].astype(jnp.float32)
    # Nobody reads it but where there is a residual: then, without an activation, it is dy.
    return _stages.grad_z(dy, kept, activation, _stages.Sweep.GRAD_INPUT).astype(jnp.float32)


def _sums(terms: Callable, arrays, vectors, name: str) -> list:
    """The sums over the examples of both arrays that `terms` makes. :: [1, C] twice"""
    sums = stream(terms, arrays, vectors, 2, 0, name)
    return [s.reshape(vectors[0].shape) for s in sums]


def _written(terms: Callable, arrays, vectors, outputs: int, name: str) -> list:
    """The arrays that `terms` makes, in x's dtype. :: [N, C] each"""
    written = stream(terms, arrays, vectors, 0, outputs, name)
    return [v.reshape(arrays[0].shape) for v in written]
