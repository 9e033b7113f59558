"""Batch normalization for JAX, from the closed form of its backward pass.

`jax_bn.linen` and `jax_bn.nnx`, the Flax layers, are imported on their own; this needs jax alone.
"""

from jax_bn import reference as reference
from jax_bn._batch_norm import batch_norm as batch_norm, normalize as normalize
from jax_bn._batch_renorm import batch_renorm as batch_renorm
from jax_bn._residuals import remat_policy as remat_policy
from jax_bn._statistics import (
    BatchStats as BatchStats,
    merge_stats as merge_stats,
    update_running_stats as update_running_stats,
)

__version__ = "0.1.0"
