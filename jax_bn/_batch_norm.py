"""START HERE. The public functions: their contract, and the call into the rule.

batch_norm -> _training -> _vjp.batch_norm -> _stages     normalizes with the batch's statistics
normalize  -> _stages.normalize                           normalizes with given ones (evaluation)
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_bn import _arguments, _residuals, _shapes, _stages, _training
from jax_bn._statistics import BatchStats


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
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
    """Normalizes each feature of x with its statistics over the batch; backward in closed form.

    For one feature, whose N examples are all entries of x with the same index on the feature axes::

        mean = sum(x)/N      var = sum(|x - mean|^2)/N      rstd = 1/sqrt(var + epsilon)
        x_hat = (x - mean)*rstd     z = scale*x_hat + bias (+ residual)     y = activation(z)

        dz = dy*activation'(z)      dbias = sum(dz)     dscale = sum(dz*x_hat)     dresidual = dz
        dx = (scale*rstd/N) * (N*dz - dbias - x_hat*dscale)
             + dmean/N + 2*dvar*(x - mean)/N          where the loss uses the statistics themselves

    Args:
        x: of rank 1 or more; any float dtype of 16 bits or more, or complex. Integers and bools are
            taken as float32.
        scale, bias: shape of the feature axes of x, in ascending order; any dtype. None leaves the
            step out.
        axis: the feature axis or axes; all others are reduced.
        epsilon: added to the variance; at least 0, in the units of x squared; static.
        mask: which examples are valid: bool or integers 0 and 1, broadcasting to the batch axes of
            x (x without its feature axes) or to x. Statistics and gradients are those of the valid
            examples alone. y is computed everywhere, but carries no gradient where masked, and what
            x holds there, NaN too, reaches nothing else. None: all are valid.
        axis_name: of one or several mapped axes (`shard_map`, `vmap`, `pmap`) over which the batch
            is spread: N counts the valid examples along them all.
        axis_index_groups: groups of indices along `axis_name` that share statistics, as in
            `jax.lax.psum`; not under `vmap`, nor under `shard_map` with `check_vma=True`.
        virtual_batch_size: normalizes each run of that many consecutive examples of the batch axis
            (the first reduced one) with statistics of its own: "ghost batches". It divides the
            axis. `stats` are those of the whole batch. With `axis_name` the runs at the same place
            on all devices form one group.
        residual: added before the activation; of x's shape, any dtype (complex only if y is).
        activation: an elementwise function such as `jax.nn.relu`, `jax.nn.gelu` or
            `functools.partial(jax.nn.leaky_relu, negative_slope=0.1)`, made once (each new partial
            is another function to JAX). Static: it may not close over arrays, and numbers that it
            closes over are read once. It is applied in T, before y is rounded to `dtype`.
        dtype: of y; None for x's own.
        forward_mode: take the rule that `jax.jvp` can use; see below.
        implementation: "xla", or "mosaic_gpu": hand-written kernels for Hopper GPUs, see below.
            None takes XLA's, except where the kernels were measured to be faster.

    Returns:
        `(y, stats)`: y has the shape of x; `stats` is a `BatchStats` with the shape of the feature
        axes.

    Raises:
        ValueError: an axis out of range or repeated, a scale or bias of the wrong shape, no example
            to reduce, a negative epsilon, a `dtype` that is not inexact or would drop the imaginary
            part of y, a mask that does not broadcast, a residual of another shape, an
            activation that changes the shape or the dtype, an `axis_name` that is not bound, groups
            without an `axis_name`, a virtual batch size that does not divide the batch, an unknown
            `implementation`.
        TypeError: an axis or a virtual batch size that is no integer, an epsilon that is no number
            known while tracing, a mask of floats, keys or strings for x, an activation that is no
            function or closes over traced arrays.
        NotImplementedError: `axis_index_groups` where JAX has none; an `implementation` that cannot
            run this call here: nothing else is run in its place.

    One example a feature (N = 1) is legal and teaches nothing: x_hat = 0, so y = bias and dx = 0.

    Precision: all arithmetic is in T, the widest of float32 and the dtypes of x, scale, bias,
    residual and `dtype`. The variance takes one sweep over x (on CPUs two, if x is bfloat16 or
    float16), shifted by the median k of three examples; its relative error is at most c*eps(T)*(1 +
    (k - mean)^2/var), with c the growth of a sum of N terms (about sqrt(N) at worst, a few units
    where XLA sums in blocks). For examples in no special order k is within a few std of the mean,
    wherever the mean is: unlike E[x^2] - E[x]^2, whose error grows with (mean/std)^2. At worst,
    where two of the first three are the only outliers, it is sqrt(N/2) std away. With a mask, with
    complex x, and where x's type says that its batch axis is sharded, k is the mean itself, for a
    second sweep. y and dx err, beyond a few ulps, by half the relative error of the variance and by
    eps(T)*|mean|/std, the rounding of the mean itself. Derivatives of second order by x in a
    narrower dtype have a few roundings to that dtype: JAX adds cotangents in it.

    Differentiable in x, scale, bias and residual, in y and in the statistics: reverse mode to any
    order, and forward over reverse (`jax.hessian`), exact. Forward mode of the function itself
    (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) is JAX's TypeError "can't apply forward-mode autodiff
    (jvp) to a custom_vjp function", which cannot be made to say more: pass `forward_mode=True`.
    Then the tangent is the closed form, dx_hat = rstd*(dx - sum(dx)/N - x_hat*sum(x_hat*dx)/N), JAX
    transposes it for reverse mode, and all nestings of the two work. The default is the other rule
    because its backward pass is in the hands of a backend's own stages.

    Kept between forward and backward: x, the mask and a few numbers a feature. With an activation
    and a residual also y, if the activation is relu or leaky_relu, or else the residual. (With
    `forward_mode` the residual in both cases. Of y the sign is used: a z so small that y rounds to
    0 counts as 0.) Under `jax.checkpoint`, `jax_bn.remat_policy` keeps
    just x and the numbers. What is not differentiated costs nothing once compiled: no dx for data,
    no rule of the statistics where the loss does not use them. (A kernel that is a whole pass, see
    below, makes dx all the same.)

    A feature with no valid example has count 0, mean 0, var 0, y = bias and no gradient.

    Sharding: under `jit` with sharded arguments the compiler partitions it, and the statistics are
    those of the whole batch. Where the batch axis is mapped by hand, `axis_name` says so: two
    all-reduces of a few numbers a feature forward (the second needs the mean that the first gives,
    so that no device's mean can cancel another's), one backward. Gradients are in every mode what
    JAX gives for the definition written with `lax.psum`: under `pmap` and
    `shard_map(check_vma=False)` dscale and dbias are each device's own share, to be summed by the
    caller as ever; under `check_vma=True` they are summed already where scale and bias are shared.

    `implementation="mosaic_gpu"` wants jax 0.11, a GPU of compute capability 9.0, the features on
    the last axis and at most 8192 of them, bfloat16, float16 or float32 for x, y and residual
    alike, a number of elements divisible by 8 (4 in float32), so any number of examples where that
    of the features is; relu, leaky_relu or no activation, no mask. First derivatives are its own,
    higher ones and tangents XLA's. Where x stays on the chip, as 2048 examples of 2048 features in
    bfloat16 do, forward and backward are one kernel each; not under `axis_name`, nor the forward
    pass of `batch_renorm`. It runs on one device, under `vmap`, and under `shard_map`; a program
    that the compiler partitions is refused. None takes XLA's stages; except for 1568 examples of
    2048 features in bfloat16 in a program for one H200, neither mapped nor exported: there all that
    was measured took less time with the kernels for whole passes (README, "On GPUs and TPUs").

    Source: "Deriving Batch-Norm Backprop Equations"; Ioffe and Szegedy 2015 for the layer; Chan,
    Golub and LeVeque 1983 for the variance.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jax_bn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 50.0]])
        >>> y, stats = jax_bn.batch_norm(x, scale=jnp.ones(2), bias=jnp.zeros(2), epsilon=0.0)
        >>> y.tolist(), stats.mean.tolist(), stats.var.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 30.0], [1.0, 400.0])
        >>> dx = jax.grad(lambda x: jax_bn.batch_norm(x)[0][0, 0])(x)
        >>> bool(jnp.abs(dx.sum()) < 1e-6)  # orthogonal to constants
        True
    """
    return _training.in_training(
        x,
        scale,
        bias,
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


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes x with given statistics: batch normalization in evaluation.

    y = activation(scale * (x - mean)/sqrt(var + epsilon) + bias + residual)

    Args:
        x, scale, bias, axis, epsilon, residual, activation, dtype: as in `batch_norm`. x may hold
            no examples.
        mean, var: shape of the feature axes; usually the running averages. var is real.

    Returns:
        y, of x's shape, in `dtype` or x's own.

    Raises:
        ValueError, TypeError: as `batch_norm`, and for a `mean` or `var` of the wrong shape.

    Precision: computed in the widest of float32 and the dtypes of all arguments; a few ulps, and
    eps*|mean|/std for the rounding of the mean.

    Differentiable in every array, to any order, in forward and reverse mode. Kept for the backward
    pass: x itself, the residual if there is an activation, and the per-feature arrays; the rest is
    computed again.

    Elementwise, so it shards as x does, without communication.

    Source: Ioffe and Szegedy 2015.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_bn
        >>> x, mean, var = jnp.array([[5.0]]), jnp.array([1.0]), jnp.array([4.0])
        >>> jax_bn.normalize(x, mean, var, epsilon=0.0).item()
        2.0
    """
    x = _arguments.inexact("x", x)
    features = _shapes.feature_axes(axis, x.ndim)
    epsilon = _arguments.static_epsilon(epsilon)
    y_dtype = _arguments.dtype_of_y(dtype, x)
    mean, var = _arguments.running(mean, var, x, features)
    scale = None if scale is None else _arguments.per_feature("scale", scale, x, features)
    bias = None if bias is None else _arguments.per_feature("bias", bias, x, features)
    residual = None if residual is None else _arguments.residual(residual, x)
    wide = _arguments.arithmetic_dtype(y_dtype, x, mean, var, scale, bias, residual)
    _arguments.elementwise(activation, wide)
    x, mean, scale, bias = _arguments.in_arithmetic(wide, x, mean, scale, bias)
    rstd = lax.rsqrt(var.astype(jnp.finfo(wide).dtype) + epsilon).astype(wide)
    x = _residuals.named_x(x)
    return _normalize_again(activation, y_dtype, x, mean, rstd, scale, bias, residual)


@partial(jax.checkpoint, static_argnums=(0, 1))
def _normalize_again(activation, dtype, *args):
    """The stage; keeps x for the backward pass, not x - mean in a wider dtype."""
    return _stages.normalize(*args, activation=activation, dtype=dtype)
