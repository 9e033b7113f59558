"""Without a name: kernels where they were measured to be faster, in programs for that GPU alone.

What a program for an H200 has in it is counted in `tests/aot`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import case, kernels_in
from tolerance import assert_as_accurate, in_float64

from benchmarks import gpu_programs
from benchmarks.compiled import seen_by_pallas
from jax_bn import _implementation, batch_norm

SHAPE = (4, 4, 4, 16)  # fits on the chip
RESIDUAL = np.ones(SHAPE, np.float32)


@pytest.fixture
def measured(monkeypatch):
    """As if the kernels were faster at SHAPE, and the device here a GPU."""
    if jax.__version_info__ < _implementation.OLDEST_JAX:
        pytest.skip(f"no kernels for jax {jax.__version__}")
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    monkeypatch.setattr(_implementation, "FASTER", {("NVIDIA H200", "float32", 64, 16)})
    return seen_by_pallas


def losses(x, residual, dy, scale, bias, **options):
    """y, first and second derivatives, and all of it mapped."""
    options |= dict(residual=residual, activation=jax.nn.relu)

    def loss(x, scale, bias, **options):
        y, stats = batch_norm(x, scale, bias, **options)
        return jnp.sum(dy * y * y) + jnp.sum(stats.var)

    def of(*args):
        return loss(*args, **options)

    gradient = jax.grad(of, (0, 1, 2))(x, scale, bias)
    second = jax.grad(lambda x: jnp.sum(jax.grad(of)(x, scale, bias) * dy))(x)
    mapped = jax.vmap(lambda x: batch_norm(x, scale, bias, **options)[0])(jnp.stack([x, dy]))
    return of(x, scale, bias), gradient, second, mapped


def test_other_platforms_get_xlas_stages(measured):
    """To rounding: one function in the place of two, which the compiler fuses as it likes."""
    arrays, scale, bias = case(SHAPE, "float32")
    args = *arrays, scale, bias
    with measured():
        found = jax.jit(lambda *args: losses(*args))(*args)
    assert_as_accurate(found, jax.jit(losses)(*args), in_float64(losses, *args), 64)


@pytest.mark.parametrize(
    "options, kernels",
    [
        ({}, {"forward", "backward"}),
        (
            dict(residual=np.ones(SHAPE, np.float32), activation=jax.nn.relu),
            {"forward", "backward"},
        ),
        (dict(implementation="xla"), set()),
        (dict(mask=np.arange(4)[:, None, None] < 3), set()),
        (dict(activation=jax.nn.gelu), set()),
        (dict(axis=0), set()),
        (dict(dtype="bfloat16"), set()),
    ],
    ids=["there", "fused", "by name", "masked", "gelu", "other features", "another y"],
)
def test_where_they_can_run(options: dict[str, Any], kernels, measured):
    (x, *_), _, _ = case(SHAPE, "float32")

    def f(x):
        return batch_norm(x, **options)[0]

    assert kernels_in(measured, f, x) == kernels


def test_not_for_another_shape_or_dtype(measured):
    (x, *_), _, _ = case(SHAPE, "float32")
    for other in (x[:2], x.astype(jnp.bfloat16), x[..., :8]):
        assert not kernels_in(measured, lambda x: batch_norm(x)[0], other)


def test_the_benchmark_of_xlas_stages_is_of_these(measured):
    (x, *_), scale, bias = case(SHAPE, "float32")
    for name, expected in (("jax_bn", set()), ("jax_bn kernels", {"forward", "backward"})):
        peer: Any = gpu_programs.peer(name, gpu_programs.AFTER["nothing"])  # of a tuple
        apply, state = peer.make((x,))
        f = partial(lambda apply, state, x: apply((x,), scale, bias, state)[0], apply, state)
        assert kernels_in(measured, f, x) == expected


def test_nobody_is_asked_what_the_device_is_for_another_shape(monkeypatch):
    monkeypatch.setattr(_implementation, "_device_kind", lambda: pytest.fail("asked"))
    jax.eval_shape(batch_norm, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
