"""Trains ResNet-18 or ResNet-50 on CIFAR-10, or on handwritten digits; survives being killed.

    python examples/train_resnet.py                                     # digits, a minute or two
    python examples/train_resnet.py --data cifar-10-batches-py --layers 50 --width 64 --remat

The normalizations are `jax_bn.linen.BatchNorm` with relu and residual inside. Kill it at any
moment: the same command goes on from the last checkpoint, to the same loss curve (see
`resumable.py`).

Needs the extra `examples`: pip install '.[examples]' in a clone.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cifar10
import digits
from digits_options import add_training, whole
import jax
import jax.numpy as jnp
from models.resnet import ResNet, resnet18, resnet50
import numpy as np
import optax
import resumable

import jax_bn

NETWORKS = {18: resnet18, 50: resnet50}
COLUMNS = ("loss", "learning_rate", "test_accuracy")


class Trainer:
    """The network, its data and its optimizer: from the number of a step to the next state.

    Args:
        train_set, test_set: images [N, H, W, C] and labels [N].
        flips: whether a training image may be mirrored, and moved by up to 4 pixels.
        args: the options.
    """

    def __init__(
        self,
        train_set: digits.Images,
        test_set: digits.Images,
        flips: bool,
        args: argparse.Namespace,
    ):
        self.train_set, self.test_set, self.flips, self.args = train_set, test_set, flips, args
        self.steps_per_epoch = len(train_set.labels) // args.batch_size
        self.steps = args.epochs * self.steps_per_epoch
        self.mean, self.std = (
            f(train_set.images, (0, 1, 2), dtype=np.float64).astype(np.float32)
            for f in (np.mean, np.std)
        )
        self.model: ResNet = NETWORKS[args.layers](
            classes=digits.CLASSES,
            width=args.width,
            dtype=jnp.dtype(args.dtype),
            fused=True,  # relu and residual in the normalization
            small_images=True,
            remat_policy=jax_bn.remat_policy if args.remat else None,
        )
        self.schedule: Any = optax.cosine_decay_schedule(args.learning_rate, self.steps)
        self.optimizer = optax.chain(
            # Kernels alone: scale and bias have one axis.
            optax.add_decayed_weights(
                args.weight_decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
            ),
            optax.sgd(self.schedule, momentum=0.9, nesterov=True),
        )
        self.step = jax.jit(self._step)
        self.correct = jax.jit(self._correct)

    def start(self) -> digits.TrainState:
        """The state before the first step."""
        # "rbg": the default generator takes seconds to compile for every shape of weights.
        key = jax.random.key(self.args.seed, impl="rbg")
        image = jnp.zeros((1, *self.train_set.images.shape[1:]))
        variables = jax.jit(partial(self.model.init, train=False))(key, image)
        params = variables["params"]
        return digits.TrainState(params, variables["batch_stats"], self.optimizer.init(params))

    def batch(self, step: int) -> digits.Images:
        """The images of a step, standardized; the same whenever they are asked for."""
        data, args = self.train_set, self.args
        chosen = resumable.shuffled_batch(args.seed, step, len(data.labels), args.batch_size)
        images = data.images[chosen]
        if self.flips:
            images = augment(images, np.random.default_rng([args.seed, step, 1]))
        return digits.Images(self.standardize(images), data.labels[chosen])

    def standardize(self, images: np.ndarray) -> np.ndarray:
        """Mean 0 and variance 1 in each channel of the training set."""
        return (images - self.mean) / self.std

    def _step(self, state: digits.TrainState, batch: digits.Images):
        """One update; returns the loss before it."""

        def loss_of(params):
            variables = dict(params=params, batch_stats=state.batch_stats)
            logits, updated = self.model.apply(
                variables, batch.images, train=True, mutable="batch_stats"
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), updated["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return digits.TrainState(params, batch_stats, opt_state), loss

    def _correct(self, state: digits.TrainState, images, labels, count):
        """How many of the first `count` images the network names rightly."""
        variables = dict(params=state.params, batch_stats=state.batch_stats)
        found: Any = self.model.apply(variables, images, train=False)
        return jnp.sum((found.argmax(-1) == labels) & (jnp.arange(len(labels)) < count))

    def accuracy(self, state: digits.TrainState) -> float:
        """Of the test set, in batches of one size; the last one is filled up."""
        size, right, tests = self.args.batch_size, 0, len(self.test_set.labels)
        for first in range(0, tests, size):
            chosen = np.arange(first, min(first + size, tests))
            filled = np.resize(chosen, size)
            images = self.standardize(self.test_set.images[filled])
            right += int(self.correct(state, images, self.test_set.labels[filled], len(chosen)))
        return right / tests

    def advance(self, state: digits.TrainState, step: int):
        """The next state, and what the CSV says of this step."""
        rate = float(self.schedule(step))
        state, loss = self.step(state, self.batch(step))
        row = dict(loss=float(loss), learning_rate=rate)
        if (step + 1) % self.steps_per_epoch == 0:
            row["test_accuracy"] = self.accuracy(state)
        return state, row


def augment(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each image mirrored or not, and moved by up to 4 pixels; the border is black."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    down, right = random.integers(0, 9, (2, count, 1, 1))
    columns = np.arange(width) + np.zeros((count, 1, 1), int)
    columns = np.where(random.random((count, 1, 1)) < 0.5, columns, width - 1 - columns)
    rows = np.arange(height)[:, None] + down
    return padded[np.arange(count)[:, None, None], rows, columns + right]


def options(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors that only the data show, and the options."""
    parser = argparse.ArgumentParser(
        description="Trains a residual network with jax_bn.linen.BatchNorm on CIFAR-10 or on "
        "handwritten digits; killed at any moment, the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="CIFAR-10's Python files; without it, digits")
    add("--layers", type=int, choices=NETWORKS, default=18, help="ResNet-18 or ResNet-50")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="of the computation; not of weights")
    add("--remat", action="store_true", help="keep less: jax_bn.remat_policy on each block")
    add("--epochs", metavar="N", type=partial(whole, least=1), default=10, help="passes over data")
    add("--weight-decay", metavar="X", type=decay, default=5e-4, help="of kernels")
    add_training(parser)
    resumable.add_run(parser, out="out/resnet")
    return parser, parser.parse_args(argv)


def decay(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 0 to 1")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or goes on with a run."""
    parser, args = options(argv)
    try:
        train_set, test_set = cifar10.load(args.data) if args.data else digits.load_split(args.seed)
    except cifar10.DataError as e:
        parser.error(f"argument --data: {e}")
    images = len(train_set.labels)
    if args.batch_size > images:
        parser.error(
            f"argument --batch-size: {args.batch_size}; expected at most {images}, the number of "
            "training images"
        )
    trainer = Trainer(train_set, test_set, flips=args.data is not None, args=args)
    steps = min(trainer.steps, args.steps or trainer.steps)
    # Not where the data lie, but what they are.
    settings = resumable.settings(args, data=resumable.checksum(*train_set, *test_set))
    try:
        with resumable.Run(args.out, settings, COLUMNS) as run:
            state = resumable.train(
                run, trainer.start(), trainer.advance, steps=steps, every=args.checkpoint_every
            )
    except resumable.RunError as e:
        parser.error(f"argument --out: {e}")
    except FloatingPointError as e:
        parser.error(f"argument --learning-rate: {args.learning_rate}; {e}: choose a smaller one")
    print(f"test accuracy {trainer.accuracy(state):.1%} of {len(test_set.labels)} images")
    print(f"loss curve in {run.csv}")


if __name__ == "__main__":
    main()
