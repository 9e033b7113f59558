"""A training step of a small ResNet (examples/models/resnet.py): SGD with momentum, one jit."""

from collections.abc import Callable
from functools import partial
import math
from pathlib import Path
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.failures import FUSED, OURS, attempt
from benchmarks.measure import MOST_COPIES, counted, row
from benchmarks.peers import FLAX, loose, why_missing
from benchmarks.timing import Effort, Program, time_all

ROTATE = 2**26  # bytes of images
LEARNING_RATE, MOMENTUM = 1e-3, 0.9


class Size(NamedTuple):
    """Of the images and of the network."""

    stages: tuple[int, ...]  # blocks of each
    width: int
    batch: int
    edge: int
    bottleneck: bool = False
    small_images: bool = True
    classes: int = 10


FULL = Size((2, 2, 2, 2), 16, 64, 32)  # a narrow ResNet-18
QUICK = Size((1, 1), 8, 32, 16)  # XLA takes half a minute to compile a ResNet-18


def _layers() -> dict[str, tuple[Callable, bool]]:
    """A Flax Linen layer for each implementation that has one, and whether it is fused."""
    from flax import linen

    import jax_bn.linen

    ours = jax_bn.linen.BatchNorm
    return {OURS: (ours, False), FUSED: (ours, True), FLAX: (linen.BatchNorm, False)}


def _why_not(name: str, layers: dict) -> str | None:
    if name in layers:
        return why_missing(name)
    return "the network takes Flax Linen layers: another one would be compared, or another network"


def program(
    layer: Callable, fused: bool, size: Size, dtype: str
) -> tuple[Program, jax.stages.Compiled]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        from models.resnet import ResNet
    finally:
        sys.path.pop(0)
    options: dict[str, Any] = dict(
        stage_sizes=size.stages, bottleneck=size.bottleneck, classes=size.classes,
        width=size.width, small_images=size.small_images, dtype=dtype,
    )  # fmt: skip
    network = ResNet(batch_norm=layer, fused=fused, **options)
    key = jax.random.key(0)
    images = jax.random.normal(key, (size.batch, size.edge, size.edge, 3), dtype)
    labels = jax.random.randint(key, (size.batch,), 0, size.classes)
    shapes: Any = jax.eval_shape(partial(network.init, train=True), key, images)
    variables = _values(shapes)

    def loss(params, stats, images, labels):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = network.apply(variables, images, True, mutable="batch_stats")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), updated["batch_stats"]

    def step(params, stats, velocity, images, labels):
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
            params, stats, images, labels
        )
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity)
        return value, params, stats, velocity

    params, stats = variables["params"], variables["batch_stats"]
    velocity = jax.tree.map(jnp.zeros_like, params)
    copies = min(MOST_COPIES, math.ceil(ROTATE / images.nbytes))
    args = [(params, stats, velocity, jnp.copy(images), labels) for _ in range(copies)]
    compiled = jax.jit(step).lower(*args[0]).compile()
    return Program(compiled, args), compiled


def _values(shapes: Any) -> Any:
    """Variables of these shapes: compiling the network's own `init` takes longer than measuring."""
    random = np.random.default_rng(0)

    def value(path, shape):
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(shape.shape[:-1])
            return jnp.asarray(random.normal(0, math.sqrt(2 / fan_in), shape.shape), shape.dtype)
        return jnp.full(shape.shape, float(name in ("scale", "var")), shape.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def measured(
    size: Size, dtype: str, names: list[str], effort: Effort
) -> tuple[list[dict], list[dict]]:
    """Rows of results, and rows of what was not measured, and why."""
    shape = [size.batch, size.edge, size.edge, 3]
    case = dict(measure="resnet", shape=shape, dtype=dtype)
    programs, counts, reasons = {}, {}, {}
    layers = {} if why_missing(FLAX) else _layers()
    with loose():
        for name in names:
            if why := _why_not(name, layers):
                reasons[name] = why
                continue
            with attempt(name, reasons):
                programs[name], compiled = program(*layers[name], size, dtype)
                counts[name] = counted(compiled)
        timings, failed = time_all(programs, FLAX, effort)
    rows = [
        case | dict(implementation=name, bound_seconds=None) | row(t) | counts[name]
        for name, t in timings.items()
    ]
    left_out = [case | dict(implementation=n, reason=r) for n, r in (reasons | failed).items()]
    return rows, left_out
