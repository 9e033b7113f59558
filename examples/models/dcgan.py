"""A small DCGAN for images of 8x8 pixels in Flax NNX, with the batch normalization as an option.

The networks of Radford et al. 2016 (arXiv:1511.06434), two convolutions deep instead of four: no
pooling, strides instead; normalization everywhere but at the image itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
import jax

from jax_bn.nnx import BatchNorm

leaky_relu = partial(nnx.leaky_relu, negative_slope=0.2)
# 0.9: the default, 0.99, is still far behind the weights at the end of a short training.
MOMENTUM = 0.9


class Generator(nnx.Module):
    """From noise to images: 2x2, 4x4, 8x8 pixels, half the channels each time.

    Args:
        latent: numbers in the noise of an image.
        width: channels at 8x8.
        batch_norm: a layer with the arguments of `jax_bn.nnx.BatchNorm`.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        latent: int,
        width: int,
        *,
        batch_norm: Callable[..., Any] = BatchNorm,
        rngs: nnx.Rngs,
    ):
        bn = partial(batch_norm, momentum=MOMENTUM, rngs=rngs)
        up = partial(nnx.ConvTranspose, kernel_size=(4, 4), use_bias=False, rngs=rngs)
        self.linear = nnx.Linear(latent, 2 * 2 * 4 * width, use_bias=False, rngs=rngs)
        self.bn1 = bn(4 * width)
        self.up1 = up(4 * width, 2 * width, strides=2)
        self.bn2 = bn(2 * width)
        self.up2 = up(2 * width, width, strides=2)
        self.bn3 = bn(width)
        self.conv = nnx.Conv(width, 1, (3, 3), rngs=rngs)

    def __call__(self, noise: jax.Array) -> jax.Array:
        """[N, latent] -> images [N, 8, 8, 1] in [0, 1]."""
        x = self.linear(noise).reshape(len(noise), 2, 2, -1)
        x = self.up1(nnx.relu(self.bn1(x)))
        x = self.up2(nnx.relu(self.bn2(x)))
        return nnx.sigmoid(self.conv(nnx.relu(self.bn3(x))))


class Discriminator(nnx.Module):
    """From images to logits, positive for real: 8x8, 4x4, 2x2 pixels, twice the channels each time.

    Args:
        width: channels at 8x8.
        batch_norm: a layer with the arguments of `jax_bn.nnx.BatchNorm`.
        rngs: for the initial weights.
    """

    def __init__(self, width: int, *, batch_norm: Callable[..., Any] = BatchNorm, rngs: nnx.Rngs):
        bn = partial(batch_norm, momentum=MOMENTUM, rngs=rngs)
        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (4, 4), strides=2, use_bias=False, rngs=rngs)
        self.bn2 = bn(2 * width)
        self.conv3 = nnx.Conv(2 * width, 4 * width, (4, 4), strides=2, use_bias=False, rngs=rngs)
        self.bn3 = bn(4 * width)
        self.linear = nnx.Linear(2 * 2 * 4 * width, 1, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[N, 8, 8, 1] -> [N]."""
        x = leaky_relu(self.conv1(images))
        x = leaky_relu(self.bn2(self.conv2(x)))
        x = leaky_relu(self.bn3(self.conv3(x)))
        return self.linear(x.reshape(len(x), -1))[:, 0]
