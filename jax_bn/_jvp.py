"""Tangents in closed form: of y (D14) and of the statistics (D13 is their transpose).

The rules here serve forward mode, JAX's transposition of it (`forward_mode=True` has no other
reverse mode), and every higher derivative. They are written in the stages of `_stages`, which JAX
can differentiate, whatever backend computes y itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jax_bn import _devices, _residuals, _stages
from jax_bn._compiler import Sweep
from jax_bn._stages import Kept


class Spec(NamedTuple):
    """What is static about one call."""

    axes: tuple[int, ...]  # the reduced axes
    stat_dtype: jnp.dtype  # T: of the statistics and of all arithmetic
    y_dtype: jnp.dtype
    axis_name: tuple[str, ...] = ()  # device axes that the statistics run over
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    activation: Callable | None = None
    forward_mode: bool = False
    stages: _stages.Stages = _stages.XLA


# The Spec is static.
_with_jvp: Any = partial(jax.custom_jvp, nondiff_argnums=(0,))
_checkpointed: Any = partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))


# ---- the tangent of y ----------------------------------------------------------------------------
#
# The Jacobian of D11 is symmetric, so the tangent of x_hat is D11 once more, with the tangent of x
# in the place of the cotangent: the same two stages (D14). For complex x, where a tangent is a
# cotangent's conjugate in JAX's convention, it is conj(J conj(dx)).
#
# JAX transposes the tangent where reverse mode is asked of it. `checkpoint` leaves it x to do so
# from, and not x - mean in a wider dtype. prevent_cse=False: all there is to recompute is
# elementwise, and fuses into the sweep that needs it.


@_with_jvp
def normalize(spec, args):
    """y, by the stage of the backend; or that which is there, from `forward`."""
    x, _, _, mean, rstd, scale, bias, residual, y = args
    if y is not None:
        return y
    return spec.stages.normalize(
        x, mean, rstd, scale, bias, residual, activation=spec.activation, dtype=spec.y_dtype
    )


@partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(spec, primals, tangents):
    (args,), (tangents,) = primals, tangents
    args = moving(spec, args)
    tangents = jax.tree.map(_unless_zero, tangents, is_leaf=_is_zero)
    return normalize(spec, args), _tangent_of_y(spec, args._replace(y=None), tangents)


@_checkpointed
def _tangent_of_y(spec, args, tangents):
    """dz = scale*dx_hat + dscale*x_hat + dbias + dresidual, and of the activation that of z.

    0 where masked. A tangent of None is nothing.
    """
    T = spec.stat_dtype
    dz = jnp.zeros(args.x.shape, T)
    if tangents.x is not None:
        dx, x_hat = jnp.conj(tangents.x), _bare(args)
        sums = _devices.psum(spec, _stages.grad_sums(dx, x_hat, axes=spec.axes))
        dx_hat = jnp.conj(_stages.grad_input(dx, x_hat, sums, dtype=T)[0])
        dz += dx_hat if args.scale is None else args.scale * dx_hat
    if tangents.scale is not None:
        dz += tangents.scale * (args.rstd * _stages.centred(args))
    if tangents.bias is not None:
        dz += tangents.bias
    if tangents.residual is not None:
        dz += tangents.residual.astype(T)
    if spec.activation is not None:
        z = _stages.before_activation(args, Sweep.GRAD_SUMS)
        _, dz = jax.jvp(spec.activation, (z,), (dz,))
    # Selected last: transposed, first, before a NaN in a masked cotangent meets any arithmetic.
    dz = dz if args.mask is None else jnp.where(args.mask, dz, 0)
    return dz.astype(spec.y_dtype)


def _bare(args: Kept) -> Kept:
    """As if y were x_hat."""
    return args._replace(scale=None, bias=None, residual=None, y=None)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


def _unless_zero(tangent):
    return None if _is_zero(tangent) else tangent


# Of the statistics in a rule:  dmean = sum(dx)/N,  drstd = -rstd^3/2 dvar = -rstd^2 sum(x_hat*dx)/N


def moving(spec, args: Kept) -> Kept:
    """`args` with mean and rstd as functions of x."""
    mean, rstd = _mean_and_rstd(spec, _bare(args))
    return args._replace(mean=mean, rstd=rstd)


@_with_jvp
def _mean_and_rstd(spec, args):
    del spec
    return args.mean, args.rstd


@partial(_mean_and_rstd.defjvp, symbolic_zeros=True)
def _mean_and_rstd_jvp(spec, primals, tangents):
    (args,), (tangents,) = primals, tangents
    args = moving(spec, args)
    if _is_zero(tangents.x):
        return (args.mean, args.rstd), (jnp.zeros_like(args.mean), jnp.zeros_like(args.rstd))
    return (args.mean, args.rstd), _tangent_of_mean_and_rstd(spec, args, tangents.x)


@_checkpointed
def _tangent_of_mean_and_rstd(spec, args, dx):
    s, along = _devices.psum(spec, _stages.grad_sums(jnp.conj(dx), args, axes=spec.axes))
    n = jnp.maximum(args.count, 1)
    mean_along = (jnp.real(along) / n).astype(args.rstd.dtype)
    return jnp.conj(s) / n.astype(args.mean.dtype), -(args.rstd**2) * mean_along


# ---- the tangent of the statistics ---------------------------------------------------------------
#
#   mean = sum(x)/N             tangents   dmean = sum(dx)/N
#   m2 = sum((x - mean)^2)                 dm2 = 2 sum((x - mean)*(dx - dmean))
#
# Their transpose is what the statistics add to dx:  dx = dmean/N + dm2*2*(x - mean)         (D13)
#
# (sum(x - mean)*dmean is 0 but for the rounding of the mean, which a large dmean would magnify.)


@_with_jvp
def moments(spec, x, mask):
    """count, shift, offset and m2 of the examples on this device."""
    return spec.stages.moments(x, mask, axes=spec.axes, dtype=spec.stat_dtype)


@moments.defjvp
def _moments_jvp(spec, primals, tangents):
    x, mask = primals
    count, shift, offset, m2 = _residuals.named_statistics(moments(spec, x, mask))
    dx, _ = tangents
    dmean, dm2 = _tangent_of_moments(spec, x, mask, count, shift + offset, dx)
    return (count, shift, offset, m2), (jnp.zeros_like(count), jnp.zeros_like(shift), dmean, dm2)


def forward(spec, x, scale, bias, residual, epsilon):
    """y, count, mean, var and rstd by a whole pass of the backend.

    The pass is not differentiated: mean and var are functions of x by the rule of this section, and
    the others constants, to be given to `normalize`, whose rule has all ways in which x reaches y.
    """
    constants = jax.lax.stop_gradient((x, scale, bias, residual))
    y, count, mean, var, rstd = spec.stages.forward(
        *constants, axes=spec.axes, epsilon=epsilon, activation=spec.activation,
        dtype=spec.stat_dtype, y_dtype=spec.y_dtype,
    )  # fmt: skip
    mean, var = _mean_and_var(spec, x, count, mean, var)
    return y, count, mean, var, rstd


@_with_jvp
def _mean_and_var(spec, x, count, mean, var):
    del spec, x, count
    return mean, var


@_mean_and_var.defjvp
def _mean_and_var_jvp(spec, primals, tangents):
    x, count, *statistics = primals
    count, *statistics = _residuals.named_statistics((count, *statistics))
    mean, var = _mean_and_var(spec, x, count, *statistics)
    dmean, dm2 = _tangent_of_moments(spec, x, None, count, mean, tangents[0])
    return (mean, var), (dmean, dm2 / jnp.maximum(count, 1))


@_checkpointed
def _tangent_of_moments(spec, x, mask, count, mean, dx):
    not_scaled = Kept(x, mask, count, mean, jnp.ones((), mean.dtype))
    s, along = _stages.grad_sums(jnp.conj(dx), not_scaled, axes=spec.axes)
    conj_dmean = s / jnp.maximum(count, 1).astype(mean.dtype)
    rounding = jnp.sum(_stages.centred(not_scaled), spec.axes, keepdims=True)
    return jnp.conj(conj_dmean), 2 * jnp.real(along - rounding * conj_dmean)
