"""Flax Linen: the layer. Needs the extra `flax`."""

from jax_bn.linen._batch_norm import BatchNorm as BatchNorm
