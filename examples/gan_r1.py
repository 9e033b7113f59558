"""Trains a GAN on handwritten digits with an R1 penalty: a gradient of a gradient of batch norm.

    python examples/gan_r1.py       # a few minutes on two cores; out/gan/images.png shows digits

The discriminator D learns to tell real images x from those of the generator G, and pays for the
slope of its logits at the real ones (Mescheder et al. 2018, arXiv:1801.04406):

    loss of D = mean softplus(-D(x)) + mean softplus(D(G(z))) + gamma/2 * mean |dD/dx|^2
    loss of G = mean softplus(-D(G(z)))

The gradient of the penalty is one of second order, and D is batch-normalized, so it goes through
the backward rule of `jax_bn.nnx.BatchNorm` and through that rule's own derivative. With the
statistics of the batch each logit depends on every image of it: dD/dx here is the gradient of the
sum of the logits. Real and generated images are batches of their own, as is usual.

Kill it at any moment: the same command goes on from the last checkpoint (see `resumable.py`).

Needs the extra `examples`: pip install '.[examples]' in a clone.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import digits
from digits_options import rate, whole
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.image
from models.dcgan import Discriminator, Generator
import numpy as np
import optax
import resumable

COLUMNS = ("discriminator_loss", "generator_loss", "penalty", "real_logit", "fake_logit")
GRID = 10  # images in a row and in a column of the picture


class State(NamedTuple):
    """All that a step changes, as one pytree."""

    generator: Any  # parameters
    generator_stats: Any
    generator_opt: optax.OptState
    discriminator: Any
    discriminator_stats: Any
    discriminator_opt: optax.OptState


def penalty(discriminator: nnx.Module, images: jax.Array) -> jax.Array:
    """mean |d sum(D(images)) / d images|^2; the discriminator's averages stay as they are."""
    graphdef, variables = nnx.split(discriminator)

    def logits(images):
        model: Any = nnx.merge(graphdef, variables, copy=True)
        return model(images).sum()

    slopes = jax.grad(logits)(images)
    return jnp.mean(jnp.sum(slopes**2, axis=(1, 2, 3)))


