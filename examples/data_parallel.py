"""Trains the digits network on several processes at once, each with its own share of every batch.

    python examples/data_parallel.py --processes 4 --uneven        # four, on this machine's CPU

Several processes compute what one would: the statistics of `jax_bn.nnx.BatchNorm`, the loss and its
gradient are those of the whole batch, also where the shares differ in size. XLA needs arrays of one
shape on all devices, so the shorter shares are padded, and a mask says which examples count. With
the same options and another number of processes the loss curve is the same but for rounding, which
training magnifies from step to step.

On a cluster of GPU or TPU hosts start one process per host, which drives all devices of its host:

    python examples/data_parallel.py --coordinator host0:8476 --num-processes 2 --process-id 0
    python examples/data_parallel.py --coordinator host0:8476 --num-processes 2 --process-id 1

the first on host0, the other on the second host. Where JAX finds the peers by itself, `--cluster`
replaces these three options: on Cloud TPU and Kubernetes one process per host, under Slurm and Open
MPI one per device.

A process that fails ends the others. Those that this script has launched end at once, and it says
which one was the first. Those started by hand end when JAX notices: at once where a connection
breaks, else after `--timeout` seconds without a sign of life.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
import json
import math
import os
import sys
from typing import NamedTuple

import digits
from digits_options import add_training, whole, writable
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from local_processes import launch
import numpy as np
import optax
from tqdm import tqdm

import jax_bn.nnx

DATA = "data"  # the one axis of the mesh: all devices of all processes


class Batch(NamedTuple):
    """One share of a batch, or all of them one after the other; padded."""

    images: np.ndarray
    labels: np.ndarray
    valid: np.ndarray  # bool[N]: which examples are no padding


class Trainer(digits.Trainer):
    """The trainer for one network, on each device with its own share of the batch.

    `step` runs inside `jax.shard_map(check_vma=True)`, where JAX knows that the weights are the
    same on all devices and the shares are not. So the gradient of the loss, which is a sum over
    devices, comes out summed over devices, and there is no `pmean` of gradients to write: it would
    be wrong for shares of unequal size.
    """

    def loss(self, params, batch_stats, batch):
        """The mean cross entropy of the valid examples of all devices, and the running averages."""
        model = nnx.merge(self.graphdef, params, batch_stats, copy=True)
        logits = model(batch.images, batch.valid)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        here = jnp.sum(losses, where=batch.valid), jnp.sum(batch.valid, dtype=losses.dtype)
        total, count = lax.psum(here, DATA)
        return total / count, nnx.state(model, nnx.BatchStat)


def create(args: argparse.Namespace) -> tuple[Trainer, digits.TrainState]:
    """The network with synchronized statistics; on every process with the same weights."""
    # momentum 0.9: the default, 0.99, has not forgotten the start after so few steps.
    layer = partial(jax_bn.nnx.BatchNorm, axis_name=DATA, momentum=0.9)
    optimizer = optax.sgd(args.learning_rate, momentum=0.9, nesterov=True)
    trainer, state = digits.create(layer, width=args.width, seed=args.seed, optimizer=optimizer)
    return Trainer(*trainer), state


def train(
    trainer: Trainer,
    state: digits.TrainState,
    data: digits.Images,
    args: argparse.Namespace,
    mesh: Mesh,
) -> tuple[digits.TrainState, list[float]]:
    """Trains on the devices of the mesh; all processes that have some of them call this.

    Returns:
        The last state, on this process's devices alone, and the loss of every step.
    """
    step = jax.jit(
        jax.shard_map(
            trainer.step,
            mesh=mesh,
            in_specs=(P(), P(DATA)),
            out_specs=(P(), P()),
            check_vma=True,
        )
    )
    state = to_devices(state, mesh, P())
    losses = []
    batches = islice(whole_batches(data, args), args.steps)
    quiet = jax.process_index() != 0
    with tqdm(batches, total=args.steps, desc="training", unit="step", disable=quiet) as progress:
        for chosen in progress:
            batch = to_devices(own_shares(data, chosen, mesh, args.uneven), mesh, P(DATA))
            state, loss = step(state, batch)
            losses.append(float(loss))
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}")
    return jax.tree.map(lambda a: a.addressable_data(0), state), losses


def whole_batches(data: digits.Images, args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Without end, the images of each batch by their numbers: on every process the same."""
    random = np.random.default_rng(args.seed)

    def shuffled():
        while True:
            yield from random.permutation(len(data.labels))

    images = shuffled()
    while True:
        yield np.fromiter(islice(images, args.batch_size), int)


