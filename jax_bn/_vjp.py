"""The closed form of the backward pass, as the rule of a `jax.custom_vjp`; and every collective.

The way of the data, on each device (a single one: the sums over devices are then nothing):

    forward    x -> moments -> count, mean, m2 here -> merge over devices -> count, mean, var, rstd
               x, mean, rstd, scale, bias -> normalize -> y
    backward   dy, x, mean, rstd -> grad_sums -> dbias, dscale here -> sum over devices -> sums
               dy, x, mean, rstd, scale, sums, count -> grad_input -> dx

Glossary (* marks an array of x's size, the others hold one number a feature):

    x* y*  input, output     mean var   statistics          x_hat*  (x - mean)*rstd
    dx* dy*  cotangents      rstd       1/sqrt(var + eps)   scale, bias   gamma, beta
    mask*  which examples are valid     count   how many    m2      count*var

Knows the stages by their signatures (and `centred`, which D13 needs), so that any backend can stand
behind them. The statistics that leave this file are differentiable too, by a rule of their own: JAX
differentiates the small merge over devices between the two rules, and so gets its transpose right
in every parallel mode.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn import _stages, _statistics


class Spec(NamedTuple):
    """What is static about one call."""

    axes: tuple[int, ...]  # the reduced axes
    stat_dtype: jnp.dtype  # T: of the statistics and of all arithmetic
    y_dtype: jnp.dtype
    axis_name: tuple[str, ...] = ()  # device axes that the statistics run over
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    stages: _stages.Stages = _stages.XLA


# `Any`, because type checkers lose a function's type behind `partial`.
_rule: Any = partial(jax.custom_vjp, nondiff_argnums=(0,))  # the Spec is static


def batch_norm(spec: Spec, x, mask, scale, bias, epsilon):
    """All of it. :: x[N, C], scale[1, C], bias[1, C] -> y[N, C]; count, mean, var [1, C]."""
    if mask is not None and (missing := _varying(mask) - _varying(x)):
        # A masked x differs between devices as its mask does. JAX transposes this into their sum.
        x = lax.pcast(x, tuple(sorted(missing)), to="varying")
    count, shift, offset, m2 = _moments(spec, x, mask)
    count, shift = lax.stop_gradient((count, shift))
    if spec.axis_name:
        total = partial(_psum, spec)
        count, shift, offset, m2 = _statistics.merge_moments(count, shift, offset, m2, total)
    mean, var = shift + offset, m2 / jnp.maximum(count, 1)
    # A feature with nothing valid has no x_hat; rstd = 0 makes it 0, so that y = bias and dx = 0.
    rstd = jnp.where(count > 0, lax.rsqrt(var + epsilon), 0).astype(spec.stat_dtype)
    y = _normalize(spec, x, mask, count, mean, rstd, scale, bias)
    return y, count, mean, var


# ---- the rule of y -------------------------------------------------------------------------------
#
# `mean` and `rstd` are arguments of `_normalize` and functions of x at once. The rule answers for
# every way in which x reaches y: its dx is the derivative of the whole batch normalization, and the
# cotangents of `mean` and `rstd` are None, since nothing is left for them. (They stay
# differentiable as residuals: so a second derivative, which differentiates this rule, moves them.
# For the same reason the forward rules call the stages and not the functions with rules, which
# could not be differentiated forward: `jax.hessian` is forward over reverse.)
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


@_rule
def _normalize(spec, x, mask, count, mean, rstd, scale, bias):
    del mask, count  # for the backward pass
    return spec.stages.normalize(x, mean, rstd, scale, bias, dtype=spec.y_dtype)


def _normalize_fwd(spec, x, mask, count, mean, rstd, scale, bias):
    y = spec.stages.normalize(x, mean, rstd, scale, bias, dtype=spec.y_dtype)
    if mask is not None:
        # The same y, for a higher derivative that differentiates this line: none may pass a masked
        # position, and a NaN that stands there must not get into that of the scale.
        valid = spec.stages.normalize(
            jnp.where(mask, x, 0), mean, rstd, scale, bias, dtype=spec.y_dtype
        )
        y = jnp.where(mask, valid, lax.stop_gradient(y))
    return y, (x, mask, count, mean, rstd, scale, bias)


def _normalize_bwd(spec, residuals, dy):
    x, mask, count, mean, rstd, scale, bias = residuals
    here = spec.stages.grad_sums(dy, x, mask, mean, rstd, axes=spec.axes)
    scaled = here if scale is None else tuple(v * scale for v in here)
    everywhere, sums = _psum(spec, (here, scaled))
    dx = spec.stages.grad_input(dy, x, mask, mean, rstd, scale, sums, count)
    dbias, dscale = (
        None if primal is None else _cotangent_of(primal, local, total, spec.axis_name)
        for primal, local, total in zip((bias, scale), here, everywhere, strict=True)
    )
    return _cotangent_of(x, dx), None, None, None, None, dscale, dbias


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


# ---- the rule of the statistics ------------------------------------------------------------------
#
#   mean = sum(x)/N,  m2 = sum((x - mean)^2)   so  dx = dmean/N + dm2*2*(x - mean)           (D13)
#
# (dm2 = dvar/N; the derivative of m2 through the mean is -2 sum(x - mean) = 0.)


@_rule
def _moments(spec, x, mask):
    return spec.stages.moments(x, mask, axes=spec.axes, dtype=spec.stat_dtype)


def _moments_fwd(spec, x, mask):
    count, shift, offset, m2 = spec.stages.moments(x, mask, axes=spec.axes, dtype=spec.stat_dtype)
    return (count, shift, offset, m2), (x, mask, count, shift + offset)


def _moments_bwd(spec, residuals, cotangents):
    del spec
    x, mask, count, mean = residuals
    _, _, dmean, dm2 = cotangents  # that of the offset is that of the mean
    n, dm2 = jnp.maximum(count, 1).astype(mean.dtype), dm2.astype(mean.dtype)
    dx = dmean / n + 2 * dm2 * jnp.conj(_stages.centred(x, mask, mean))
    return (dx if mask is None else jnp.where(mask, dx, 0)).astype(x.dtype), None


_moments.defvjp(_moments_fwd, _moments_bwd)


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


def _varying(a) -> frozenset[str]:
    """The device axes along which `a` is known to differ."""
    return frozenset(jax.typeof(a).manual_axis_type.varying)
