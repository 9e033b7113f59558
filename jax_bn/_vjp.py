"""The closed form of both derivatives, as rules that JAX calls; and every collective.

The way of the data, on each device (a single one: the sums over devices are then nothing):

    forward    x -> moments -> count, mean, m2 here -> merge over devices -> count, mean, var, rstd
               x, mean, rstd, scale, bias, residual -> normalize -> y
    backward   dy, kept -> grad_sums -> dbias, dscale here -> sum over devices -> sums
               dy, kept, sums -> grad_input -> dx, dz

Glossary (* marks an array of x's size, the others hold one number a feature):

    x* y*  input, output     mean var   statistics          x_hat*  (x - mean)*rstd
    dx* dy*  cotangents      rstd       1/sqrt(var + eps)   scale, bias   gamma, beta
    mask*  which examples are valid     count   how many    m2      count*var
    residual*  added to the result      z*  y before its activation     kept  `_stages.Kept`

The rules: `_moments` has a tangent (D1; JAX transposes it into D13), the function y has a tangent
(`_tangent_of_y`, D14) and, by default, a cotangent of its own on top of it (`_normalize`, D12).
The merge over devices stands between them as plain code: JAX differentiates it, and so gets its
transpose right in every parallel mode.

Knows the stages by their signatures (and `centred`), so that any backend can stand behind them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jax_bn import _activations, _residuals, _stages, _statistics
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


# `Any`, because type checkers lose a function's type behind `partial`. The Spec is static.
_with_vjp: Any = partial(jax.custom_vjp, nondiff_argnums=(0,))
_with_jvp: Any = partial(jax.custom_jvp, nondiff_argnums=(0,))


def batch_norm(spec: Spec, x, mask, scale, bias, residual, epsilon):
    """All of it. :: x[N, C], scale[1, C], bias[1, C] -> y[N, C]; count, mean, var [1, C]."""
    # A masked x differs between devices as its mask does; a residual's cotangent as y does.
    x = _varying_as(x, mask)
    residual = None if residual is None else _varying_as(residual, x, scale, bias)
    x = _residuals.named_x(x)
    count, shift, offset, m2 = _moments(spec, x, mask)
    count, shift = lax.stop_gradient((count, shift))
    if spec.axis_name:
        total = partial(_psum, spec)
        count, shift, offset, m2 = _statistics.merge_moments(count, shift, offset, m2, total)
    mean, var = shift + offset, m2 / jnp.maximum(count, 1)
    # A feature with nothing valid has no x_hat; rstd = 0 makes it 0, so that y = bias and dx = 0.
    rstd = jnp.where(count > 0, lax.rsqrt(var + epsilon), 0).astype(spec.stat_dtype)
    count, mean, rstd = _residuals.named_statistics((count, mean, rstd))
    rule = _normalize_forward if spec.forward_mode else _normalize
    y = rule(spec, Kept(x, mask, count, mean, rstd, scale, bias, residual))
    return y, count, mean, var


# ---- the rules of y ------------------------------------------------------------------------------
#
# `mean` and `rstd` are arguments of y's rules and functions of x at once. The rules answer for all
# ways in which x reaches y: the tangent and dx are those of the whole batch normalization, the
# tangents of `mean` and `rstd` are ignored and their cotangents None, since nothing is left for
# them. (They stay differentiable as residuals: so a second derivative, which differentiates a rule,
# moves them.)
#
# The derivation, for one feature; x, y, ... are columns of length N, 1 is the column of ones.
#
#   y = scale*x_hat + bias             so  dbias  = 1^T dy = sum(dy)                          (D4)
#                                          dscale = x_hat^T dy = sum(dy*x_hat)                (D5)
#                                          dx_hat = scale*dy                                  (D6)
#   t = (I - 11^T/N) x                 centring: symmetric, so  dx = (I - 11^T/N) dt          (D9)
#   x_hat = g(t) t  with  g(t) = (t^T t/N + eps)^(-1/2) = rstd
#       grad g = -(1/N) rstd^3 t = -(1/N) rstd^2 x_hat                                        (D8)
#       dt = (grad g t^T + g I) dx_hat                    product rule for a scalar g         (D7)
#          = rstd (I - x_hat x_hat^T/N) dx_hat
#   dx = rstd (I - 11^T/N) (I - x_hat x_hat^T/N) dx_hat                                      (D10)
#      = rstd (I - 11^T/N - x_hat x_hat^T/N) dx_hat       since 1^T x_hat = 0                (D11)
#      = (scale*rstd/N) (N dy - 1 dbias - x_hat dscale)   with dx_hat = scale*dy             (D12)
#
# With a mask or over several devices N is `count`, the number of valid examples on all devices, and
# the sums run over these (D15); of D12 the form before the last step, sums of dx_hat, since devices
# may have scales of their own. For complex x the same steps, in JAX's convention (a product's
# cotangent takes no conjugate), give conj(x_hat) Re(scale*dscale) as the last term.
#
# With a residual and an activation, y = act(z), z = bn(x) + residual: dz = dy*act'(z) stands for dy
# in all of this, and is the cotangent of the residual (D16).


@_with_vjp
def _normalize(spec, args):
    return _y(spec, args)


def _normalize_fwd(spec, args):
    # With a tangent of its own, for higher derivatives that differentiate this line.
    y = _normalize_forward(spec, args)
    kept = args._replace(beside=_activations.keeps(spec.activation, args.beside, y))
    return y, (kept, None if args.beside is None else jnp.zeros((), args.beside.dtype))


def _normalize_bwd(spec, residuals, dy):
    kept, like = residuals
    here = spec.stages.grad_sums(dy, kept, activation=spec.activation, axes=spec.axes)
    scaled = here if kept.scale is None else tuple(v * kept.scale for v in here)
    everywhere, sums = _psum(spec, (here, scaled))
    dx, dz = spec.stages.grad_input(dy, kept, sums, activation=spec.activation, dtype=kept.x.dtype)
    dbias, dscale = (
        None if primal is None else _cotangent_of(primal, local, total, spec.axis_name)
        for primal, local, total in zip((kept.bias, kept.scale), here, everywhere, strict=True)
    )
    dresidual = None if like is None else dz.astype(like.dtype)
    dx = _cotangent_of(kept.x, dx)
    return (Kept(dx, None, None, None, None, dscale, dbias, dresidual),)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


# The Jacobian of D11 is symmetric, so the tangent of x_hat is D11 once more, with the tangent of x
# in the place of the cotangent: the same two stages (D14). For complex x, where a tangent is a
# cotangent's conjugate in JAX's convention, it is conj(J conj(dx)).
#
# JAX transposes the tangent where reverse mode is asked of it. `checkpoint` leaves it x to do so
# from, and not x - mean in a wider dtype. prevent_cse=False: all there is to recompute is
# elementwise, and fuses into the sweep that needs it.


@_with_jvp
def _normalize_forward(spec, args):
    return _y(spec, args)


def _y(spec, args):
    x, _, _, *rest = args
    return spec.stages.normalize(x, *rest, activation=spec.activation, dtype=spec.y_dtype)


@partial(_normalize_forward.defjvp, symbolic_zeros=True)
def _normalize_jvp(spec, primals, tangents):
    (args,), (tangents,) = primals, tangents
    tangent = jax.checkpoint(partial(_tangent_of_y, spec), prevent_cse=False)
    moving = jax.tree.map(_unless_zero, tangents, is_leaf=_is_zero)
    return _normalize_forward(spec, args), tangent(args, moving)


def _tangent_of_y(spec, args, moving):
    """dz = scale*dx_hat + dscale*x_hat + dbias + dresidual, and of the activation that of z.

    0 where masked. A tangent of None is nothing.
    """
    T = spec.stat_dtype
    x_hat = args._replace(scale=None, bias=None, beside=None)  # as if it were the y of D11
    dz = jnp.zeros(args.x.shape, T)
    if moving.x is not None:
        dx = jnp.conj(moving.x)
        sums = _psum(spec, _stages.grad_sums(dx, x_hat, axes=spec.axes))
        dx_hat = jnp.conj(_stages.grad_input(dx, x_hat, sums, dtype=T)[0])
        dz += dx_hat if args.scale is None else args.scale * dx_hat
    if moving.scale is not None:
        dz += moving.scale * (args.rstd * _stages.centred(args))
    if moving.bias is not None:
        dz += moving.bias
    if moving.beside is not None:
        dz += moving.beside.astype(T)
    if spec.activation is not None:
        _, dz = jax.jvp(spec.activation, (_stages.before_activation(args),), (dz,))
    # Selected last: transposed, first, before a NaN in a masked cotangent meets any arithmetic.
    dz = dz if args.mask is None else jnp.where(args.mask, dz, 0)
    return dz.astype(spec.y_dtype)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


def _unless_zero(tangent):
    return None if _is_zero(tangent) else tangent


# ---- the rule of the statistics ------------------------------------------------------------------
#
#   mean = sum(x)/N             tangents   dmean = sum(dx)/N
#   m2 = sum((x - mean)^2)                 dm2 = 2 sum((x - mean)*dx),  since sum(x - mean) = 0
#
# Their transpose is what the statistics add to dx:  dx = dmean/N + dm2*2*(x - mean)         (D13)


@_with_jvp
def _moments(spec, x, mask):
    return spec.stages.moments(x, mask, axes=spec.axes, dtype=spec.stat_dtype)


@_moments.defjvp
def _moments_jvp(spec, primals, tangents):
    x, mask = primals
    count, shift, offset, m2 = _residuals.named_statistics(_moments(spec, x, mask))
    dx, _ = tangents

    def tangent(x, mask, count, mean, dx):
        not_scaled = Kept(x, mask, count, mean, jnp.ones((), mean.dtype), None, None)
        s, along = _stages.grad_sums(jnp.conj(dx), not_scaled, axes=spec.axes)
        return jnp.conj(s) / jnp.maximum(count, 1).astype(mean.dtype), 2 * jnp.real(along)

    dmean, dm2 = jax.checkpoint(tangent, prevent_cse=False)(x, mask, count, shift + offset, dx)
    return (count, shift, offset, m2), (jnp.zeros_like(count), jnp.zeros_like(shift), dmean, dm2)


# ---- several devices -----------------------------------------------------------------------------


def _psum(spec: Spec, tree):
    if not spec.axis_name:
        return tree
    try:
        return lax.psum(tree, spec.axis_name, axis_index_groups=spec.axis_index_groups)
    except NotImplementedError as e:
        if spec.axis_index_groups is None:
            raise
        raise NotImplementedError(
            "axis_index_groups: JAX has no groups under vmap and shard_map(check_vma=True). Use "
            "shard_map(check_vma=False) or pmap, or two mesh axes, one of which is axis_name"
        ) from e


def _cotangent_of(primal, here, everywhere=None, axis_name=()):
    """The cotangent `here`, summed over the axes along which it varies and `primal` does not.

    Under `shard_map(check_vma=True)` a cotangent must vary as its primal does: for a scale that all
    devices share that is the sum over them, which is `everywhere` if it was taken over just these
    axes. In all other modes nothing is known to vary, and each device returns its own.
    """
    missing = _varying(here) - _varying(primal)
    if not missing:
        return here
    if everywhere is not None and missing == set(axis_name):
        return everywhere
    return lax.psum(here, tuple(sorted(missing)))


def _varying_as(v, *others):
    """v, varying along the device axes of the others too; transposed, a sum over these."""
    axes = frozenset().union(*(_varying(a) for a in others if a is not None))
    missing = axes - _varying(v)
    return lax.pcast(v, tuple(sorted(missing)), to="varying") if missing else v


def _varying(a) -> frozenset[str]:
    """The device axes along which `a` is known to differ."""
    return frozenset(jax.typeof(a).manual_axis_type.varying)
