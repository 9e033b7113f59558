"""Flax NNX: the layer. Needs the extra `flax`."""

from jax_bn.nnx._batch_norm import BatchNorm as BatchNorm
