"""Normalization with the batch's own statistics: from the user's arguments to the rule and back.

What `batch_norm` and `batch_renorm` share; they differ in what scales and shifts x_hat.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
import operator

import jax
import jax.numpy as jnp
import numpy as np

from jax_bn import _arguments, _implementation, _shapes, _vjp
from jax_bn._statistics import BatchStats, merge_stacked


def in_training(
    x,
    scale,
    bias,
    *,
    running=None,
    affine: Callable | None = None,
    axis,
    epsilon,
    mask,
    axis_name,
    axis_index_groups,
    virtual_batch_size,
    residual,
    activation,
    dtype,
    forward_mode,
    implementation,
) -> tuple[jax.Array, BatchStats]:
    """`batch_norm`, with the scale and the bias of x_hat as `affine` makes them of the statistics.

    None: as they are given.

    affine :: (scale[1, C] | None, bias[1, C] | None, stats[1, C], *running[1, C]) -> scale, bias

    `running`: None, or the mean and the variance of earlier batches, for `affine`.
    """
    implementation = _implementation.checked(implementation)
    x = _arguments.inexact("x", x)
    features = _shapes.feature_axes(axis, x.ndim)
    reduced = _shapes.reduced_axes(features, x.ndim)
    examples = _shapes.size(x.shape, reduced)
    if examples == 0:
        raise ValueError(
            f"x has shape {x.shape}: no examples to take statistics of along the reduced axes "
            f"{reduced}; expected at least one"
        )
    epsilon = _arguments.static_epsilon(epsilon)
    y_dtype = _arguments.dtype_of_y(dtype, x)
    scale = None if scale is None else _arguments.per_feature("scale", scale, x, features)
    bias = None if bias is None else _arguments.per_feature("bias", bias, x, features)
    if mask is not None:
        mask = _shapes.aligned_mask(_arguments.array("mask", mask), x.shape, features)
    residual = None if residual is None else _arguments.residual(residual, x)
    running = () if running is None else _arguments.running(*running, x, features)
    names, groups, devices = _arguments.mapped_axes(axis_name, axis_index_groups)
    stat_dtype = _arguments.arithmetic_dtype(y_dtype, x, scale, bias, residual, *running)
    x, scale, bias = _arguments.in_arithmetic(stat_dtype, x, scale, bias)
    _arguments.elementwise(activation, stat_dtype)
    forward_mode = _arguments.flag("forward_mode", forward_mode)
    spec = _vjp.Spec(reduced, stat_dtype, y_dtype, names, groups, activation, forward_mode)

    def affine_of(affine, count, mean, var):
        return affine(scale, bias, BatchStats(mean, var, count), *running)

    scale_and_bias = (scale, bias) if affine is None else partial(affine_of, affine)

    def one_batch(x, mask, residual):
        stages = _implementation.stages(
            implementation,
            x,
            mask,
            residual,
            axes=reduced,
            activation=activation,
            dtype=stat_dtype,
            y_dtype=y_dtype,
        )
        here = spec._replace(stages=stages)
        y, count, mean, var = _vjp.batch_norm(here, x, mask, scale_and_bias, residual, epsilon)
        count = jnp.broadcast_to(count, mean.shape)
        return y, BatchStats(*(jnp.squeeze(v, reduced) for v in (mean, var, count)))

    if virtual_batch_size is None:
        y, stats = one_batch(x, mask, residual)
    else:
        y, stats = _in_virtual_batches(one_batch, x, mask, residual, reduced, virtual_batch_size)
    if mask is None:
        # The count is known while tracing. Kept so, it lets `update_running_stats` refuse 1.
        known = np.full(stats.count.shape, examples * devices, stats.count.dtype)
        stats = replace(stats, count=known)
    return y, stats


def _in_virtual_batches(one_batch, x, mask, residual, reduced: tuple[int, ...], size: int):
    """`one_batch` on each `size` consecutive examples of the batch axis; statistics of all."""
    batch, n = (reduced[0], x.shape[reduced[0]]) if reduced else (None, 1)
    try:
        size = operator.index(size)
    except TypeError as e:
        raise TypeError(f"virtual_batch_size={size!r}; expected an int or None") from e
    if size < 1 or n % size:
        raise ValueError(
            f"virtual_batch_size={size} does not divide the batch axis of x (axis {batch}, length "
            f"{n}) into whole groups; expected a divisor of {n}: drop or pad and mask the rest"
        )
    if batch is None:
        return one_batch(x, mask, residual)

    if (n // size) % (shards := _shapes.shards(x, batch)):
        raise ValueError(
            f"virtual_batch_size={size} does not divide what a device holds of the batch axis of x "
            f"({n} examples over {shards} devices, by explicit mesh axes); expected a divisor of "
            f"{n // shards}, or automatic axes"
        )

    def split(v):
        return v.reshape(*v.shape[:batch], n // size, size, *v.shape[batch + 1 :])

    shared_mask = mask is None or mask.shape[batch] == 1
    # tree.map: None stays None
    args = split(x), mask if shared_mask else split(mask), jax.tree.map(split, residual)
    in_axes = batch, None if shared_mask else batch, batch
    y, stats = jax.vmap(one_batch, in_axes, out_axes=(batch, 0))(*args)
    return y.reshape(x.shape), merge_stacked(stats)
