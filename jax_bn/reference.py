"""Batch normalization as textbooks define it, differentiated by JAX: the oracle.

Imports jax and nothing of this package: an oracle that shares code with what it judges is none.
"""

import jax
from jax import lax
import jax.numpy as jnp


def batch_norm(
    x,
    scale=None,
    bias=None,
    *,
    axis=-1,
    epsilon=1e-5,
    mask=None,
    axis_name=None,
    axis_index_groups=None,
    residual=None,
    activation=None,
    dtype=None,
):
    """`jax_bn.batch_norm` by its definition: slow, memory-hungry, and beyond doubt.

    mean = sum(x)/N, var = sum |x - mean|^2 / N, y = scale * (x - mean)/sqrt(var + epsilon) + bias;
    with a residual and an activation, y = activation(that + residual).

    Args:
        x, scale, bias, axis, epsilon, axis_name, axis_index_groups, residual, activation, dtype: as
            in `jax_bn.batch_norm`. Statistics are in float32 or x's wider dtype.
        mask: as there, but of x's rank and bool.

    Returns:
        `(y, (mean, var, count))`.

    Differentiable to any order, in forward and reverse mode. As in `jax_bn.batch_norm`, y at masked
    positions is a constant to differentiation.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_bn import reference
        >>> y, (mean, var, count) = reference.batch_norm(jnp.array([[1.0], [3.0]]), epsilon=0.0)
        >>> y[:, 0].tolist(), mean.item(), var.item(), count.item()
        ([-1.0, 1.0], 2.0, 1.0, 2.0)
    """
    x = jnp.asarray(x)
    features = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    y_dtype = dtype or (x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32)
    dtypes = [v.dtype for v in (x, scale, bias, residual) if v is not None]
    with jax.numpy_dtype_promotion("standard"):
        x = x.astype(jnp.result_type(jnp.float32, y_dtype, *dtypes))

    def total(v):
        v = jnp.sum(jnp.broadcast_to(v, x.shape), reduced, keepdims=True, where=mask)
        if axis_name is None:
            return v
        return lax.psum(v, axis_name, axis_index_groups=axis_index_groups)

    clean = x if mask is None else jnp.where(mask, x, 0)
    count = total(jnp.ones(x.shape, jnp.finfo(x.dtype).dtype))
    mean = total(clean) / jnp.maximum(count, 1).astype(x.dtype)
    centred = clean - mean
    var = total(jnp.real(centred * jnp.conj(centred))) / jnp.maximum(count, 1)
    y = (x - mean) / jnp.sqrt(var + epsilon).astype(x.dtype)
    y = jnp.where(count > 0, y, 0)
    if scale is not None:
        y = y * jnp.expand_dims(scale, reduced).astype(x.dtype)
    if bias is not None:
        y = y + jnp.expand_dims(bias, reduced).astype(x.dtype)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    if activation is not None:
        y = activation(y)
    if mask is not None:
        y = jnp.where(mask, y, lax.stop_gradient(y))
    return y.astype(y_dtype), tuple(jnp.squeeze(v, reduced) for v in (mean, var, count))
