"""Hand-written stages beside XLA's, and the whole operation beside the definition.

Of an x that is streamed; for one that fits on the chip see `test_resident`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from steps import (
    KERNELS,
    LEAKY,
    assert_right,
    assert_right_inside_shard_map,
    case,
    kernels_in,
)
from tolerance import assert_as_accurate, in_float64

from jax_bn import batch_norm
from jax_bn.kernels import _slabs, _stream

STAGES = {"moments", "normalize", "grad_sums", "grad_input"}


@pytest.fixture(autouse=True)
def _nothing_fits_on_the_chip(monkeypatch):
    monkeypatch.setattr(_slabs, "SHARED_BYTES", 0)


@pytest.mark.parametrize(
    "shape, dtype, activation, fused",
    [
        ((4, 4, 4, 64), "bfloat16", jax.nn.relu, True),
        ((32, 512), "float32", LEAKY, False),
        ((32, 256), "float16", None, True),
        ((3, 7, 7, 24), "bfloat16", jax.nn.relu, True),
        ((10, 96), "float32", jax.nn.relu, False),
    ],
    ids=["few features", "several slabs", "nothing after", "odd examples", "beyond x"],
)
def test_the_whole_operation(shape, dtype, activation, fused, hopper, monkeypatch):
    # One block and small tiles: each warpgroup goes round its ring.
    monkeypatch.setattr(_stream, "BLOCKS", 2)
    monkeypatch.setattr(_stream, "TILE_BYTES", 2 * 2048)
    assert_right(hopper, *case(shape, dtype), activation=activation, fused=fused)


def test_a_squared_sum_that_overflows(hopper):
    """The shift is among the small numbers: sum(d)^2 is beyond float32, and nothing else is."""
    (x, residual, dy), scale, bias = case((64, 32), "float32")
    x = jnp.where(jnp.arange(64)[:, None] < 32, 1e17, 2.5e18) * (1 + x / 100)
    d = (x - jnp.median(x[:3], 0, keepdims=True)).astype("float32")
    assert jnp.isinf(jnp.sum(d, 0) ** 2).all() and jnp.isfinite(jnp.sum(d**2, 0)).all()
    assert_right(hopper, (x, residual, dy), scale, bias, activation=None, fused=False)


# Of networks that are in use: MobileNet, EfficientNet, DenseNet, Inception.
FEATURES = [16, 24, 32, 40, 48, 72, 80, 96, 112, 144, 160, 192, 240, 320, 384, 480, 576, 640, 672]
FEATURES += [960, 1152, 1280, 1920, 64, 256, 2048, 8192, 8]
EXAMPLES = [n * edge**2 for n in (1, 2, 32, 100, 128, 255) for edge in (1, 7, 17, 35, 56, 149)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_of_x_is_in_one_tile(dtype):
    """Whatever the number of examples, and for odd numbers of features too."""
    itemsize = jnp.dtype(dtype).itemsize
    odd = [(8 * n, features) for n in (1, 3, 32) for features in (1, 3, 5, 1001, 8191)]
    for examples, features in [(n, c) for n in EXAMPLES for c in FEATURES] + odd:
        for inputs in (1, 2, 3):
            cut = _stream.tiling(examples, features, itemsize, inputs)
            assert cut.rows * cut.side_by_side == examples
            assert cut.slabs * cut.columns == features * cut.side_by_side
            assert cut.tiles - 1 < cut.rows / cut.tile <= cut.tiles
            # What TMA and the registers take.
            assert cut.columns <= 256 and cut.tile <= 256 and cut.columns * itemsize % 16 == 0
            assert cut.run * cut.columns * itemsize == 128 * 16 and cut.tile % cut.run == 0
            bytes_of_slots = inputs * cut.tile * cut.columns * itemsize
            assert bytes_of_slots <= max(_stream.TILE_BYTES, inputs * 2048)
            assert 1 <= cut.blocks * cut.slabs <= max(_stream.BLOCKS, cut.slabs)


@pytest.mark.long
def test_second_derivatives_are_those_of_xla(hopper):
    (x, _, _), scale, _ = case((16, 256), "float32")

    def along(x, **options):
        y, _ = batch_norm(x, scale, activation=LEAKY, **options)
        return jnp.sum(jnp.sin(y))

    def second(x, **options):
        return jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(partial(along, **options))(x))))(x)

    with hopper():
        actual = second(x, **KERNELS)
    assert_as_accurate(actual, second(x), in_float64(second, x), len(x))


@pytest.mark.long
def test_vmap(hopper):
    """Virtual batches are a vmap over them."""
    (x, _, _), scale, _ = case((32, 256), "float32")

    def dx(x, scale, **options):
        def f(x):
            return jnp.sum(jnp.sin(batch_norm(x, scale, virtual_batch_size=16, **options)[0]))

        return jax.grad(f)(x)

    with hopper():
        actual = dx(x, scale, **KERNELS)
    assert_as_accurate(actual, dx(x, scale), in_float64(dx, x, scale), 16)


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma, hopper):
    assert_right_inside_shard_map(hopper, (16, 256), check_vma, "data")


def test_the_kernels_are_what_runs(hopper):
    x = jnp.ones((16, 256))
    assert kernels_in(hopper, lambda x: batch_norm(x, **KERNELS)[0], x) == STAGES
