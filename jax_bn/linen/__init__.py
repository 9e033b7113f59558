"""Flax Linen: the layers, and models with ours in the place of Flax's. Needs the extra `flax`."""

from jax_bn import _needs_flax as _needs_flax
from jax_bn.linen._batch_norm import BatchNorm as BatchNorm
from jax_bn.linen._batch_renorm import BatchRenorm as BatchRenorm
from jax_bn.linen._replace import replace_batch_norm as replace_batch_norm
