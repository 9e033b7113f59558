"""ResNet-18 and ResNet-50 in Flax Linen, with the batch normalization as an option.

The networks of He et al. 2016 (arXiv:1512.03385), for measuring a batch normalization where it is
used: any layer with the fields of `flax.linen.BatchNorm` fits. Its relu and residual are outside of
it or, if it takes them, within. The variables have the same names whatever the options, and the
names are those of `resnet_nnx.py`, which has the same networks in Flax NNX.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from jax_bn.linen import BatchNorm

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # layers -> blocks of each stage
EXPANSION = 4  # channels out of a bottleneck, for one within
NORMALIZATION = dict(momentum=0.9, epsilon=1e-5)


def blocks(stage_sizes: Sequence[int], width: int) -> Iterator[tuple[str, int, int]]:
    """Name, channels and stride of each block: all stages but the first halve the image."""
    for stage, size in enumerate(stage_sizes):
        for block in range(size):
            stride = 2 if stage > 0 and block == 0 else 1
            yield f"stage{stage + 1}_block{block + 1}", width * 2**stage, stride


class Layers(NamedTuple):
    """How to make the layers of a network.

    Attributes:
        conv: a convolution without bias, which batch normalization would subtract.
        bn: a batch normalization.
        fused: whether `bn` takes the argument `activation`, and its layers `residual`.
    """

    conv: Callable[..., Any]
    bn: Callable[..., Any]
    fused: bool

    @property
    def bn_relu(self) -> Callable[..., Any]:
        """A batch normalization for the function `bn_relu`."""
        return partial(self.bn, activation=jax.nn.relu) if self.fused else self.bn


def bn_relu(fused: bool, bn: Any, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    """relu(bn(x) + residual), all of it in the layer if `fused`; made by `Layers.bn_relu`."""
    if fused:
        return bn(x, residual=residual)
    y = bn(x)
    return jax.nn.relu(y if residual is None else y + residual)


class Block(nn.Module):
    """What the blocks share: the shortcut, x if it has the result's shape, else bn(conv(x))."""

    make: Layers
    channels: int
    stride: int

    def shortcut(self, x: jax.Array, channels: int) -> jax.Array:
        """[N, H, W, C] -> [N, H/stride, W/stride, channels], sizes rounded up."""
        if self.stride == 1 and x.shape[-1] == channels:
            return x
        x = self.make.conv(channels, (1, 1), self.stride, name="conv_shortcut")(x)
        return self.make.bn(name="bn_shortcut")(x)


class BasicBlock(Block):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), both convolutions 3x3."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H/stride, W/stride, channels], sizes rounded up."""
        make, channels = self.make, self.channels
        y = make.conv(channels, (3, 3), self.stride, name="conv1")(x)
        y = bn_relu(make.fused, make.bn_relu(name="bn1"), y)
        y = make.conv(channels, (3, 3), name="conv2")(y)
        return bn_relu(make.fused, make.bn_relu(name="bn2"), y, self.shortcut(x, channels))


class Bottleneck(Block):
    """As `BasicBlock`, of three convolutions: 1x1, 3x3, and 1x1 to four times the channels.

    The stride is in the 3x3 convolution: the form known as v1.5.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H/stride, W/stride, 4 channels], sizes rounded up."""
        make, channels, channels_out = self.make, self.channels, EXPANSION * self.channels
        y = make.conv(channels, (1, 1), name="conv1")(x)
        y = bn_relu(make.fused, make.bn_relu(name="bn1"), y)
        y = make.conv(channels, (3, 3), self.stride, name="conv2")(y)
        y = bn_relu(make.fused, make.bn_relu(name="bn2"), y)
        y = make.conv(channels_out, (1, 1), name="conv3")(y)
        return bn_relu(make.fused, make.bn_relu(name="bn3"), y, self.shortcut(x, channels_out))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over the image, one linear layer.

    Attributes:
        stage_sizes: blocks of each stage; a stage has twice the channels of the one before.
        bottleneck: whether the blocks are `Bottleneck` or `BasicBlock`.
        classes: how many logits.
        width: channels of the stem, and of the first stage within its blocks.
        dtype: of the computation up to the mean; parameters and logits are float32.
        batch_norm: a layer with the fields of `flax.linen.BatchNorm`.
        fused: whether `batch_norm` does the relu and the sum with the residual itself:
            `batch_norm(activation=relu)(x, residual=shortcut)`.
        small_images: a 3x3 stem, not 7x7 and a max pool, each with stride 2.
        remat_policy: if given, each block is an `nn.remat` with this policy.
    """

    stage_sizes: Sequence[int]
    bottleneck: bool
    classes: int = 1000
    width: int = 64
    dtype: Any = jnp.float32
    batch_norm: Callable[..., nn.Module] = BatchNorm
    fused: bool = False
    small_images: bool = False
    remat_policy: Callable[..., bool] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images [N, H, W, C] -> logits [N, classes]; training updates `batch_stats`."""
        bn = partial(self.batch_norm, use_running_average=not train, dtype=self.dtype)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        make = Layers(conv, partial(bn, **NORMALIZATION), self.fused)
        kernel, stride = ((3, 3), 1) if self.small_images else ((7, 7), 2)
        x = make.conv(self.width, kernel, stride, name="conv_stem")(x)
        x = bn_relu(self.fused, make.bn_relu(name="bn_stem"), x)
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        block: Any = Bottleneck if self.bottleneck else BasicBlock
        if self.remat_policy is not None:
            block = nn.remat(block, policy=self.remat_policy)
        for name, channels, stride in blocks(self.stage_sizes, self.width):
            x = block(make, channels, stride, name=name)(x)
        x = x.astype(jnp.float32).mean((1, 2))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)


def resnet18(**options: Any) -> ResNet:
    """11.7 million parameters at 1000 classes; `options` are fields of `ResNet`."""
    return ResNet(STAGES[18], bottleneck=False, **options)


def resnet50(**options: Any) -> ResNet:
    """25.6 million parameters at 1000 classes; `options` are fields of `ResNet`."""
    return ResNet(STAGES[50], bottleneck=True, **options)
