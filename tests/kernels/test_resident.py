"""An x that fits on the chip: one kernel forward and one backward, beside XLA's stages."""

from functools import partial
from typing import Any

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
from test_mosaic_gpu import EXAMPLES, FEATURES, STAGES
from tolerance import assert_as_accurate, in_float64

from jax_bn import _stages, batch_norm, batch_renorm
from jax_bn.kernels import _slabs, mosaic_gpu

PASSES = {"forward", "backward"}


@pytest.mark.parametrize(
    "shape, dtype, activation, fused",
    [
        ((4, 8, 8, 32), "bfloat16", jax.nn.relu, True),
        ((296, 32), "bfloat16", LEAKY, False),
        ((304, 16), "float32", None, True),
        ((320, 16), "float16", LEAKY, True),
        ((4, 7, 3, 32), "float32", jax.nn.relu, False),
        ((40, 8), "float32", jax.nn.relu, True),
    ],
    ids=["a conv", "beyond x", "nothing after", "float16", "fewer together", "one run"],
)
def test_the_whole_operation(shape, dtype, activation, fused, hopper):
    arrays, scale, bias = case(shape, dtype)
    x, residual, _ = arrays
    options: Any = KERNELS | dict(activation=activation)
    options |= dict(residual=residual) if fused else {}
    assert kernels_in(hopper, lambda x: batch_norm(x, **options)[0], x) == PASSES
    assert_right(hopper, arrays, scale, bias, activation=activation, fused=fused)


@pytest.mark.parametrize("examples, blocks, row_bytes", [(80, 4, 64), (96, 2, 128)])
def test_wider_slabs(examples, blocks, row_bytes, hopper, monkeypatch):
    """Where narrow ones were more than there are SMs. (JAX keeps programs by the shape of x.)"""
    monkeypatch.setattr(_slabs, "BLOCKS", blocks)
    found = _slabs.fitting(examples, 128, 2, 3)
    assert found and (found.columns * 2, found.slabs) == (row_bytes, 128 * 2 // row_bytes)
    arrays, scale, bias = case((examples, 128), "bfloat16")
    assert_right(hopper, arrays, scale, bias, activation=jax.nn.relu, fused=True)


def test_a_pass_is_its_two_stages(hopper):
    """The definition of a pass, which is made of theirs."""
    (x, residual, dy), scale, bias = case((64, 16), "float32")
    scale, bias = scale[None], bias[None]
    options: Any = dict(activation=LEAKY, axes=(0,))

    def passes(whole, x, residual, dy, scale, bias):
        own = options | dict(dtype=scale.dtype)
        results = whole.forward(x, scale, bias, residual, epsilon=1e-3, y_dtype=x.dtype, **own)
        y, count, mean, _, rstd = results
        kept = _stages.Kept(x, None, count, mean, rstd, scale, bias, y=y)
        return results, whole.backward(dy, kept, **own)

    args = x, residual, dy, scale, bias
    with hopper():
        actual = passes(mosaic_gpu.ON_CHIP, *args)
    oracle = in_float64(partial(passes, _stages.WHOLE), *args)
    assert_as_accurate(actual, passes(_stages.WHOLE, *args), oracle, len(x))


def test_without_scale_and_bias(hopper):
    (x, _, dy), _, _ = case((64, 8), "float32")

    def step(x, **options):
        y, pull = jax.vjp(lambda x: batch_norm(x, **options)[0], x)
        return y, pull(dy.astype(x.dtype))

    with hopper():
        actual = step(x, **KERNELS)
    assert_as_accurate(actual, step(x), in_float64(step, x), len(x))


def test_far_means_and_an_outlier(hopper):
    """The shift is the mean of all: nothing cancels, wherever the first example lies."""
    (x, residual, dy), scale, bias = case((64, 16), "float32")
    x = (x + 1e4).at[0, :8].set(-1e6)
    assert_right(hopper, (x, residual, dy), scale, bias, activation=None, fused=False)


def test_a_squared_sum_that_overflows(hopper):
    (x, residual, dy), scale, bias = case((64, 32), "float32")
    x = jnp.where(jnp.arange(64)[:, None] < 32, 1e17, 2.5e18) * (1 + x / 100)
    assert_right(hopper, (x, residual, dy), scale, bias, activation=None, fused=False)


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_a_nan_is_seen_in_its_feature_alone(activation, hopper):
    (x, _, dy), scale, bias = case((64, 16), "float32")
    x = x.at[5, 3].set(jnp.nan)

    def f(x, scale, bias):
        return batch_norm(x, scale, bias, activation=activation, **KERNELS)

    with hopper():
        y, pull, stats = jax.vjp(f, x, scale, bias, has_aux=True)
        results = y, *pull(dy), stats.mean, stats.var
    assert all(bool(jnp.isnan(v[..., 3]).all()) for v in (y, stats.mean, stats.var))
    for v in results:
        assert bool(jnp.isfinite(jnp.delete(v, 3, -1)).all())


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("fused, most", [(False, 1.01), (True, 2.01)], ids=["alone", "residual"])
def test_what_is_kept(fused, most, forward_mode, hopper):
    """x, and y where z cannot be computed again from it: as by XLA's stages."""
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((2048,), jnp.float32)

    def pull(x, residual, scale, bias):
        options: Any = KERNELS | dict(activation=jax.nn.relu, forward_mode=forward_mode)
        options |= dict(residual=residual) if fused else {}

        def y(*args):
            return batch_norm(*args, **options)[0]

        return jax.vjp(y, x, scale, bias)[1]

    with hopper():
        kept = jax.tree.leaves(jax.eval_shape(pull, x, x, vector, vector))
    assert 1 <= sum(v.size * v.dtype.itemsize for v in kept) / (2 * x.size) < most


def loss(x, scale, bias, residual, **options):
    """Of y and of the statistics."""
    y, stats = batch_norm(x, scale, bias, residual=residual, activation=LEAKY, **options)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(stats.mean) * jnp.sqrt(stats.var))


