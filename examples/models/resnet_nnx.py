"""ResNet-18 and ResNet-50 in Flax NNX: the networks of `resnet.py`, name by name.

What differs is Flax: layers are made in the constructor, which therefore needs the channels of the
images and `rngs`; and whether to train is said by `.train()`, the default, and `.eval()`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jax_bn.nnx import BatchNorm
from models.resnet import EXPANSION, NORMALIZATION, STAGES, Layers, blocks, bn_relu


class Block(nnx.Module):
    """What the blocks share: the shortcut, x if it has the result's shape, else bn(conv(x))."""

    def __init__(self, make: Layers, channels_in: int, channels: int, stride: int):
        self.fused = make.fused
        if stride == 1 and channels_in == channels:
            self.conv_shortcut = self.bn_shortcut = None
        else:
            self.conv_shortcut = make.conv(channels_in, channels, (1, 1), stride)
            self.bn_shortcut = make.bn(channels)

    def shortcut(self, x: jax.Array) -> jax.Array:
        """[N, H, W, channels_in] -> [N, H/stride, W/stride, channels], sizes rounded up."""
        if self.conv_shortcut is None or self.bn_shortcut is None:
            return x
        return self.bn_shortcut(self.conv_shortcut(x))


class BasicBlock(Block):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), both convolutions 3x3."""

    def __init__(self, make: Layers, channels_in: int, channels: int, stride: int):
        super().__init__(make, channels_in, channels, stride)
        self.conv1 = make.conv(channels_in, channels, (3, 3), stride)
        self.bn1 = make.bn_relu(channels)
        self.conv2 = make.conv(channels, channels, (3, 3))
        self.bn2 = make.bn_relu(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, channels_in] -> [N, H/stride, W/stride, channels], sizes rounded up."""
        y = bn_relu(self.fused, self.bn1, self.conv1(x))
        return bn_relu(self.fused, self.bn2, self.conv2(y), self.shortcut(x))


class Bottleneck(Block):
    """As `BasicBlock`, of three convolutions, 1x1, 3x3 and 1x1 to four times the channels; v1.5."""

    def __init__(self, make: Layers, channels_in: int, channels: int, stride: int):
        super().__init__(make, channels_in, EXPANSION * channels, stride)
        self.conv1 = make.conv(channels_in, channels, (1, 1))
        self.bn1 = make.bn_relu(channels)
        self.conv2 = make.conv(channels, channels, (3, 3), stride)
        self.bn2 = make.bn_relu(channels)
        self.conv3 = make.conv(channels, EXPANSION * channels, (1, 1))
        self.bn3 = make.bn_relu(EXPANSION * channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, channels_in] -> [N, H/stride, W/stride, 4 channels], sizes rounded up."""
        y = bn_relu(self.fused, self.bn1, self.conv1(x))
        y = bn_relu(self.fused, self.bn2, self.conv2(y))
        return bn_relu(self.fused, self.bn3, self.conv3(y), self.shortcut(x))


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, the mean over the image, one linear layer.

    Args:
        batch_norm: a layer with the arguments of `flax.nnx.BatchNorm`.
        remat_policy: if given, each block is run by `nnx.remat` with this policy.
        channels_in: of the images.
        rngs: for the initial weights.
        others: as the fields of `models.resnet.ResNet`.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        bottleneck: bool,
        *,
        classes: int = 1000,
        width: int = 64,
        dtype: Any = jnp.float32,
        batch_norm: Callable[..., nnx.Module] = BatchNorm,
        fused: bool = False,
        small_images: bool = False,
        remat_policy: Callable[..., bool] | None = None,
        channels_in: int = 3,
        rngs: nnx.Rngs,
    ):
        self.fused = fused
        self.small_images = small_images
        self.remat_policy = remat_policy
        self.block_names = tuple(name for name, _, _ in blocks(stage_sizes, width))
        common: Any = dict(dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        conv = partial(nnx.Conv, use_bias=False, **common)
        make = Layers(conv, partial(batch_norm, **NORMALIZATION, **common), fused)
        kernel, stride = ((3, 3), 1) if small_images else ((7, 7), 2)
        self.conv_stem = make.conv(channels_in, width, kernel, stride)
        self.bn_stem = make.bn_relu(width)
        block, expansion = (Bottleneck, EXPANSION) if bottleneck else (BasicBlock, 1)
        channels_in = width
        for name, channels, stride in blocks(stage_sizes, width):
            setattr(self, name, block(make, channels_in, channels, stride))
            channels_in = expansion * channels
        self.head = nnx.Linear(channels_in, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [N, H, W, channels_in] -> logits [N, classes]; training updates the averages."""

        def run(block: Any, x: jax.Array) -> jax.Array:
            return block(x)

        if self.remat_policy is not None:
            run = nnx.remat(run, policy=self.remat_policy)
        x = bn_relu(self.fused, self.bn_stem, self.conv_stem(x))
        if not self.small_images:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for name in self.block_names:
            x = run(getattr(self, name), x)
        return self.head(x.astype(jnp.float32).mean((1, 2)))


def resnet18(**options: Any) -> ResNet:
    """11.7 million parameters at 1000 classes; `options` are arguments of `ResNet`."""
    return ResNet(STAGES[18], bottleneck=False, **options)


def resnet50(**options: Any) -> ResNet:
    """25.6 million parameters at 1000 classes; `options` are arguments of `ResNet`."""
    return ResNet(STAGES[50], bottleneck=True, **options)
