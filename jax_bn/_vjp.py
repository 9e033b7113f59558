"""The closed form of the backward pass, as the rule of a `jax.custom_vjp`; and every collective.

The way of the data, on each device (a single one: the sums over devices are then nothing):

    forward    x -> moments -> count_i, mean_i, m2_i -> sum over devices -> count, mean, var, rstd
               x, mean, rstd, scale, bias -> normalize -> y
    backward   dy, x, mean, rstd -> grad_sums -> dbias_i, dscale_i -> sum over devices
               dy, x, mean, rstd, scale, dbias, dscale, count -> grad_input -> dx

Glossary (* marks an array of x's size, the others hold one number a feature):

    x* y*  input, output     mean var   statistics          x_hat*  (x - mean)*rstd
    dx* dy*  cotangents      rstd       1/sqrt(var + eps)   scale, bias   gamma, beta
    mask*  which examples are valid     count   how many    m2      count*var

Knows the stages by their signatures alone, so any backend can stand behind them. The statistics
that leave this file are differentiable too, by a rule of their own: JAX differentiates the small
merge over devices between the two rules, and so gets its transpose right in every parallel mode.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn import _stages


class Spec(NamedTuple):
    """What is static about one call."""

    axes: tuple[int, ...]  # the reduced axes
    stat_dtype: jnp.dtype  # T: of the statistics and of all arithmetic
    y_dtype: jnp.dtype
    axis_name: tuple[str, ...] = ()  # device axes that the statistics run over
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    devices: int = 1  # how many share one mean
    stages: _stages.Stages = _stages.XLA


def batch_norm(spec: Spec, x, mask, scale, bias, epsilon):
    """y, count, mean, var. :: [N, C], mask, [1, C], [1, C], float -> [N, C], [1, C] three times"""
    count, mean, m2 = _moments(spec, x, mask)
    count, mean, m2 = _merge_over_devices(spec, mask, lax.stop_gradient(count), mean, m2)
    var = m2 / jnp.maximum(count, 1)
    # A feature with nothing valid has no x_hat; rstd = 0 makes it 0, so that y = bias and dx = 0.
    rstd = jnp.where(count > 0, lax.rsqrt(var + epsilon), 0).astype(spec.stat_dtype)
    y = _normalize(spec, x, mask, count, mean, rstd, scale, bias)
    return y, count, mean, var


# ---- the rule of y --------------------------------------------------------------------------------
#
# `mean` and `rstd` are arguments of `_normalize` and functions of `x` at once. The rule answers for
# both ways in which x reaches y: its dx is the derivative of the whole batch normalization, and the
# cotangents of `mean` and `rstd` are None, since nothing is left for them. (They stay differentiable
# as residuals: that is how a second derivative, which differentiates this rule, sees them move.)
#
# The derivation, for one feature; x, y, ... are columns of length N, 1 is the column of ones.
#
#     y = scale*x_hat + bias                    so  dbias  = 1^T dy = sum(dy)                      (D4)
#                                                   dscale = x_hat^T dy = sum(dy*x_hat)            (D5)
#                                                   dx_hat = scale*dy                              (D6)
#     t = (I - 11^T/N) x                        centring: symmetric, so  dx = (I - 11^T/N) dt      (D9)
#     x_hat = g(t) t,  g(t) = (t^T t/N + eps)^(-1/2) = rstd
#         grad g = -(1/N) rstd^3 t = -(1/N) rstd^2 x_hat                                           (D8)
#         dt = (grad g t^T + g I) dx_hat                        product rule, g a scalar           (D7)
#            = rstd (I - x_hat x_hat^T/N) dx_hat
#     dx = rstd (I - 11^T/N) (I - x_hat x_hat^T/N) dx_hat                                         (D10)
#        = rstd (I - 11^T/N - x_hat x_hat^T/N) dx_hat           since 1^T x_hat = 0               (D11)
#        = (scale*rstd/N) (N dy - 1 dbias - x_hat dscale)       put dx_hat = scale*dy in          (D12)
#
# With a mask or over several devices N is `count`, the number of valid examples on all devices, and
# both sums run over these (D15). With complex x the same steps, in JAX's convention (no conjugate in
# the cotangent of a product), give conj(x_hat) Re(scale*dscale) for the last term.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(spec, x, mask, count, mean, rstd, scale, bias):
    del mask, count  # for the backward pass
    return spec.stages.normalize(x, mean, rstd, scale, bias, dtype=spec.y_dtype)


def _normalize_fwd(spec, x, mask, count, mean, rstd, scale, bias):
    y = _normalize(spec, x, mask, count, mean, rstd, scale, bias)
    return y, (x, mask, count, mean, rstd, scale, bias)


def _normalize_bwd(spec, residuals, dy):
    x, mask, count, mean, rstd, scale, bias = residuals
    local = spec.stages.grad_sums(dy, x, mask, mean, rstd, axes=spec.axes)
    dbias, dscale = total = _psum(spec, local)
    dx = spec.stages.grad_input(dy, x, mask, mean, rstd, scale, dbias, dscale, count)
    dbias, dscale = (
        None if primal is None else _cotangent_of(primal, here, everywhere, spec.axis_name)
        for primal, here, everywhere in zip((bias, scale), local, total, strict=True)
    )
    return _cotangent_of(x, dx), None, None, None, None, dscale, dbias


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


# ---- the rule of the statistics -------------------------------------------------------------------
#
#     mean = sum(x)/N,  m2 = sum((x - mean)^2)  so  dx = dmean/N + dm2*2*(x - mean)                (D13)
#
# (dm2 = dvar/N; the derivative of m2 through the mean is -2 sum(x - mean) = 0.)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moments(spec, x, mask):
    return spec.stages.moments(x, mask, axes=spec.axes, dtype=spec.stat_dtype)


def _moments_fwd(spec, x, mask):
    count, mean, m2 = _moments(spec, x, mask)
    return (count, mean, m2), (x, mask, count, mean)


def _moments_bwd(spec, residuals, cotangents):
    del spec
    x, mask, count, mean = residuals
    _, dmean, dm2 = cotangents
    dtype = mean.dtype
    n = jnp.maximum(count, 1).astype(dtype)
    dx = dmean / n + dm2.astype(dtype) * 2 * jnp.conj(x.astype(dtype) - mean)
    return (dx if mask is None else jnp.where(mask, dx, 0)).astype(x.dtype), None


_moments.defvjp(_moments_fwd, _moments_bwd)


# ---- several devices ------------------------------------------------------------------------------


def _merge_over_devices(spec: Spec, mask, count, mean, m2):
    """Local to global count, mean, m2: each device's weighed by its count (Chan, Golub, LeVeque).

    Two sums, because the second needs the mean that the first gives. One would do with sums of x^2,
    and would lose all digits where a device's mean is far from the others'.
    """
    if not spec.axis_name:
        return count, mean, m2
    if mask is None:  # every device holds as many examples as this one: no need to ask
        total, sums = count * spec.devices, _psum(spec, count.astype(mean.dtype) * mean)
    else:
        total, sums = _psum(spec, (count, count.astype(mean.dtype) * mean))
    center = sums / jnp.maximum(total, 1).astype(mean.dtype)
    apart = mean - center
    return total, center, _psum(spec, m2 + count * jnp.real(apart * jnp.conj(apart)))


def _psum(spec: Spec, tree):
    if not spec.axis_name:
        return tree
    return lax.psum(tree, spec.axis_name, axis_index_groups=spec.axis_index_groups)


def _cotangent_of(primal, here, everywhere=None, axis_name=()):
    """The cotangent `here`, summed over the device axes along which it varies and `primal` does not.

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
