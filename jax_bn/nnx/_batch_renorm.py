"""The Flax NNX layer: `BatchNorm` with bounds. The arithmetic is in `batch_renorm`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jax_bn._batch_renorm import Bound, batch_renorm, one_step
from jax_bn.nnx._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Batch renormalization: training normalizes as evaluation will, within bounds.

    y = scale * (x_hat*r + d) + bias, with x_hat of the batch, and r and d that lead from there to
    the running averages; see `jax_bn.batch_renorm` for the formula, precision, gradients and
    sharding, and for how it differs from the paper. Evaluation is that of `BatchNorm`.

    Args:
        num_features: length of the feature axis.
        r_max: bound of the ratio of standard deviations, at least 1; a number, or a function of the
            number of training steps before this one (an int32, traced), such as an optax schedule.
        d_max: bound of the distance of means, at least 0; likewise. What a schedule gives is not
            checked.
        warmup_steps: in so many first steps r = 1 and d = 0: plain batch normalization, until there
            are averages to lead to. The paper has 5000, and lets the bounds grow from there; CrossQ
            has 100000.
        rngs, and all others: as in `BatchNorm`.

    Variables: those of `BatchNorm`, and `steps` (`nnx.BatchStat`, int32): how many calls have
    updated the averages.

    Source: Ioffe 2017, "Batch Renormalization".

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_bn.nnx import BatchRenorm
        >>> layer = BatchRenorm(1, warmup_steps=1, momentum=0.5, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[1.0], [3.0]])
        >>> layer(x)[:, 0].tolist(), layer(x)[:, 0].tolist()
        ([-1.0, 1.0], [0.0, 2.0])
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Bound = 3.0,
        d_max: Bound = 5.0,
        warmup_steps: int = 5000,
        rngs: nnx.Rngs,
        **fields: Any,
    ):
        super().__init__(num_features, rngs=rngs, **fields)
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps

    def _in_training(self, mean: jax.Array, var: jax.Array) -> Callable:
        self.steps[...], bounds = one_step(
            self.steps[...], self.r_max, self.d_max, self.warmup_steps
        )
        return partial(batch_renorm, mean=mean, var=var, **bounds)
