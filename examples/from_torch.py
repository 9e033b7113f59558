"""Takes over a PyTorch network in the middle of its training, and goes on in Flax NNX with jax_bn.

A small convolutional network learns the handwritten digits in PyTorch. After some steps
`jax_bn.torch` and three transposed arrays make the same network of it in Flax; then both go on with
the same batches, each with a new optimizer. Prints the two loss curves side by side, how far they
are apart, and how many images of the test set each names rightly in evaluation.

Needs PyTorch and the extra `examples`: pip install '.[examples]' in a clone.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
import sys
from typing import Any

import digits
from digits_options import rate, whole
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_bn.nnx import BatchNorm
from jax_bn.torch import fields_from_torch, model_from_torch

BATCH = 64
WIDTH = 16
MOMENTUM = 0.9  # of the optimizers


def torch_network(torch: Any) -> Any:
    """The network as PyTorch has it: the features second."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, digits.CLASSES),
    )


class Network(nnx.Module):
    """The same for JAX: the features last."""

    def __init__(self, rngs: nnx.Rngs, **batch_norm):
        self.conv = nnx.Conv(1, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.bn = BatchNorm(WIDTH, activation=nnx.relu, rngs=rngs, **batch_norm)
        self.linear = nnx.Linear(4 * WIDTH, digits.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [N, 8, 8, 1] -> logits [N, 10]."""
        x = nnx.max_pool(self.bn(self.conv(x)), (4, 4), strides=(4, 4))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # flattened in PyTorch's order
        return self.linear(x)


def converted(network: Any) -> Network:
    """The network with the weights and the running averages of the one in PyTorch."""
    model = Network(nnx.Rngs(0), **fields_from_torch(network[1]))
    state_dict = network.state_dict()
    state = model_from_torch(nnx.to_pure_dict(nnx.state(model)), state_dict, {"1": "bn"})

    def array(name: str, *order: int) -> jax.Array:
        return jnp.array(state_dict[name].numpy().transpose(order))  # a copy: PyTorch trains on

    state["conv"]["kernel"] = array("0.weight", 2, 3, 1, 0)
    state["linear"] = {"kernel": array("5.weight", 1, 0), "bias": array("5.bias", 0)}
    nnx.update(model, state)
    return model


def train_in_torch(torch: Any, network: Any, batches, learning_rate: float) -> Iterator[float]:
    """The loss of each step of gradient descent."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), learning_rate, momentum=MOMENTUM)
    for batch in batches:
        logits = network(torch.from_numpy(batch.images).movedim(-1, 1))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def train_in_flax(model: Network, batches, learning_rate: float) -> Iterator[float]:
    """The same."""
    optimizer = nnx.Optimizer(model, optax.sgd(learning_rate, MOMENTUM), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model(batch.images), batch.labels
            )
            return losses.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model.train()
    for batch in batches:
        yield step(model, optimizer, batch).item()


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, each checked by itself."""
    parser = argparse.ArgumentParser(
        description="Starts to train a network in PyTorch, goes on in PyTorch and in Flax NNX with "
        "jax_bn, and prints both loss curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = partial(parser.add_argument, metavar="N")
    number("--steps-before", type=partial(whole, least=0), default=50, help="in PyTorch alone")
    number("--steps", type=partial(whole, least=1), default=100, help="in both")
    number("--learning-rate", type=rate, default=0.05, help="the same in all steps")
    number("--seed", type=partial(whole, least=0), default=0, help="of split, weights and order")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, converts, trains on, prints."""
    args = options(argv)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        sys.exit(
            f"This example needs PyTorch ({e}). For CPUs alone: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
    train_set, test_set = digits.load_split(args.seed)
    rng = np.random.default_rng(args.seed)
    batches = []
    for _ in range(args.steps_before + args.steps):
        chosen = rng.choice(len(train_set.labels), BATCH, replace=False)
        batches.append(digits.Images(train_set.images[chosen], train_set.labels[chosen]))
    before, after = batches[: args.steps_before], batches[args.steps_before :]

    torch.set_num_threads(1)  # on arrays this small several would wait for each other
    torch.manual_seed(args.seed)
    network = torch_network(torch)
    losses = list(train_in_torch(torch, network, before, args.learning_rate))
    model = converted(network)
    theirs = np.array(list(train_in_torch(torch, network, after, args.learning_rate)))
    ours = np.array(list(train_in_flax(model, after, args.learning_rate)))

    network.eval()
    model.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(test_set.images).movedim(-1, 1)).numpy()
    our_logits = model(jnp.asarray(test_set.images))
    right = [np.mean(np.argmax(y, -1) == test_set.labels) for y in (logits, our_logits)]
    row = "{:>20}  {:>10}  {:>10}".format
    print(row("loss at step", "PyTorch", "jax_bn"))
    for i in range(0, len(before), max(1, len(before) // 5)):
        print(row(i + 1, f"{losses[i]:.6f}", ""))
    for i in sorted({*range(0, len(after), max(1, len(after) // 10)), len(after) - 1}):
        print(row(len(before) + i + 1, f"{theirs[i]:.6f}", f"{ours[i]:.6f}"))
    print(row("test accuracy", *(f"{share:.1%}" for share in right)))
    print(f"largest difference of the losses: {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main()
