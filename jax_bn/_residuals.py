"""What batch normalization keeps between forward and backward, by name: x and the statistics.

The names mean nothing until `jax.checkpoint` (`jax.remat`) is given a policy that asks for them.
"""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

X, STATISTICS = "jax_bn.x", "jax_bn.statistics"

named_x = partial(checkpoint_name, name=X)
named_statistics: Any = partial(checkpoint_name, name=STATISTICS)

_saves: Any = jax.checkpoint_policies.save_only_these_names(X, STATISTICS)


def remat_policy(prim, *args, **params) -> bool:
    """A policy for `jax.checkpoint`: keep the inputs and the statistics of batch normalization.

    A block of convolution, normalization and activation then keeps the output of the convolution,
    which is the input of the normalization, and a few numbers a feature. y and the activation are
    computed again where the backward pass wants them, in one elementwise sweep over x; the
    convolution and the statistics are not. (A kernel that is a whole pass takes its sums again, on
    the chip.) Results are the same up to rounding.

    Args:
        prim, args, params: a primitive and how it is called; `jax.checkpoint` passes them.

    Returns:
        Whether its result is kept.

    What it keeps is named by `jax.ad_checkpoint.checkpoint_name`: "jax_bn.x" and
    "jax_bn.statistics", in `batch_norm`, `normalize` and both layers. To keep more, compose it:
    `jax.checkpoint_policies.save_from_both_policies(jax_bn.remat_policy, other)`. Everything else
    inside the checkpointed function is computed again, so a layer whose output is not normalized
    (a last dense layer, attention) needs a policy of its own or stands outside. With `forward_mode`
    JAX lists x twice, under two names for one array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jax_bn
        >>> @partial(jax.checkpoint, policy=jax_bn.remat_policy)
        ... def block(x, w):
        ...     return jnp.tanh(jax_bn.batch_norm(x @ w)[0])
        >>> loss = lambda x, w: block(x, w).sum()
        >>> jax.grad(loss, argnums=1)(jnp.ones((4, 3)), jnp.ones((3, 2))).shape
        (3, 2)
    """
    return _saves(prim, *args, **params)
