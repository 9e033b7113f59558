"""The Flax Linen layer: fields, variables, one call. The arithmetic is in `batch_norm`."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp

from jax_bn import _arguments
from jax_bn._batch_norm import batch_norm, normalize
from jax_bn._shapes import feature_axes, flax_mask
from jax_bn._statistics import count_batch, update_running_stats


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` with the closed-form backward pass: change the import alone.

    y = scale * (x - mean)/sqrt(var + epsilon) + bias, with the batch's mean and variance in
    training and their running averages in evaluation; see `jax_bn.batch_norm` for precision,
    gradients and sharding, `jax_bn.update_running_stats` for the averages. Fields, variables
    and dtypes are Flax's, and so are checkpoints.

    What differs: the variance is stable whatever `use_fast_variance` says; statistics are in
    float32 at least even with `force_float32_reductions=False`, which then only sets the dtype of
    the variables; these keep their dtype, where Flax widens them in the first step (for float64
    averages set `param_dtype` to it as well); a mask and unequal devices are weighed by count, a
    feature that a mask hides wholly leaves its running averages as they are, and masked positions
    carry no gradient; complex x with a real `dtype`, and training on no examples, are errors.

    Attributes:
        use_running_average: evaluation if True; here or in the call, not both.
        axis: feature axis or axes.
        momentum: weight of the old running average. None, not in Flax: the averages are the plain
            means of all batches so far, counted in `num_batches_tracked`; a feature that a mask
            hides keeps its averages, but its batch counts unless it is hidden wholly.
        epsilon: added to the variance.
        dtype: of y; None for the widest of x, scale and bias.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init: their initializers.
        axis_name, axis_index_groups: mapped axes to take statistics over; ignored while
            initializing, when they need not exist.
        use_fast_variance: accepted for Flax's sake; both values give the same stable variance.
        force_float32_reductions: dtype of the running averages: float32, or `param_dtype` if False.
        virtual_batch_size: examples that share statistics in training, None for all; keyword only,
            not in Flax; ignored while initializing.
        activation: elementwise, applied to the result (to its sum with the `residual` of the call):
            in the same sweep; see `jax_bn.batch_norm` for what is kept; keyword only, not in Flax.
        forward_mode: whether `jax.jvp` and `jax.jacfwd` must pass through the layer in training, as
            in `jax_bn.batch_norm`; keyword only, not in Flax.
        implementation: what runs in training, as in `jax_bn.batch_norm`; evaluation is XLA's, and
            so is initializing; keyword only, not in Flax.
        unbiased: whether the running variance averages count/(count - 1) times the batch's, as in
            PyTorch; training on one example is then an error; keyword only, not in Flax.
        freeze_statistics: normalize with the running averages, and leave them as they are, in
            training too, whatever `use_running_average` says; gradients of x, scale and bias go on.
            (To normalize with the batch and leave the averages: momentum=1.0.) Keyword only, not in
            Flax.
        freeze_affine: no gradient reaches scale and bias: theirs is 0, which an optimizer may still
            answer with weight decay; statistics go on. Keyword only, not in Flax.

    Variables: collection `batch_stats` with `mean` and `var`, params `scale` and `bias`, each of
    the shape of the feature axes; with `momentum=None` also `num_batches_tracked` in `batch_stats`,
    one int32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_bn.linen import BatchNorm
        >>> layer = BatchNorm(momentum=0.9)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable="batch_stats")
        >>> y.round(3)[:, 0].tolist(), updated["batch_stats"]["mean"]
        ([-1.0, 1.0], Array([0.2], dtype=float32))
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    virtual_batch_size: int | None = dataclasses.field(default=None, kw_only=True)
    activation: Callable[[jax.Array], jax.Array] | None = dataclasses.field(
        default=None, kw_only=True
    )
    forward_mode: bool = dataclasses.field(default=False, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    unbiased: bool = dataclasses.field(default=False, kw_only=True)
    freeze_statistics: bool = dataclasses.field(default=False, kw_only=True)
    freeze_affine: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: jax.typing.ArrayLike | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x; in training also updates the running averages.

        Args:
            x: any rank from 1 up.
            use_running_average: as the field; given in exactly one of the two places.
            mask: which examples count in training, 0/1 of any dtype; broadcasts to x as in Flax, or
                else to its batch axes; see `jax_bn.batch_norm`.
            residual: of x's shape, added before the activation; not in Flax.

        Returns:
            y, of x's shape.
        """
        return batch_normalized(self, self, x, use_running_average, mask=mask, residual=residual)

    @nn.nowrap
    def _in_training(self, mean: nn.Variable, var: nn.Variable, training: bool) -> Callable:
        """What normalizes in training, with the variables that it takes beside mean and var."""
        del mean, var, training
        return batch_norm


def batch_normalized(
    layer: Any,
    own: BatchNorm,
    x: jax.typing.ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: jax.typing.ArrayLike | None = None,
    residual: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The call of `layer`, which may be Flax's: fields that this has not are those of `own`."""
    use_running_average = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    frozen = _arguments.flag("freeze_statistics", own.freeze_statistics)
    training = not (_arguments.flag("use_running_average", use_running_average) or frozen)
    if isinstance(own.activation, nn.Module):
        raise TypeError(
            f"activation={own.activation} is a module; expected a function without "
            "parameters: apply the module to the result of this layer"
        )
    x = _arguments.array("x", x)
    dtype = _arguments.inexact_dtype("dtype", layer.dtype)
    param_dtype = _arguments.inexact_dtype("param_dtype", layer.param_dtype)
    shape = tuple(x.shape[a] for a in feature_axes(layer.axis, x.ndim))
    stat_dtype = jnp.float32 if layer.force_float32_reductions else param_dtype
    mean = layer.variable("batch_stats", "mean", jnp.zeros, shape, stat_dtype)
    var = layer.variable("batch_stats", "var", jnp.ones, shape, stat_dtype)
    batches = (
        layer.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        if layer.momentum is None
        else None
    )
    in_training = own._in_training(mean, var, training)

    def param(name):
        if not _arguments.flag(f"use_{name}", getattr(layer, f"use_{name}")):
            return None
        init = _arguments.function(f"{name}_init", getattr(layer, f"{name}_init"))
        return layer.param(name, init, shape, param_dtype)

    scale, bias = param("scale"), param("bias")
    if _arguments.flag("freeze_affine", own.freeze_affine):
        scale, bias = jax.lax.stop_gradient((scale, bias))
    common: dict[str, Any] = dict(
        axis=layer.axis,
        epsilon=layer.epsilon,
        residual=residual,
        activation=own.activation,
        dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype),
    )
    if not training:
        return normalize(x, mean.value, var.value, scale, bias, **common)
    initializing = layer.is_initializing()
    y, stats = in_training(
        x,
        scale=scale,
        bias=bias,
        mask=None if mask is None else flax_mask(_arguments.array("mask", mask), x.shape),
        axis_name=None if initializing else layer.axis_name,
        axis_index_groups=None if initializing else layer.axis_index_groups,
        virtual_batch_size=None if initializing else own.virtual_batch_size,
        forward_mode=own.forward_mode,
        implementation="xla" if initializing else own.implementation,
        **common,
    )
    if not initializing:
        momentum: Any = layer.momentum
        if batches is not None:
            batches.value, momentum = count_batch(batches.value, stats)
        mean.value, var.value = update_running_stats(
            mean.value, var.value, stats, momentum=momentum, unbiased=own.unbiased
        )
    return y
