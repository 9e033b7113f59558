"""Batch statistics as values: what `batch_norm` returns, how they merge, their running averages.

Small arrays only, differentiated by JAX as they are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from jax_bn import _arguments, _devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchStats:
    """The statistics of one batch, one number a feature; a pytree.

    Attributes:
        mean: sum(x)/count, in float32 or x's wider dtype (complex for complex x).
        var: sum |x - mean|^2 / count, biased, real.
        count: how many valid examples of the feature the batch held, as a real number. 0 where a
            mask hides all of them: mean and var are then 0.

    `mean` and `var` are differentiable to any order.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array | np.ndarray


def merge_stats(*stats: BatchStats) -> BatchStats:
    """The statistics of several batches taken as one.

    count = sum count_i, mean = sum count_i*mean_i / count,
    var = sum count_i*(var_i + |mean_i - mean|^2) / count.

    With it the running averages of accumulated gradients see the whole batch: merge the statistics
    of the micro-batches, then call `update_running_stats` once. What it does not do is normalize
    each micro-batch with the statistics of all: for that x has to be there at once, or spread over
    devices (`axis_name`).

    Args:
        stats: one or more, all of the same shape. One with count 0 changes nothing, so zeros start
            an accumulation, in a `jax.lax.scan` too.

    Returns:
        A `BatchStats` of that shape; 0 throughout where all counts are 0.

    Raises:
        ValueError: none given, or shapes that differ.
        TypeError: something else than `BatchStats`.

    Differentiable to any order; elementwise. Computed in the dtype of `stats` from differences to
    the common mean, so batches with far means do not cancel: error a few ulps.

    Source: Chan, Golub and LeVeque 1983.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_bn
        >>> _, a = jax_bn.batch_norm(jnp.array([[1.0], [2.0], [3.0]]))
        >>> _, b = jax_bn.batch_norm(jnp.array([[6.0]]))
        >>> merged = jax_bn.merge_stats(a, b)
        >>> merged.mean.item(), merged.var.item(), merged.count.item()
        (3.0, 3.5, 4.0)
    """
    if not stats:
        raise ValueError("stats is empty: merge_stats got no statistics; expected a BatchStats")
    for s in stats:
        if not isinstance(s, BatchStats):
            raise TypeError(
                f"stats: merge_stats got a {type(s).__name__}; expected BatchStats: unpack lists"
            )
    shapes = [jnp.shape(v) for s in stats for v in (s.mean, s.var, s.count)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"mean, var and count of stats have shapes {shapes}; expected the same for all"
        )
    return merge_stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats))


def merge_stacked(stats: BatchStats) -> BatchStats:
    """`merge_stats` of statistics that are stacked along a leading axis. :: [G, ...] -> [...]"""
    total = partial(jax.tree.map, partial(jnp.sum, axis=0, keepdims=True))
    count = jnp.asarray(stats.count)
    m2 = count * stats.var
    count, center, offset, m2 = merge_moments(count, 0, stats.mean, m2, total)
    merged = BatchStats(center + offset, m2 / jnp.maximum(count, 1), count)
    return jax.tree.map(partial(jnp.squeeze, axis=0), merged)


def merge_moments(count, shift, offset, m2, total: Callable):
    """The moments of all parts together, in the form of `_stages.moments`.

    `total` sums a tree over the parts; twice, because what the second sum takes needs the mean that
    the first gives. One would do with sums of x^2, and would lose all digits where one part's mean
    is far from the others'.
    """
    weight = count.astype(offset.dtype)
    count, weighted = total((count, weight * (shift + offset)))
    n = jnp.maximum(count, 1)
    center = lax.stop_gradient(weighted / n.astype(offset.dtype))  # no result depends on it
    apart = (shift - center) + offset  # exact where the parts are close
    s, m2 = total((weight * apart, m2 + jnp.real(weight * apart * jnp.conj(apart))))
    offset = s / n.astype(offset.dtype)
    return count, center, offset, m2 - jnp.real(s * jnp.conj(offset))


