"""How large the terms are that the results of the property-based tests are sums of.

In float64, and bounds: what the tolerance needs where terms cancel.
"""

from typing import Any, NamedTuple

from cases import KINKED, Case, Numbers, Params, aligned
import numpy as np


class Results(NamedTuple):
    """Or, in the same places, how large the terms of each are."""

    y: Any
    mean: Any
    var: Any
    first: Any
    second: Any


class Facts(NamedTuple):
    """Of the numbers, in float64. :: valid[N, C], the others [1, C]"""

    valid: Any
    count: Any
    mean: Any
    rstd: Any


def facts(case: Case, numbers: Numbers) -> Facts:
    x, valid = wide(numbers.params.x), np.ones(case.shape, bool)
    if numbers.mask is not None:
        valid = np.broadcast_to(np.asarray(aligned(case, numbers.mask)), case.shape)

    def total(v):
        return np.sum(v, case.reduced, keepdims=True, where=valid)

    count = total(np.ones(case.shape))
    n = np.maximum(count, 1)
    mean = total(x) / n
    var = total(np.abs(x - mean) ** 2) / n
    with np.errstate(divide="ignore"):  # inf, without variance and epsilon
        rstd = np.where(count > 1, 1 / np.sqrt(var + case.epsilon), 0)
    return Facts(valid, count, mean, rstd)


class _Sizes(NamedTuple):
    """The largest of each feature, [1, C], or above it."""

    x: Any
    vx: Any  # v: of the direction, that is of a derivative along it
    scale: Any
    vscale: Any
    h: Any  # x_hat
    vx_hat: Any
    c: Any  # by how many eps x_hat errs: the rounding of the mean beside the std, and that of rstd
    z: Any
    vz: Any
    n: Any
    rstd: Any
    growth: Any  # of the activation's derivatives


def _sizes(case: Case, numbers: Numbers) -> _Sizes:
    valid, n, mean, r = facts(case, numbers)
    params, direction = (
        Params(*(None if v is None else wide(v) for v in p))
        for p in (numbers.params, numbers.direction)
    )

    def largest(v):
        if v is None:
            return 0.0
        return np.max(np.abs(v), case.reduced, keepdims=True, where=valid, initial=0)

    def feature(v, otherwise=0.0):
        return otherwise if v is None else np.abs(np.expand_dims(v, case.reduced))

    x, vx = largest(params.x), largest(direction.x)
    scale, vscale = feature(params.scale, 1.0), feature(direction.scale)
    h = largest(params.x - mean) * r
    # of rstd the bound that `batch_norm` gives for the variance, whichever example k is
    c = 1 + r * x + h * (1 + h**2)
    vx_hat = r * vx * (1 + h**2)
    z = scale * c + feature(params.bias) + largest(params.residual)
    vz = scale * vx_hat + vscale * c + feature(direction.bias) + largest(direction.residual)
    # sin and its derivatives grow off the real axis
    growth = np.cosh(np.minimum(z, 20)) if case.complex and case.activation else 1.0
    return _Sizes(x, vx, scale, vscale, h, vx_hat, c, z, vz, np.maximum(n, 1), r, growth)


def sizes(case: Case, numbers: Numbers) -> Results:
    """How large, at most, the terms are that each result is a sum of, for each feature.

    They may cancel: with two examples a feature dx is next to nothing, and what is left of it is
    their rounding.
    """
    of = _sizes(case, numbers)
    dy, dmean, dvar = numbers.cotangent
    dy = np.max(
        np.abs(dy), case.reduced, keepdims=True, where=facts(case, numbers).valid, initial=0
    )
    dmean, dvar = (np.abs(np.expand_dims(v, case.reduced)) for v in (dmean, dvar))
    smooth = case.activation is not None and case.activation not in KINKED
    dz = of.growth * dy * (1 + of.z if smooth else 1)
    vdz = dz * of.vz if smooth else 0 * dz
    to_x = of.rstd * of.c * (1 + of.h)
    vdx = of.vscale * dz + of.scale * (vdz + of.vx_hat * dz)
    return Results(
        y=of.z * of.growth,
        mean=of.x,
        var=of.x**2,
        first=Params(
            x=of.scale * dz * to_x + (dmean + 2 * dvar * of.x) / of.n,
            scale=of.n * dz * of.c,
            bias=of.n * dz,
            residual=dz,
        ),
        second=Params(
            x=vdx * to_x + 4 * dvar * of.vx / of.n,
            scale=of.n * (vdz + of.vx_hat * dz) * of.c,
            bias=of.n * vdz,
            residual=vdz,
        ),
    )


def tangent_sizes(case: Case, numbers: Numbers):
    """The same of y's, the mean's and the variance's derivative along the direction."""
    of = _sizes(case, numbers)
    return of.growth * of.vz * of.c * (1 + of.z), of.vx, 2 * of.x * of.vx


def wide(v):
    return np.asarray(v, np.complex128 if np.iscomplexobj(v) else np.float64)
