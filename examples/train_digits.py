"""Trains a residual network on handwritten digits with jax_bn's layer and with Flax's.

Both start from the same weights and see the same batches in the same order; they differ in
`jax_bn.nnx.BatchNorm` against `flax.nnx.BatchNorm` and in nothing else. A third one, Flax's layer
with its other formula for the variance, is the yardstick: two float32 computations of one thing
differ in the last digit, training magnifies that, and the third loss curve shows by how much.

Prints one table, draws the loss curves.

Needs the extra `examples`: pip install '.[examples]' in a clone.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
import json
import math
import platform
import time
from typing import Any

import digits
from digits_options import add_training, whole, writable
import digits_report
from flax import __version__ as flax_version, nnx
import jax
from jax.extend.core import Var
import numpy as np
import optax
from tqdm import tqdm

import jax_bn
import jax_bn.nnx

LAYERS = {
    "jax_bn": jax_bn.nnx.BatchNorm,
    "flax": nnx.BatchNorm,
    "flax with use_fast_variance=False": partial(nnx.BatchNorm, use_fast_variance=False),
}


@dataclass
class Run:
    """One network in training, and what is measured of it."""

    trainer: digits.Trainer
    state: digits.TrainState
    step: Callable  # compiled
    kept_bytes: int
    temporary_bytes: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step


def create_run(layer: Callable, optimizer, batch: digits.Images, args: argparse.Namespace) -> Run:
    """A network with this layer, its training step compiled for batches like this one."""
    # momentum 0.9: the default, 0.99, has not forgotten the start after so few steps.
    layer = partial(layer, momentum=0.9)
    trainer, state = digits.create(layer, width=args.width, seed=args.seed, optimizer=optimizer)
    step: Any = jax.jit(trainer.step).lower(state, batch).compile()
    temporaries = step.memory_analysis().temp_size_in_bytes
    return Run(trainer, state, step, kept_bytes(trainer, state, batch), temporaries)


def kept_bytes(trainer: digits.Trainer, state: digits.TrainState, batch: digits.Images) -> int:
    """Bytes that JAX's autodiff keeps from the forward pass of the loss for its backward pass.

    The sum over the arrays inside the function that `jax.vjp` returns: each array counted once,
    however often it is used; the arguments of the loss (weights, running averages, batch) left out,
    since they exist anyway; constants left out, since a compiler does not store them.
    """

    def backward(params, batch_stats, batch):
        return jax.vjp(lambda p: trainer.loss(p, batch_stats, batch), params, has_aux=True)[1]

    traced, shapes = jax.make_jaxpr(backward, return_shape=True)(
        state.params, state.batch_stats, batch
    )
    arguments = set(traced.jaxpr.invars)
    varying = set(arguments)  # what depends on the arguments; all else is constant
    for eqn in traced.jaxpr.eqns:
        if any(isinstance(v, Var) and v in varying for v in eqn.invars):
            varying.update(eqn.outvars)
    sizes = {
        v: array.size * array.dtype.itemsize
        for v, array in zip(traced.jaxpr.outvars, jax.tree.leaves(shapes), strict=True)
        if isinstance(v, Var) and v in varying and v not in arguments
    }
    return sum(sizes.values())


def train(runs: list[Run], data: digits.Images, args: argparse.Namespace) -> None:
    """Trains all runs at once, one step of each in turn, and notes every loss and its time.

    In turn, so that whatever else the machine does slows all of them alike, and the ratio of the
    times of one step means something; and with another one first each time.
    """
    steps = len(data.labels) // args.batch_size
    order = np.random.default_rng(args.seed)
    with tqdm(total=args.epochs * steps, desc="training", unit="step") as progress:
        for _ in range(args.epochs):
            shuffled = order.permutation(len(data.labels))[: steps * args.batch_size]
            for chosen in np.split(shuffled, steps):
                batch = jax.device_put(digits.Images(data.images[chosen], data.labels[chosen]))
                first = progress.n % len(runs)
                for run in runs[first:] + runs[:first]:
                    start = time.perf_counter()
                    run.state, loss = jax.block_until_ready(run.step(run.state, batch))
                    run.seconds.append(time.perf_counter() - start)
                    run.losses.append(float(loss))
                    if not math.isfinite(run.losses[-1]):
                        raise FloatingPointError(f"the loss is {loss} at step {progress.n + 1}")
                progress.update()
            progress.set_postfix(loss=f"{runs[0].losses[-1]:.4f}")


def compare(runs: list[Run], test_set: digits.Images, steps_per_epoch: int) -> digits_report.Result:
    """What the table shows, from the finished runs."""
    ours, flax, flax_other = runs
    tests = len(test_set.labels)

    def accuracy(run: Run) -> float:
        return int(jax.jit(run.trainer.correct)(run.state, test_set)) / tests

    def final_loss(run: Run) -> float:
        return float(np.mean(run.losses[-steps_per_epoch:]))

    apart = np.abs(np.subtract(ours.losses, flax.losses))
    return digits_report.Result(
        test_images=tests,
        test_accuracy=(accuracy(ours), accuracy(flax)),
        final_loss=(final_loss(ours), final_loss(flax)),
        loss_difference_first_step=float(apart[0]),
        loss_difference_largest=float(apart.max()),
        loss_difference_largest_flax_to_flax=float(
            np.abs(np.subtract(flax_other.losses, flax.losses)).max()
        ),
        steps=len(ours.losses),
        time_ratio=float(np.median(np.divide(ours.seconds, flax.seconds))),
        kept_bytes=(ours.kept_bytes, flax.kept_bytes),
        temporary_bytes=(ours.temporary_bytes, flax.temporary_bytes),
    )


def options(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors that only the data show, and the options, each checked by itself."""
    parser = argparse.ArgumentParser(
        description="Trains one residual network on handwritten digits with jax_bn.nnx.BatchNorm "
        "and with flax.nnx.BatchNorm, prints a table and draws the loss curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    epochs = partial(parser.add_argument, "--epochs", metavar="N", default=15)
    epochs(type=partial(whole, least=1), help="passes over the images")
    add_training(parser)
    file = partial(parser.add_argument, metavar="PATH", type=writable)
    file("--out", default="out/demo.png", help="where to draw the loss curves, as PNG")
    file("--json", help="where to write the numbers of the table, if anywhere")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table, writes the files."""
    parser, args = options(argv)
    train_set, test_set = digits.load_split(args.seed)
    images = len(train_set.labels)
    if args.batch_size > images:
        parser.error(
            f"argument --batch-size: {args.batch_size}; expected at most {images}, the number of "
            "training images"
        )
    steps_per_epoch = images // args.batch_size
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps_per_epoch)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    batch = digits.Images(*(a[: args.batch_size] for a in train_set))
    runs = [
        create_run(layer, optimizer, batch, args)
        for layer in tqdm(LAYERS.values(), desc="compiling", unit="network")
    ]
    try:
        train(runs, train_set, args)
    except FloatingPointError as e:
        parser.error(f"argument --learning-rate: {args.learning_rate}; {e}: choose a smaller one")
    result = compare(runs, test_set, steps_per_epoch)
    losses = {name: run.losses for name, run in zip(LAYERS, runs, strict=True)}
    digits_report.plot(losses, result, args.out)
    print(digits_report.table(result))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "json")}
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax_version,
            "jax_bn": jax_bn.__version__,
            "settings": settings,
            "result": asdict(result),
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
