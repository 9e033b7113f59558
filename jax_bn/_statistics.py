"""Batch statistics as values: what `batch_norm` returns, and the running averages made of them.

Small arrays only, differentiated by JAX as they are written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class BatchStats(NamedTuple):
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


def update_running_stats(
    mean: jax.Array,
    var: jax.Array,
    stats: BatchStats,
    *,
    momentum: float = 0.99,
    unbiased: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Running averages of the mean and the variance after one more batch.

    new = momentum*old + (1 - momentum)*batch, for the mean and for the variance, which is
    count/(count - 1) times `stats.var` if `unbiased`. A feature with count 0 keeps its old values.

    Args:
        mean, var: the running averages, shape of the feature axes. Their dtypes are kept, but for a
            complex batch mean, which makes the running mean complex.
        stats: of the batch, from `batch_norm`.
        momentum: the weight of the old value, in [0, 1]. PyTorch's is the weight of the new one:
            its 0.1 is 0.9 here. Flax, Keras and Equinox count as here.
        unbiased: PyTorch's convention for the running variance; Flax averages the biased one.

    Returns:
        The new `(mean, var)`.

    Raises:
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
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}; expected a weight in [0, 1], that of the old value")
    for name, running, batch in (("mean", mean, stats.mean), ("var", var, stats.var)):
        if running.shape != batch.shape:
            raise ValueError(
                f"{name} has shape {running.shape}; expected {batch.shape}, the shape of stats.{name}"
            )
    count, batch_var, enough = stats.count, stats.var, 0
    if unbiased:
        if not isinstance(count, jax.core.Tracer) and bool(np.any(np.asarray(count) == 1)):
            raise ValueError(
                "unbiased=True with a batch of one example (count 1): count/(count - 1) is "
                "undefined. Use a larger batch, or unbiased=False"
            )
        batch_var, enough = batch_var * (count / jnp.maximum(count - 1, 1)), 1

    def update(old, new, known):
        with jax.numpy_dtype_promotion("standard"):  # asked for by name, so not implicit
            wide = jnp.promote_types(old.dtype, new.dtype)
        to = wide if jnp.iscomplexobj(new) else old.dtype
        averaged = momentum * old.astype(wide) + (1 - momentum) * new.astype(wide)
        return jnp.where(known, averaged.astype(to), old.astype(to))

    return update(mean, stats.mean, count > 0), update(var, batch_var, count > enough)