def own_shares(data: digits.Images, chosen: np.ndarray, mesh: Mesh, uneven: bool) -> Batch:
    """The shares of this process's devices, all padded to the size of the largest of any device.

    `uneven`: device i gets i + 1 parts of the batch, not one. No size needs to divide another.
    """
    parts = np.arange(mesh.size) + 1 if uneven else np.ones(mesh.size)
    ends = np.rint(len(chosen) * parts.cumsum() / parts.sum()).astype(int)
    shares = np.split(chosen, ends[:-1])
    size = max(map(len, shares))
    own = [
        share
        for share, device in zip(shares, mesh.devices, strict=True)
        if device.process_index == jax.process_index()
    ]
    # Padded with more of the same images, not with zeros: a mask that is not heeded would show.
    padded = np.concatenate([np.resize(share, size) for share in own])
    valid = np.concatenate([np.arange(size) < len(share) for share in own])
    return Batch(data.images[padded], data.labels[padded], valid)


def to_devices(tree, mesh: Mesh, spec: P):
    """What this process holds of each array, as its part of one array over all processes."""
    sharding = NamedSharding(mesh, spec)

    def put(own):
        return jax.make_array_from_process_local_data(sharding, np.asarray(own))

    return jax.tree.map(put, tree)


def meet(args: argparse.Namespace) -> None:
    """Makes this process one of several; returns when all are there."""
    sys.excepthook = end_at_once
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs; others have theirs
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process_id,
        initialization_timeout=args.timeout,
        heartbeat_timeout_seconds=args.timeout,
        shutdown_timeout_seconds=args.timeout,
    )


def end_at_once(*error) -> None:
    """For an uncaught error. JAX would have this process wait for its peers, which wait for it."""
    sys.__excepthook__(*error)
    sys.stderr.flush()
    os._exit(1)


def run(args: argparse.Namespace) -> None:
    """Trains as one process of several, which has met the others; process 0 reports."""
    train_set, test_set = digits.load_split(args.seed)
    mesh = jax.make_mesh((jax.device_count(),), (DATA,), (AxisType.Auto,))
    trainer, state = create(args)
    state, losses = train(trainer, state, train_set, args, mesh)
    if jax.process_index() == 0:
        tests = len(test_set.labels)
        correct = int(jax.jit(trainer.correct)(state, test_set))
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(f"final loss {losses[-1]:.5f}")
        print(f"test accuracy {correct / tests:.1%} of {tests} images")
        if args.losses:
            args.losses.write_text(json.dumps(losses) + "\n")
    jax.distributed.shutdown()


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves the lines of the description as they are, and adds the defaults."""


def options(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors that only the data show, and the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    where = parser.add_argument_group(
        "processes", "--processes alone, or nothing, starts all of them on this machine's CPU"
    )
    number = partial(where.add_argument, metavar="N")
    number(
        "--processes", "--num-processes", type=partial(whole, least=1), help="how many; 2 if alone"
    )
    number("--process-id", type=partial(whole, least=0), help="which one this is, from 0")
    where.add_argument("--coordinator", metavar="HOST:PORT", type=address, help="of process 0")
    where.add_argument("--cluster", action="store_true", help="let JAX find out these three")
    number("--timeout", type=partial(whole, least=1), default=60, help="seconds to wait for peers")

    training = parser.add_argument_group("training, the same for all processes")
    steps = partial(training.add_argument, "--steps", metavar="N", default=110)
    steps(type=partial(whole, least=1), help="how many batches")
    add_training(training)
    training.add_argument("--uneven", action="store_true", help="device i gets i + 1 parts, not 1")
    training.add_argument("--losses", metavar="PATH", type=writable, help="loss curve, as JSON")

    args = parser.parse_args(argv)
    place = {
        "--coordinator": args.coordinator,
        "--num-processes": args.processes,
        "--process-id": args.process_id,
    }
    given = [name for name, value in place.items() if value is not None]
    missing = [name for name in place if name not in given]
    if args.cluster and given:
        parser.error(f"argument --cluster: finds {', '.join(given)} by itself; leave that out")
    if missing and given not in ([], ["--num-processes"]):
        parser.error(f"argument {given[-1]}: one process of several needs {', '.join(missing)} too")
    if not missing and args.process_id >= args.processes:
        parser.error(
            f"argument --process-id: {args.process_id}; expected less than {args.processes}, the "
            "number of processes"
        )
    return parser, args


def address(text: str) -> str:
    """A host and a port."""
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r}; expected HOST:PORT, as in host0:8476")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as one of several processes, or launches all of them."""
    argv = sys.argv[1:] if argv is None else argv
    parser, args = options(argv)
    if not (args.cluster or args.coordinator):
        launch(__file__, argv, args.processes or 2)
        return
    try:
        meet(args)
    except ValueError as e:
        if not args.cluster:
            raise
        parser.error(
            f"argument --cluster: JAX finds no cluster here ({e}); expected --coordinator, "
            "--num-processes and --process-id instead"
        )
    try:
        run(args)
    except FloatingPointError as e:
        parser.error(f"argument --learning-rate: {args.learning_rate}; {e}: choose a smaller one")


if __name__ == "__main__":
    main()
