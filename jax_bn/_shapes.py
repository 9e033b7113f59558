"""Shapes: which axes are features, which are reduced, how a mask lines up with x.

Knows shapes and nothing else; the arithmetic is in `_stages`, the rule in `_vjp`.

Inside the package a per-feature array keeps x's rank, with 1 in every reduced axis: for x of shape
(N, H, W, C) and axis=-1 it is (1, 1, 1, C). Then the code reads like the formulas, at every rank,
and x itself is never reshaped or transposed, which would move data between devices, but in a
program for one (`_sums`).
"""

from collections.abc import Sequence
import math
import operator

import jax
import jax.numpy as jnp


def feature_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The feature axes as non-negative numbers in ascending order."""
    if ndim == 0:
        raise ValueError("x is a scalar; expected rank 1 or more, with a feature axis")
    given = axis if isinstance(axis, Sequence) else (axis,)
    try:
        axes = [operator.index(a) for a in given]
    except TypeError as e:
        raise TypeError(f"axis must be an int or a sequence of ints, got {axis!r}") from e
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis={axis!r} is out of range for x of rank {ndim}; expected {-ndim}..{ndim - 1}"
            )
    axes = sorted(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis={axis!r} names an axis of x (rank {ndim}) twice; name each once")
    return tuple(axes)


def reduced_axes(features: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """All axes that are not features: the ones a statistic is taken over."""
    return tuple(a for a in range(ndim) if a not in features)


def size(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many examples of each feature an array of this shape holds."""
    return math.prod(shape[a] for a in axes)


def per_feature(
    name: str, v: jax.Array, shape: Sequence[int], features: tuple[int, ...]
) -> jax.Array:
    """`v`, one number a feature, with 1 in the reduced axes of `shape`. :: [C] -> [1, C]"""
    expected = tuple(shape[a] for a in features)
    if v.shape != expected:
        raise ValueError(
            f"{name} has shape {v.shape}; expected {expected}, the feature axes {features} of "
            f"x, which has shape {tuple(shape)}"
        )
    return jnp.expand_dims(v, reduced_axes(features, len(shape)))


def shards(x: jax.Array, axis: int) -> int:
    """Over how many devices x's type says that an axis is split: 1 without explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    if names is None:
        return 1
    return math.prod(
        sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names)
    )


def named(x: jax.Array) -> bool:
    """Whether x's type names mesh axes, of any length: an array that only some reshapes are for."""
    return any(names is not None for names in jax.typeof(x).sharding.spec)


def aligned_mask(mask: jax.Array, shape: Sequence[int], features: tuple[int, ...]) -> jax.Array:
    """`mask` as a bool array of x's rank. :: bool[N] or anything that broadcasts to x -> bool[N, 1]

    Two readings: over the batch axes alone (x without its feature axes), or over x by NumPy's rule.
    A mask with as many axes as x has batch axes is read the first way wherever that fits.
    """
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            f"mask has dtype {mask.dtype}; expected bool, or integers 0 and 1. A mask says which "
            "examples are valid, it does not weigh them: pass `weights != 0`"
        )
    mask = mask if mask.dtype == jnp.bool_ else mask != 0
    reduced = reduced_axes(features, len(shape))
    batch = tuple(shape[a] for a in reduced)
    if mask.ndim == len(batch) < len(shape) and _broadcasts(mask.shape, batch):
        return jnp.expand_dims(mask, features)
    if _broadcasts(mask.shape, shape):
        return jnp.expand_dims(mask, tuple(range(len(shape) - mask.ndim)))
    raise ValueError(
        f"mask has shape {mask.shape}; expected a shape that broadcasts to {batch}, the batch axes "
        f"{reduced} of x, or to {tuple(shape)}, the shape of x"
    )


def flax_mask(mask: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`mask` of any dtype as Flax reads it: over x by NumPy's rule wherever that fits.

    Where it does not, Flax refuses, and the batch axes are left to `aligned_mask`.
    """
    mask = mask.astype(bool)
    if not _broadcasts(mask.shape, shape):
        return mask
    return jnp.expand_dims(mask, tuple(range(len(shape) - mask.ndim)))


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))