def test_the_statistics_in_the_loss(hopper):
    (x, residual, _), scale, bias = case((64, 16), "float32")
    args = x, scale, bias, residual

    def gradient(*args, **options):
        return jax.grad(partial(loss, **options), (0, 1, 2, 3))(*args)

    with hopper():
        actual = gradient(*args, **KERNELS)
    assert_as_accurate(actual, gradient(*args), in_float64(gradient, *args), len(x))


@pytest.mark.long
def test_second_derivatives_are_those_of_xla(hopper):
    (x, residual, _), scale, bias = case((32, 8), "float32")
    args = x, scale, bias, residual

    def second(*args, **options):
        def along(*args):
            first = jax.grad(partial(loss, **options), (0, 1, 2, 3))(*args)
            return sum(jnp.sum(jnp.cos(v)) for v in first)

        return jax.grad(along, (0, 1, 2, 3))(*args)

    with hopper():
        actual = second(*args, **KERNELS)
    assert_as_accurate(actual, second(*args), in_float64(second, *args), len(x))


@pytest.mark.long
def test_forward_mode(hopper):
    (x, dx, _), scale, bias = case((32, 8), "float32")

    def tangents(x, dx, **options):
        def f(x):
            y, stats = batch_norm(x, scale, bias, forward_mode=True, **options)
            return y, stats.mean, stats.var

        return jax.jvp(f, (x,), (dx,))

    with hopper():
        actual = tangents(x, dx, **KERNELS)
    assert_as_accurate(actual, tangents(x, dx), in_float64(tangents, x, dx), len(x))


@pytest.mark.long
def test_vmap(hopper):
    """Virtual batches are a vmap over them."""
    (x, _, _), scale, _ = case((128, 16), "float32")

    def dx(x, scale, **options):
        def f(x):
            y, stats = batch_norm(x, scale, virtual_batch_size=64, **options)
            return jnp.sum(jnp.sin(y)), (stats.mean, stats.var)

        return jax.grad(f, has_aux=True)(x)

    with hopper():
        actual = dx(x, scale, **KERNELS)
    assert_as_accurate(actual, dx(x, scale), in_float64(dx, x, scale), 64)


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma, hopper):
    """Without `axis_name`: each device has statistics of its own."""
    assert_right_inside_shard_map(hopper, (64, 16), check_vma, None)


def test_where_the_stages_run(hopper):
    """Where something has to happen between the two of a pass; and a larger x."""
    x = jnp.ones((64, 16))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    over_devices = jax.shard_map(
        lambda x: batch_norm(x, axis_name="data", **KERNELS)[0],
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip

    def renormalized(x, scale):
        v = jnp.ones(16)
        return batch_renorm(x, v, v, scale, **KERNELS)[0]

    assert kernels_in(hopper, over_devices, x) == STAGES
    assert kernels_in(hopper, renormalized, x, x[0]) == {"moments", "normalize", "backward"}
    large = jnp.ones((8192, 16))
    assert kernels_in(hopper, lambda x: batch_norm(x, **KERNELS)[0], large) == STAGES


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_of_x_is_in_one_box(dtype):
    itemsize = jnp.dtype(dtype).itemsize
    fits = 0
    for examples, features in [(n, c) for n in EXAMPLES for c in FEATURES]:
        for arrays in (1, 2, 3):
            cut = _slabs.fitting(examples, features, itemsize, arrays)
            if cut is None:
                continue
            fits += 1
            assert cut.groups * cut.together == examples
            assert cut.slabs * cut.columns == features and cut.slabs <= _slabs.BLOCKS
            assert cut.boxes - 1 < cut.groups / cut.box <= cut.boxes <= 4 * cut.share
            # A run is 8 bytes for each thread; no box begins beyond x or is larger than it.
            assert cut.together * cut.columns * itemsize == 32 * 8
            assert cut.box % 4 == 0 and cut.box <= cut.groups
            assert cut.bytes_of(arrays, itemsize) <= _slabs.SHARED_BYTES < 227 * 1024
    assert fits > 100
