"""The data, the network and the training step that the examples share.

The data are scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the
package, so nothing is downloaded. The network takes its batch normalization as an argument, which
is all that differs between a run with `jax_bn.nnx.BatchNorm` and one with Flax's own layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

CLASSES = 10


class Images(NamedTuple):
    """Images [N, 8, 8, 1] in [0, 1], float32, and their labels [N], int32."""

    images: np.ndarray
    labels: np.ndarray


def load_split(seed: int) -> tuple[Images, Images]:
    """The training set, four fifths of the data, and the test set, one fifth; drawn by `seed`."""
    from sklearn.datasets import load_digits  # here, for it takes a second, and `--help` needs none

    data: Any = load_digits()
    images = data.images[..., None].astype(np.float32) / 16  # pixels count from 0 to 16
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [len(labels) // 5])
    return Images(images[train], labels[train]), Images(images[test], labels[test])


class Block(nnx.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)): the residual block of He et al. 2016.

    The convolutions have no bias: batch normalization subtracts whatever it would add.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, batch_norm: Any, *, rngs: nnx.Rngs
    ):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(channels_in, channels, (3, 3), strides=stride)
        self.bn1 = batch_norm(channels, rngs=rngs)
        self.conv2 = conv(channels, channels, (3, 3))
        self.bn2 = batch_norm(channels, rngs=rngs)
        if stride == 1 and channels_in == channels:
            self.conv3 = self.bn3 = None  # the shortcut is x itself
        else:
            self.conv3 = conv(channels_in, channels, (1, 1), strides=stride)
            self.bn3 = batch_norm(channels, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[N, H, W, channels_in] -> [N, H/stride, W/stride, channels]; mask [N, 1, 1, 1]."""
        y = nnx.relu(self.bn1(self.conv1(x), mask=mask))
        y = self.bn2(self.conv2(y), mask=mask)
        if self.conv3 is not None and self.bn3 is not None:
            x = self.bn3(self.conv3(x), mask=mask)
        return nnx.relu(y + x)


class Network(nnx.Module):
    """A stem, three residual blocks, the mean over the image, one linear layer: 8 layers deep.

    Args:
        batch_norm: called as `batch_norm(channels, rngs=rngs)`, once per normalization.
        width: channels of the first block; the others have twice as many.
        rngs: for the initial weights.
    """

    def __init__(self, batch_norm: Callable[..., nnx.Module], width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.bn = batch_norm(width, rngs=rngs)
        self.block1 = Block(width, width, 1, batch_norm, rngs=rngs)
        self.block2 = Block(width, 2 * width, 2, batch_norm, rngs=rngs)
        self.block3 = Block(2 * width, 2 * width, 1, batch_norm, rngs=rngs)
        self.linear = nnx.Linear(2 * width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Images [N, 8, 8, 1] -> logits [N, 10]; the statistics are of the valid [N] alone."""
        mask = None if valid is None else valid[:, None, None, None]
        x = nnx.relu(self.bn(self.conv(x), mask=mask))
        for block in (self.block1, self.block2, self.block3):
            x = block(x, mask)
        return self.linear(x.mean((1, 2)))


class TrainState(NamedTuple):
    """All that a step changes, as one pytree."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState


class Trainer(NamedTuple):
    """The network and its optimizer as pure functions of a `TrainState`."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation

    def loss(self, params, batch_stats, batch):
        """The mean cross entropy of one batch, and the running averages after it."""
        model = nnx.merge(self.graphdef, params, batch_stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch.images), batch.labels)
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    def step(self, state: TrainState, batch) -> tuple[TrainState, jax.Array]:
        """One update; returns the loss before it."""
        params, batch_stats, opt_state = state
        (loss, batch_stats), grads = jax.value_and_grad(self.loss, has_aux=True)(
            params, batch_stats, batch
        )
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return TrainState(params, batch_stats, opt_state), loss

    def correct(self, state: TrainState, data: Images) -> jax.Array:
        """How many images the network names rightly, normalizing with the running averages."""
        model = nnx.merge(self.graphdef, state.params, state.batch_stats)
        model.eval()
        return jnp.sum(model(data.images).argmax(-1) == data.labels)


def create(
    batch_norm: Callable[..., nnx.Module],
    *,
    width: int,
    seed: int,
    optimizer: optax.GradientTransformation,
) -> tuple[Trainer, TrainState]:
    """A network with this batch normalization, and the state to train it from.

    The same `width` and `seed` give the same initial weights whatever `batch_norm` is, as long as
    it draws from `rngs` as Flax's does.
    """
    # "rbg": the default generator takes seconds to compile for every shape of weights.
    model = Network(batch_norm, width, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    state = TrainState(params, batch_stats, optimizer.init(params))
    return Trainer(graphdef, optimizer), state
