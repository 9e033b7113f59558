"""Batch renormalization: `batch_norm` with a scale and a bias that lead to the running averages.

y = scale*(x_hat*r + d) + bias = (scale*r)*x_hat + (scale*d + bias). r and d, one number a feature,
are constants to differentiation, so the rule is that of `batch_norm`.
"""

from collections.abc import Callable, Sequence
from functools import partial
import operator

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
import numpy as np

from jax_bn import _arguments, _residuals, _training
from jax_bn._statistics import BatchStats

Bound = ArrayLike | Callable[[jax.Array], ArrayLike]  # a number, or one for each step


def batch_renorm(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    residual: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    forward_mode: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, BatchStats]:
    """Batch normalization whose result is that of evaluation, within bounds; closed-form backward.

    With mean_B and var_B of the batch, x_hat of `batch_norm`, and mean and var as given::

        std = sqrt(var + epsilon)        std_B = sqrt(var_B + epsilon)
        r = clip(std_B/std, 1/r_max, r_max)      d = clip((mean_B - mean)/std, -d_max, d_max)
        y = activation(scale*(x_hat*r + d) + bias + residual)

    Where neither bound is reached that is `normalize(x, mean, var, scale, bias)`, so training sees
    what evaluation will. But r and d are constants to differentiation: gradients are those of
    `batch_norm` with the scale scale*r, and dscale = sum(dz*(x_hat*r + d)).

    Args:
        mean, var: shape of the feature axes; usually the running averages before this batch. var is
            real.
        r_max: at least 1, how far the standard deviations may be apart; `math.inf` for no bound.
        d_max: at least 0, how far the means may be apart, in std; `math.inf` for no bound. Both are
            real numbers and may be traced: unlike those known while tracing these are not checked.
        x, scale, bias, and all others: as in `batch_norm`. In a virtual batch r and d are its own,
            over mapped axes they are those of the whole batch.

    Returns:
        `(y, stats)` as `batch_norm`: the statistics of the batch, for `update_running_stats`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `batch_norm` and `normalize`, and for an
            `r_max` or `d_max` that is out of range or no real number.

    With r_max = 1 and d_max = 0 it is `batch_norm`. One example a feature gives x_hat = 0, so
    y = scale*d + bias and dx = 0; a feature with no valid example r = 1 and d = 0, so y = bias. For
    complex x d_max bounds |d|.

    Precision: as `batch_norm`, with T the widest dtype of `mean` and `var` too.

    Differentiable in x, scale, bias and residual, in the modes of `batch_norm` and to any order. No
    gradient reaches mean, var, r_max and d_max. Kept between forward and backward: what
    `batch_norm` keeps, and r and d; no further sweep over x.

    Sharding: as `batch_norm`, with no further communication.

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1. It averages standard deviations where
    `update_running_stats` averages variances. Theirs is the smaller by about half the squared
    relative spread of the standard deviation between batches. Ours keeps the variables those of
    batch normalization, to start from either's checkpoint and go on with the other, as in CrossQ
    (Bhatt and others 2024), and is exact where batches are merged.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_bn
        >>> x, mean, var = jnp.array([[1.0], [5.0]]), jnp.array([2.0]), jnp.array([1.0])
        >>> y, stats = jax_bn.batch_renorm(x, mean, var, epsilon=0.0)
        >>> y[:, 0].tolist(), jax_bn.normalize(x, mean, var, epsilon=0.0)[:, 0].tolist()
        ([-1.0, 3.0], [-1.0, 3.0])
        >>> y, _ = jax_bn.batch_renorm(x, mean, var, r_max=1.5, d_max=0.25, epsilon=0.0)
        >>> y[:, 0].tolist()  # x_hat is -1 and 1
        [-1.25, 1.75]
    """
    corrected = partial(
        _corrected,
        r_max=_bound("r_max", r_max, 1),
        d_max=_bound("d_max", d_max, 0),
        epsilon=_arguments.static_epsilon(epsilon),
    )
    return _training.in_training(
        x,
        scale,
        bias,
        running=(mean, var),
        affine=corrected,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        residual=residual,
        activation=activation,
        dtype=dtype,
        forward_mode=forward_mode,
        implementation=implementation,
    )


def one_step(
    steps: jax.Array, r_max: Bound, d_max: Bound, warmup_steps: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The number of steps after this one, and the bounds in it, as `batch_renorm` takes them.

    `steps` went before. In the first `warmup_steps` the bounds are 1 and 0, those of `batch_norm`;
    from then on r_max and d_max, or what they are of `steps` if they are functions.
    """
    try:
        warmup = operator.index(warmup_steps)
    except TypeError as e:
        raise TypeError(f"warmup_steps={warmup_steps!r}; expected an int") from e
    if not 0 <= warmup < 2**31:
        raise ValueError(f"warmup_steps={warmup}; expected an int from 0, no warm-up, to 2**31 - 1")

    def at(name, bound, least):
        bound = _bound(name, bound(steps) if callable(bound) else bound, least)
        return jnp.where(steps < warmup, least, bound)

    bounds = {"r_max": at("r_max", r_max, 1), "d_max": at("d_max", d_max, 0)}
    return jnp.minimum(steps, jnp.iinfo(steps.dtype).max - 1) + 1, bounds


def _bound(name: str, value, least: int) -> jax.Array | np.ndarray:
    """`value`, a real scalar; at least `least`, if that is known while tracing."""
    kind = "one real number, or in a layer a schedule of such: a function of the step"
    v = _arguments.real_scalar(name, value, kind)
    if not (isinstance(v, Tracer) or v >= least):
        raise ValueError(
            f"{name}={value}; expected a number >= {least}: {least} corrects nothing, math.inf is "
            "no bound"
        )
    return v


def _corrected(scale, bias, stats: BatchStats, mean, var, *, r_max, d_max, epsilon):
    """What x_hat is multiplied by, scale*r, and what is added, scale*d + bias. :: [1, C] each"""
    real, T = stats.var.dtype, stats.mean.dtype
    r_max, d_max = jnp.asarray(r_max, real), jnp.asarray(d_max, real)
    std = jnp.sqrt(var.astype(real) + epsilon)
    r = jnp.clip(jnp.sqrt(stats.var + epsilon) / std, 1 / r_max, r_max)
    d = _within((stats.mean - mean.astype(T)) / std.astype(T), d_max)
    # Of no valid example nothing is known to correct: x_hat is 0, and so y = bias.
    r, d = jnp.where(stats.count > 0, r, 1).astype(T), jnp.where(stats.count > 0, d, 0)
    r, d = _residuals.named_statistics(lax.stop_gradient((r, d)))
    if scale is not None:
        r, d = scale * r, scale * d
    return r, d if bias is None else d + bias


def _within(d, most):
    """d, shrunk to |d| <= most."""
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -most, most)
    size = jnp.abs(d)
    far = size > most
    return d * jnp.where(far, most / jnp.where(far, size, 1), 1).astype(d.dtype)