class Trainer:
    """Both networks and their optimizers: from the number of a step to the next state.

    Args:
        images: real ones, [N, 8, 8, 1].
        args: the options.
    """

    def __init__(self, images: np.ndarray, args: argparse.Namespace):
        self.images, self.args = images, args
        rngs = nnx.Rngs(jax.random.key(args.seed, impl="rbg"))
        self.generator, *self.generator_start = nnx.split(
            Generator(args.latent, args.width, rngs=rngs), nnx.Param, nnx.BatchStat
        )
        self.discriminator, *self.discriminator_start = nnx.split(
            Discriminator(args.width, rngs=rngs), nnx.Param, nnx.BatchStat
        )
        self.optimizer = optax.adam(args.learning_rate, b1=0.5, b2=0.99)
        self.step = jax.jit(self._step)
        self.draw = jax.jit(self._draw)

    def start(self) -> State:
        """The state before the first step."""
        (g_params, g_stats), (d_params, d_stats) = self.generator_start, self.discriminator_start
        g_opt, d_opt = map(self.optimizer.init, (g_params, d_params))
        return State(g_params, g_stats, g_opt, d_params, d_stats, d_opt)

    def noise(self, key: jax.Array, count: int) -> jax.Array:
        """What images are generated from, [count, latent]."""
        return jax.random.normal(key, (count, self.args.latent))

    def discriminator_loss(self, params, stats, real, fake):
        """The loss of D, and with it its averages and what the CSV says."""
        model: Any = nnx.merge(self.discriminator, params, stats, copy=True)
        r1 = penalty(model, real)
        real_logits, fake_logits = model(real), model(fake)
        loss = jnp.mean(jax.nn.softplus(-real_logits)) + jnp.mean(jax.nn.softplus(fake_logits))
        row = dict(
            discriminator_loss=loss,
            penalty=r1,
            real_logit=real_logits.mean(),
            fake_logit=fake_logits.mean(),
        )
        return loss + self.args.gamma / 2 * r1, (nnx.state(model, nnx.BatchStat), row)

    def generator_loss(self, params, stats, discriminator, noise):
        """The loss of G, and with it its averages; the averages of D stay as they are."""
        model: Any = nnx.merge(self.generator, params, stats, copy=True)
        judge: Any = nnx.merge(self.discriminator, *discriminator, copy=True)
        loss = jnp.mean(jax.nn.softplus(-judge(model(noise))))
        return loss, nnx.state(model, nnx.BatchStat)

    def _step(self, state: State, real: jax.Array, step: jax.Array):
        """One update of D, then one of G; the noise is drawn by the number of the step."""
        key = jax.random.fold_in(jax.random.key(self.args.seed), step)
        for_d, for_g = (self.noise(k, len(real)) for k in jax.random.split(key))

        generator: Any = nnx.merge(
            self.generator, state.generator, state.generator_stats, copy=True
        )
        grads, (d_stats, row) = jax.grad(self.discriminator_loss, has_aux=True)(
            state.discriminator, state.discriminator_stats, real, generator(for_d)
        )
        updates, d_opt = self.optimizer.update(grads, state.discriminator_opt)
        d_params = optax.apply_updates(state.discriminator, updates)

        (loss, g_stats), grads = jax.value_and_grad(self.generator_loss, has_aux=True)(
            state.generator, state.generator_stats, (d_params, d_stats), for_g
        )
        updates, g_opt = self.optimizer.update(grads, state.generator_opt)
        g_params = optax.apply_updates(state.generator, updates)
        row = row | dict(generator_loss=loss)
        return State(g_params, g_stats, g_opt, d_params, d_stats, d_opt), row

    def advance(self, state: State, step: int):
        """The next state, and what the CSV says of this step."""
        args = self.args
        chosen = resumable.shuffled_batch(args.seed, step, len(self.images), args.batch_size)
        state, row = self.step(state, self.images[chosen], jnp.uint32(step))
        return state, {name: float(value) for name, value in row.items()}

    def _draw(self, state: State) -> jax.Array:
        """GRID * GRID images from one noise, normalized by the running averages."""
        model: Any = nnx.merge(self.generator, state.generator, state.generator_stats)
        model.eval()
        return model(self.noise(jax.random.key(self.args.seed), GRID * GRID))

    def picture(self, state: State, path: Path) -> None:
        """Writes images as one PNG, each pixel enlarged to 6x6, with a margin of one pixel."""
        images = np.pad(np.asarray(self.draw(state))[..., 0], ((0, 0), (1, 0), (1, 0)))
        height, width = images.shape[1:]
        grid = images.reshape(GRID, GRID, height, width).swapaxes(1, 2)
        grid = np.kron(grid.reshape(GRID * height, GRID * width), np.ones((6, 6)))
        save = partial(matplotlib.image.imsave, arr=grid, cmap="gray", vmin=0, vmax=1, format="png")
        resumable.write_whole(path, save)


def options(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors that only the data show, and the options."""
    parser = argparse.ArgumentParser(
        description="Trains a GAN on handwritten digits with jax_bn.nnx.BatchNorm in both networks "
        "and an R1 penalty; killed at any moment, the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = partial(parser.add_argument, metavar="N")
    positive = partial(whole, least=1)
    number("--epochs", type=positive, default=60, help="passes over the images")
    number("--batch-size", type=positive, default=64, help="real images in a step")
    number("--learning-rate", type=rate, default=1e-3, help="of Adam, for both networks")
    number("--gamma", type=rate, default=1.0, help="weight of the penalty")
    number("--latent", type=positive, default=32, help="numbers in the noise of an image")
    number("--width", type=positive, default=16, help="channels at 8x8 pixels")
    number("--seed", type=partial(whole, least=0), default=0, help="of weights, order and noise")
    resumable.add_run(parser, out="out/gan")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or goes on with a run."""
    parser, args = options(argv)
    images = np.concatenate([part.images for part in digits.load_split(args.seed)])
    if args.batch_size > len(images):
        parser.error(
            f"argument --batch-size: {args.batch_size}; expected at most {len(images)}, the number "
            "of images"
        )
    trainer = Trainer(images, args)
    whole_run = args.epochs * (len(images) // args.batch_size)
    picture = args.out / "images.png"
    try:
        with resumable.Run(args.out, resumable.settings(args), COLUMNS) as run:
            state = resumable.train(
                run,
                trainer.start(),
                trainer.advance,
                steps=min(whole_run, args.steps or whole_run),
                every=args.checkpoint_every,
            )
            trainer.picture(state, picture)
    except resumable.RunError as e:
        parser.error(f"argument --out: {e}")
    except FloatingPointError as e:
        parser.error(f"argument --learning-rate: {args.learning_rate}; {e}: choose a smaller one")
    print(f"images in {picture}, metrics in {run.csv}")


if __name__ == "__main__":
    main()
