"""The Flax Linen layer: `BatchNorm` with bounds. The arithmetic is in `batch_renorm`."""

from collections.abc import Callable
import dataclasses
from functools import partial

from flax import linen as nn
import jax.numpy as jnp

from jax_bn._batch_renorm import Bound, batch_renorm, one_step
from jax_bn.linen._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Batch renormalization: training normalizes as evaluation will, within bounds.

    y = scale * (x_hat*r + d) + bias, with x_hat of the batch, and r and d that lead from there to
    the running averages; see `jax_bn.batch_renorm` for the formula, precision, gradients and
    sharding, and for how it differs from the paper. Evaluation is that of `BatchNorm`.

    Attributes:
        r_max: bound of the ratio of standard deviations, at least 1; a number, or a function of the
            number of training steps before this one (an int32, traced), such as an optax schedule.
        d_max: bound of the distance of means, at least 0; likewise. What a schedule gives is not
            checked.
        warmup_steps: in so many first steps r = 1 and d = 0: plain batch normalization, until there
            are averages to lead to. The paper has 5000, and lets the bounds grow from there; CrossQ
            has 100000.
        All others are those of `BatchNorm`, in training too.

    Variables: those of `BatchNorm`, and in `batch_stats` also `steps`, int32: how many calls have
    updated the averages. Variables of a `BatchNorm`, which have none, are taken as those of a layer
    that has not warmed up.

    Source: Ioffe 2017, "Batch Renormalization".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_bn.linen import BatchRenorm
        >>> layer = BatchRenorm(warmup_steps=1, momentum=0.5, epsilon=0.0)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> for _ in range(2):
        ...     y, updated = layer.apply(
        ...         variables, x, use_running_average=False, mutable="batch_stats")
        ...     variables |= updated
        ...     print(y[:, 0].tolist())
        [-1.0, 1.0]
        [0.0, 2.0]
    """

    r_max: Bound = dataclasses.field(default=3.0, kw_only=True)
    d_max: Bound = dataclasses.field(default=5.0, kw_only=True)
    warmup_steps: int = dataclasses.field(default=5000, kw_only=True)

    @nn.nowrap
    def _in_training(self, mean: nn.Variable, var: nn.Variable, training: bool) -> Callable:
        plain = super()._in_training(mean, var, training)
        if not (training or self.is_initializing()):
            return plain
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        if self.is_initializing():
            return plain
        steps.value, bounds = one_step(steps.value, self.r_max, self.d_max, self.warmup_steps)
        return partial(batch_renorm, mean=mean.value, var=var.value, **bounds)
