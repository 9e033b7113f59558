"""The closed form of the backward pass, as the rule of a `jax.custom_vjp`, and its derivation.

The way of the data, on each device (a single one: the sums over devices are then nothing):

    forward    x -> moments -> count, mean, m2 here -> merge over devices -> count, mean, var, rstd
               x, mean, rstd, scale, bias, residual -> normalize -> y
    backward   dy, kept -> grad_sums -> dbias, dscale here -> sum over devices -> sums
               dy, kept, sums -> grad_input -> dx, dz

Where a backend has a line of `_stages` as one function, and nothing is summed over devices, that
runs in the place of the two stages; its y and statistics are constants, and the same rules say how
they move with x.

Glossary (* marks an array of x's size, the others hold one number a feature):

    x* y*  input, output     mean var   statistics          x_hat*  (x - mean)*rstd
    dx* dy*  cotangents      rstd       1/sqrt(var + eps)   scale, bias   gamma, beta
    mask*  which examples are valid     count   how many    m2      count*var
    residual*  added to the result      z*  y before its activation     kept  `_stages.Kept`

Knows the stages by their signatures, so that any backend can stand behind them. Tangents, those of
the statistics too, are in `_jvp`. The merge over devices is plain code between the rules: JAX
differentiates it, and so gets its transpose right in every parallel mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jax_bn import _activations, _devices, _jvp, _residuals, _stages, _statistics
from jax_bn._jvp import Spec
from jax_bn._stages import Kept

# `Any`, because type checkers lose a function's type behind `partial`. The Spec is static.
_with_vjp: Any = partial(jax.custom_vjp, nondiff_argnums=(0,))


def batch_norm(spec: Spec, x, mask, affine: tuple | Callable, residual, epsilon):
    """All of it. :: x[N, C], affine -> y[N, C]; count, mean, var [1, C].

    affine: scale[1, C] and bias[1, C], or plain code, as the merge is, that makes them.
    :: count, mean, var -> scale, bias
    """
    # A masked x differs between devices as its mask does; a residual's cotangent as y does.
    x = _devices.varying_as(x, mask)
    x = _residuals.named_x(x)
    if spec.stages.forward is None or not _in_one(spec, mask) or callable(affine):
        y, (count, mean, var, rstd) = None, _merged_statistics(spec, x, mask, epsilon)
        scale, bias = affine(count, mean, var) if callable(affine) else affine
    else:
        scale, bias = affine
        y, count, mean, var, rstd = _jvp.forward(spec, x, scale, bias, residual, epsilon)
    # A rule's cotangents lie as its arguments do, and what it computes lies as x does.
    scale, bias = (_devices.placed_as(v, x) for v in (scale, bias))
    residual = _devices.placed_as(residual, x)
    residual = None if residual is None else _devices.varying_as(residual, x, scale, bias)
    rule = _jvp.normalize if spec.forward_mode else _normalize
    n, m, r = _residuals.named_statistics(lax.stop_gradient((count, mean, rstd)))
    y = rule(spec, Kept(x, mask, n, m, r, scale, bias, residual, y))
    return y, count, mean, var


def _in_one(spec, mask) -> bool:
    """Whether nothing has to happen within a pass: then a backend may have it as one function."""
    return mask is None and not spec.axis_name


def _merged_statistics(spec, x, mask, epsilon):
    """count, mean, var and rstd of all devices' examples."""
    count, shift, offset, m2 = _jvp.moments(spec, x, mask)
    count, shift = lax.stop_gradient((count, shift))
    if spec.axis_name:
        total = partial(_devices.psum, spec)
        count, shift, offset, m2 = _statistics.merge_moments(count, shift, offset, m2, total)
    return count, *_stages.statistics(count, shift, offset, m2, epsilon)


# ---- the rules of y ------------------------------------------------------------------------------
#
# `mean` and `rstd` are arguments of y's rules and functions of x at once. The rules answer for all
# ways in which x reaches y: the tangent and dx are those of the whole batch normalization, and
# `mean` and `rstd` come in as constants. Only a second derivative, which differentiates a rule, has
# to see them move with x, as they stand in it: that is `_jvp.moving`.
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
def _normalize(spec, args: Kept):
    return _jvp.normalize(spec, args)


def _normalize_fwd(spec, args):
    # Both have tangents of their own, for higher derivatives that differentiate these lines.
    args = _jvp.moving(spec, args)
    y = _jvp.normalize(spec, args)
    residual = args.residual
    like = None if residual is None else jnp.zeros((), residual.dtype)
    return y, (args._replace(**_beside_x(spec.activation, residual, y)), like)


def _beside_x(activation, residual, y):
    """What of x's size, x apart, is kept. y is there anyway: the next layer keeps it."""
    if activation is None or residual is None:
        return dict(residual=None, y=None)
    if _activations.sides(activation) is None:
        return dict(residual=residual, y=None)
    return dict(residual=None, y=y)


def _normalize_bwd(spec, residuals, dy):
    kept, like = residuals
    stages, options = spec.stages, dict(activation=spec.activation, dtype=kept.x.dtype)
    if stages.backward is None or not _in_one(spec, kept.mask):
        here = stages.grad_sums(dy, kept, activation=spec.activation, axes=spec.axes)
        everywhere, sums = _devices.psum(spec, (here, _stages.scaled(here, kept)))
        dx, dz = stages.grad_input(dy, kept, sums, **options)
    else:
        here, dx, dz = stages.backward(dy, kept, axes=spec.axes, **options)
        everywhere = here
    dbias, dscale = (
        None if primal is None else _devices.cotangent_of(primal, local, total, spec.axis_name)
        for primal, local, total in zip((kept.bias, kept.scale), here, everywhere, strict=True)
    )
    dresidual = None if like is None else _real_if(like, dz).astype(like.dtype)
    dx = _devices.cotangent_of(kept.x, dx)
    cotangents = Kept(dx, None, None, None, None, dscale, dbias, dresidual)
    return (cotangents,)


def _real_if(like, v):
    """The cotangent of a real array that was added to a complex one."""
    return v if jnp.iscomplexobj(like) else jnp.real(v)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)
