"""The Flax NNX layer: attributes, variables, one call. The arithmetic is in `batch_norm`."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer
import jax
import jax.numpy as jnp

from jax_bn import _arguments
from jax_bn._batch_norm import batch_norm, normalize
from jax_bn._shapes import feature_axes, flax_mask
from jax_bn._statistics import count_batch, update_running_stats


class BatchNorm(nnx.Module):
    """`flax.nnx.BatchNorm` with the closed-form backward pass: change the import alone.

    y = scale * (x - mean)/sqrt(var + epsilon) + bias, with the batch's mean and variance in
    training and their running averages in evaluation; see `jax_bn.batch_norm` for precision,
    gradients and sharding, `jax_bn.update_running_stats` for the averages. Attributes,
    variables and dtypes are Flax's, and so are checkpoints.

    What differs: the variance is stable whatever `use_fast_variance` says; statistics stay in
    float32 with `dtype=bfloat16`, in evaluation too; an integer mask is accepted; a mask and
    unequal devices are weighed by count, a feature that a mask hides wholly leaves its running
    averages as they are, and masked positions carry no gradient; training on no examples is an
    error.

    Args:
        num_features: length of the feature axis.
        use_running_average: evaluation if True; the value in the call wins.
        axis: feature axis.
        momentum: weight of the old running average. None, not in Flax: the averages are the plain
            means of all batches so far, counted in `num_batches_tracked`; a feature that a mask
            hides keeps its averages, but its batch counts unless it is hidden wholly.
        epsilon: added to the variance.
        dtype: of y; None for the widest of x, float32 and the parameters.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init: their initializers.
        axis_name, axis_index_groups: mapped axes to take statistics over.
        use_fast_variance: accepted for Flax's sake; both values give the same stable variance.
        promote_dtype: decides the dtype of y from `(x, mean, var, scale, bias)` and `dtype`.
        rngs: its `params` stream is drawn for the scale, then for the bias.
        bias_metadata, scale_metadata: for the `nnx.Param`s.
        virtual_batch_size: examples that share statistics in training, None for all; not in Flax.
        activation: elementwise, applied to the result (to its sum with the `residual` of the call):
            in the same sweep; see `jax_bn.batch_norm` for what is kept; not in Flax.
        forward_mode: whether `jax.jvp` and `jax.jacfwd` must pass through the layer in training, as
            in `jax_bn.batch_norm`; not in Flax.
        implementation: what runs in training, as in `jax_bn.batch_norm`; evaluation is XLA's; not
            in Flax.
        unbiased: whether the running variance averages count/(count - 1) times the batch's, as in
            PyTorch; training on one example is then an error; not in Flax.
        freeze_statistics: normalize with the running averages, and leave them as they are, in
            training too, whatever `use_running_average` says; gradients of x, scale and bias go on.
            (To normalize with the batch and leave the averages: momentum=1.0.) Not in Flax.
        freeze_affine: no gradient reaches scale and bias: theirs is 0, which an optimizer may still
            answer with weight decay; statistics go on. Not in Flax. Both can be set later, for all
            layers of a model: by its `set_attributes`, or by `nnx.view`.

    Of a complex mean the running average takes the real part alone, with JAX's warning, as in Flax:
    for complex x use the Linen layer or the function.

    Variables: `mean` and `var` (`nnx.BatchStat`, float32), `scale` and `bias` (`nnx.Param` or
    None), each of shape `(num_features,)`; with `momentum=None` also `num_batches_tracked`
    (`nnx.BatchStat`, one int32).

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_bn.nnx import BatchNorm
        >>> layer = BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> x = jnp.array([[1.0], [3.0]])
        >>> layer(x).round(3)[:, 0].tolist(), layer.mean[...]
        ([-1.0, 1.0], Array([0.2], dtype=float32))
        >>> layer.eval()
        >>> layer(x).round(3)[:, 0].astype(jnp.float16)
        Array([0.8, 2.8], dtype=float16)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones_init(),
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        virtual_batch_size: int | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        forward_mode: bool = False,
        implementation: str | None = None,
        unbiased: bool = False,
        freeze_statistics: bool = False,
        freeze_affine: bool = False,
    ):
        if isinstance(activation, nnx.Module):
            raise TypeError(
                f"activation={activation} is a module; expected a function without "
                "parameters: apply the module to the result of this layer"
            )
        shape = (_arguments.size("num_features", num_features),)
        _arguments.inexact_dtype("dtype", dtype)
        _arguments.inexact_dtype("param_dtype", param_dtype)
        _arguments.function("promote_dtype", promote_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        if momentum is None:
            self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def param(name, used, init, metadata) -> nnx.Param[jax.Array] | None:
            if not _arguments.flag(f"use_{name}", used):
                return nnx.data(None)
            if not callable(getattr(rngs, "params", None)):
                raise TypeError(f"rngs is a {type(rngs).__name__}; expected nnx.Rngs(seed)")
            init = _arguments.function(f"{name}_init", init)
            metadata = _arguments.mapping(f"{name}_metadata", metadata, "that of an nnx.Param")
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        self.scale = param("scale", use_scale, scale_init, scale_metadata)
        self.bias = param("bias", use_bias, bias_init, bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.virtual_batch_size = virtual_batch_size
        self.activation = activation
        self.forward_mode = forward_mode
        self.implementation = implementation
        self.unbiased = unbiased
        self.freeze_statistics = freeze_statistics
        self.freeze_affine = freeze_affine

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
            x: any rank from 1 up, `num_features` long on `axis`.
            use_running_average: wins over the attribute.
            mask: which examples count in training, 0/1 of any dtype; broadcasts to x as in Flax, or
                else to its batch axes; see `jax_bn.batch_norm`.
            residual: of x's shape, added before the activation; not in Flax.

        Returns:
            y, of x's shape.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is given nowhere: pass it to the constructor or to the call, "
                "or set it with nnx.view, .train() or .eval()"
            )
        use_running_average = _arguments.flag("use_running_average", use_running_average)
        x = _arguments.array("x", x)
        found = tuple(x.shape[a] for a in feature_axes(self.axis, x.ndim))
        if found != (self.num_features,):
            raise ValueError(
                f"x has shape {x.shape}, so {found} features on axis={self.axis}; expected "
                f"num_features={self.num_features} of them"
            )
        mean, var = self.mean[...], self.var[...]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if _arguments.flag("freeze_affine", self.freeze_affine):
            scale, bias = jax.lax.stop_gradient((scale, bias))
        px, _, _, pscale, pbias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        common: dict[str, Any] = dict(
            axis=self.axis,
            epsilon=self.epsilon,
            residual=residual,
            activation=self.activation,
            dtype=dtypes.canonicalize_dtype(px, pscale, pbias, dtype=self.dtype),
        )
        if use_running_average or _arguments.flag("freeze_statistics", self.freeze_statistics):
            return normalize(x, mean, var, scale, bias, **common)
        y, stats = self._in_training(mean, var)(
            x,
            scale=scale,
            bias=bias,
            mask=None if mask is None else flax_mask(_arguments.array("mask", mask), x.shape),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            forward_mode=self.forward_mode,
            implementation=self.implementation,
            **common,
        )
        momentum = self.momentum
        if momentum is None:
            if not hasattr(self, "num_batches_tracked"):
                raise ValueError(
                    "momentum=None was set after the layer was made, without a counter of batches; "
                    "expected in the constructor"
                )
            self.num_batches_tracked[...], momentum = count_batch(
                self.num_batches_tracked[...], stats
            )
        # No gradient flows through the averages, as in Flax: a variable is no place for a tracer.
        self.mean[...], self.var[...] = jax.lax.stop_gradient(
            update_running_stats(mean, var, stats, momentum=momentum, unbiased=self.unbiased)
        )
        return y

    def _in_training(self, mean: jax.Array, var: jax.Array) -> Callable:
        """What normalizes in training."""
        del mean, var
        return batch_norm

    def set_view(
        self,
        use_running_average: bool | None = None,
        *,
        freeze_statistics: bool | None = None,
        freeze_affine: bool | None = None,
    ):
        """Called by `nnx.view`; what is None stays as it was.

        Args:
          use_running_average: evaluation if True, training if False.
          freeze_statistics: as the argument of the constructor.
          freeze_affine: as the argument of the constructor.
        """  # indented as `nnx.view_info` reads it
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if freeze_statistics is not None:
            self.freeze_statistics = freeze_statistics
        if freeze_affine is not None:
            self.freeze_affine = freeze_affine
