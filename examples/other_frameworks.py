"""jax_bn in short layers for Haiku and for Equinox, trained beside the frameworks' own.

    python examples/other_frameworks.py

The functions `batch_norm`, `normalize` and `update_running_stats` are all it takes; the framework
keeps the arrays. Training is the same as with its own layer, but for rounding. So is evaluation
after many steps; in the first ones it differs, since the running averages begin in other ways:

    ours      m_n = momentum*m_{n-1} + (1 - momentum)*batch, with mean_0 = 0, var_0 = 1: Flax's
    Haiku     the same with mean_0 = var_0 = 0, then debiased as in Adam: divided by 1 - momentum^n
    Equinox   ours, mode="batch", then divided by 1 - momentum^n, and with it what is left of var_0

Needs Haiku or Equinox or both: pip install dm-haiku equinox.
"""

from collections.abc import Callable
from functools import partial
import importlib.util
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_bn

MOMENTUM = 0.9
FEATURES = 8
STEPS = 200  # momentum^200 is 1e-9: how the averages began no longer shows
LEARNING_RATE = 0.1


class Run(NamedTuple):
    """A training: the loss of each step, and the predictions in evaluation after the last."""

    losses: np.ndarray
    evaluated: np.ndarray


def haiku_layer() -> Any:
    """A batch normalization for Haiku: the module's class."""
    import haiku as hk  # pyright: ignore[reportMissingImports]

    class BatchNorm(hk.Module):
        def __call__(self, x, is_training):
            features = x.shape[-1:]
            scale = hk.get_parameter("scale", features, init=jnp.ones)
            offset = hk.get_parameter("offset", features, init=jnp.zeros)
            mean = hk.get_state("mean", features, init=jnp.zeros)
            var = hk.get_state("var", features, init=jnp.ones)
            if not is_training:
                return jax_bn.normalize(x, mean, var, scale, offset)
            y, stats = jax_bn.batch_norm(x, scale, offset)
            mean, var = jax_bn.update_running_stats(mean, var, stats, momentum=MOMENTUM)
            hk.set_state("mean", mean)
            hk.set_state("var", var)
            return y

    return BatchNorm


def equinox_layer() -> Any:
    """A batch normalization for Equinox: of one example, features first, under `vmap`."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    class BatchNorm(eqx.Module):
        scale: jax.Array
        bias: jax.Array
        averages: Any
        inference: bool  # for equinox.nn.inference_mode

        def __init__(self, features):
            self.scale, self.bias = jnp.ones(features), jnp.zeros(features)
            self.averages = eqx.nn.StateIndex((jnp.zeros(features), jnp.ones(features)))
            self.inference = False

        def __call__(self, x, state):
            mean, var = state.get(self.averages)
            if self.inference:
                return jax_bn.normalize(x, mean, var, self.scale, self.bias, axis=0), state
            y, stats = jax_bn.batch_norm(x, self.scale, self.bias, axis=0, axis_name="batch")
            new = jax_bn.update_running_stats(mean, var, stats, momentum=MOMENTUM)
            return y, state.set(self.averages, new)

    return BatchNorm


def train_haiku(ours: bool, x: jax.Array, target: jax.Array) -> Run:
    """Trains linear, batch norm, relu, linear, with our layer or with Haiku's."""
    import haiku as hk  # pyright: ignore[reportMissingImports]

    make = haiku_layer() if ours else partial(hk.BatchNorm, True, True, MOMENTUM)

    def forward(x, is_training):
        x = hk.Linear(FEATURES, with_bias=False)(x)
        return hk.Linear(1)(jax.nn.relu(make(name="bn")(x, is_training)))

    network = hk.transform_with_state(forward)

    def loss(params, state):
        y, state = network.apply(params, state, None, x, True)
        return jnp.mean((y - target) ** 2), state

    losses, params, state = descend(loss, *network.init(jax.random.key(0), x, True))
    y, _ = network.apply(params, state, None, x, False)
    return Run(losses, np.asarray(y))


def train_equinox(ours: bool, x: jax.Array, target: jax.Array) -> Run:
    """The same with Equinox."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    def own(features):
        return eqx.nn.BatchNorm(features, "batch", momentum=MOMENTUM, mode="batch")

    make = equinox_layer() if ours else own

    class Network(eqx.Module):
        first: eqx.nn.Linear
        bn: Any
        last: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0))
            self.first = eqx.nn.Linear(x.shape[-1], FEATURES, use_bias=False, key=keys[0])
            self.bn = make(FEATURES)
            self.last = eqx.nn.Linear(FEATURES, 1, key=keys[1])

        def __call__(self, x, state):
            y, state = self.bn(self.first(x), state)
            return self.last(jax.nn.relu(y)), state

    model, state = eqx.nn.make_with_state(Network)()
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def predict(model, state):
        return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)

    def loss(params, state):
        y, state = predict(eqx.combine(params, rest), state)
        return jnp.mean((y - target) ** 2), state

    losses, params, state = descend(loss, params, state)
    y, _ = predict(eqx.nn.inference_mode(eqx.combine(params, rest)), state)
    return Run(losses, np.asarray(y))


def descend(loss: Callable[..., Any], params: Any, state: Any) -> tuple[np.ndarray, Any, Any]:
    """The losses of gradient descent; the parameters and the state after it."""

    @jax.jit
    def step(params, state):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state)
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
        return value, params, state

    losses = []
    for _ in range(STEPS):
        value, params, state = step(params, state)
        losses.append(float(value))
    return np.array(losses), params, state


FRAMEWORKS = {"haiku": ("dm-haiku", train_haiku), "equinox": ("equinox", train_equinox)}


def compare(train: Callable[[bool, jax.Array, jax.Array], Run]) -> tuple[Run, Run]:
    """The training with our layer and with the framework's."""
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (32, 4))
    target = jnp.sin(x.sum(-1, keepdims=True))
    return train(True, x, target), train(False, x, target)


def main() -> None:
    """Trains with what is installed, prints the losses and how far they are apart."""
    missing = 0
    for name, (package, train) in FRAMEWORKS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: pip install {package}")
            missing += 1
            continue
        ours, own = compare(train)
        row = "{:>12}  {:>10}  {:>10}".format
        print(row("loss at step", name, "jax_bn"))
        for i in range(0, STEPS, STEPS // 5):
            print(row(i + 1, f"{own.losses[i]:.6f}", f"{ours.losses[i]:.6f}"))
        loss, y = (np.abs(a - b).max() for a, b in zip(ours, own, strict=True))
        print(f"largest differences: of the losses {loss:.1e}, in evaluation {y:.1e}\n")
    if missing == len(FRAMEWORKS):
        sys.exit("none of the frameworks is here")


if __name__ == "__main__":
    main()