def update_running_stats(
    mean: ArrayLike,
    var: ArrayLike,
    stats: BatchStats,
    *,
    momentum: float | jax.Array = 0.99,
    unbiased: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Running averages of the mean and the variance after one more batch.

    new = momentum*old + (1 - momentum)*batch, for the mean and for the variance, which is
    count/(count - 1) times `stats.var` if `unbiased`. A feature with count 0 keeps its old values.

    Args:
        mean, var: the running averages, shape of the feature axes. Their dtypes are kept, but for a
            complex batch mean, which makes the running mean complex.
        stats: of the batch, from `batch_norm`.
        momentum: the weight of the old value, in [0, 1]; may be traced. PyTorch's is the weight of
            the new one: its 0.1 is 0.9 here. Flax, Keras and Equinox count as here. With (n - 1)/n
            at the n-th batch the averages are the plain means of all batches: PyTorch's None.
        unbiased: PyTorch's convention for the running variance; Flax averages the biased one.

    Returns:
        The new `(mean, var)`.

    Raises:
        TypeError: running averages of integers; `stats` that are no `BatchStats`.
        ValueError: `momentum` outside [0, 1]; a shape that is not that of `stats`; `unbiased` with
            a count of 1, which leaves the unbiased variance undefined. A count that is only known
            when a compiled program runs cannot raise: that feature's running variance is kept.

    Differentiable to any order in `mean`, `var` and `stats`; elementwise, so it shards as they do.
    Computed in the wider dtype of the two; error a few ulps.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_bn
        >>> _, stats = jax_bn.batch_norm(jnp.array([[1.0], [3.0]]))
        >>> mean, var = jax_bn.update_running_stats(
        ...     jnp.zeros(1), jnp.ones(1), stats, momentum=0.5, unbiased=True)
        >>> mean.item(), var.item()
        (1.0, 1.5)
    """
    mean, var = _arguments.array("mean", mean), _arguments.array("var", var)
    if not isinstance(stats, BatchStats):
        raise TypeError(f"stats is a {type(stats).__name__}; expected the BatchStats of batch_norm")
    _arguments.real_scalar("momentum", momentum, "one weight in [0, 1], that of the old value")
    if not (isinstance(momentum, Tracer) or 0 <= momentum <= 1):
        raise ValueError(f"momentum={momentum}; expected a weight in [0, 1], that of the old value")
    for name, running, batch in (("mean", mean, stats.mean), ("var", var, stats.var)):
        if not jnp.issubdtype(running.dtype, jnp.inexact):
            raise TypeError(f"{name} has dtype {running.dtype}; expected a float or complex dtype")
        if running.shape != batch.shape:
            raise ValueError(
                f"{name} has shape {running.shape}; expected {batch.shape}, that of stats.{name}"
            )
    count, batch_var, enough = stats.count, stats.var, 0
    if _arguments.flag("unbiased", unbiased):
        if not isinstance(count, Tracer) and bool(np.any(np.asarray(count) == 1)):
            raise ValueError(
                "unbiased=True with a batch of one example (count 1): count/(count - 1) is "
                "undefined. Use a larger batch, or unbiased=False"
            )
        batch_var, enough = batch_var * (count / jnp.maximum(count - 1, 1)), 1

    # A number's complement is rounded as a Python float, as in Flax; an array's in its dtype.
    if isinstance(momentum, jax.Array):
        momentum = momentum.astype(jnp.finfo(stats.var.dtype).dtype)
    averaged = partial(_averaged, weight=momentum, of_new=1 - momentum)
    return averaged(mean, stats.mean, count > 0), averaged(var, batch_var, count > enough)


@jax.jit
def _averaged(old, new, known, *, weight, of_new) -> Any:
    """weight*old + of_new*new in the dtype of old; old where nothing is known."""
    new, known = (_devices.placed_as(v, old) for v in (new, known))
    with jax.numpy_dtype_promotion("standard"):  # asked for by name, so not implicit
        wide = jnp.promote_types(old.dtype, new.dtype)
    to = wide if jnp.iscomplexobj(new) else old.dtype
    averaged = weight * old.astype(wide) + of_new * new.astype(wide)
    return jnp.where(known, averaged.astype(to), old.astype(to))


def count_batch(num_batches: ArrayLike, stats: BatchStats) -> tuple[jax.Array, jax.Array]:
    """How many batches there have been with this one, n, and the momentum of their plain mean.

    mean_n = ((n - 1)*mean_{n-1} + batch)/n, so momentum = (n - 1)/n. A batch that a mask hides
    wholly does not count.
    """
    num_batches = jnp.asarray(num_batches)
    n = num_batches + jnp.any(stats.count > 0).astype(num_batches.dtype)
    weight = jnp.maximum(n, 1).astype(stats.var.dtype)
    return n, (weight - 1) / weight
