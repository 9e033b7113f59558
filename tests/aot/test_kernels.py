"""The hand-written stages, compiled for an H200: which kernels, how many registers, no spills."""

from functools import partial
import math
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import (
    collectives_in,
    described_h200s,
    kernels as launched,
    seen_by_pallas,
)
import jax_bn
from jax_bn.kernels import _slabs, _stream
from jax_bn.kernels._stream import tiling

NAMES = ("bn_moments", "bn_normalize", "bn_grad_sums", "bn_grad_input")
RESNET50 = [  # at batch 256: edge and features
    (112, 64), (56, 64), (56, 256), (28, 128), (28, 512), (14, 256), (14, 1024), (7, 512),
    (7, 2048),
]  # fmt: skip
SIZES = [(256, edge, edge, features) for edge, features in RESNET50]
SIZES += [(8192, 1024), (65536, 512)]
# Of other networks; and any number of examples, so that the last tile reaches beyond x.
SIZES += [(128, 56, 56, 24), (100, 7, 7, 960), (31, 35, 35, 192), (1000, 3)]
PASSES = ("bn_forward", "bn_backward")
FEW = [(32, 7, 7, 2048), (256, 1024)]
# Beyond x, wider slabs, the widest, a single slab of few examples.
ON_CHIP = [*FEW, (20, 7, 7, 512), (20, 7, 7, 2304), (512, 8192), (32, 16)]


def block(x, residual, dy, scale, bias):
    def f(x, residual, scale, bias):
        options: Any = dict(activation=jax.nn.relu, implementation="mosaic_gpu")
        return jax_bn.batch_norm(x, scale, bias, residual=residual, **options)[0]

    y, pull = jax.vjp(f, x, residual, scale, bias)
    return y, pull(dy)


def arguments(shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return x, x, x, *[jax.ShapeDtypeStruct(shape[-1:], jnp.float32)] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_without_spills(dtype, for_h200, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    different = set()  # two sizes with the same cut share their kernels, compiled once
    for shape in SIZES:
        text = for_h200(block, *arguments(shape, dtype)).as_text()
        for name in NAMES:  # each is launched once
            calls = re.findall(rf'custom_call_target="mosaic_gpu\w*".*{name}', text or "")
            assert len(calls) == 1, (shape, name, len(calls))
        itemsize, features = jnp.dtype(dtype).itemsize, shape[-1]
        examples = math.prod(shape[:-1])
        cuts = (tiling(examples, features, itemsize, n) for n in (1, 2, 3))
        different.add(tuple(cut._replace(side_by_side=0) for cut in cuts))  # no kernel knows it
    said = "".join(capfd.readouterr())
    for name in NAMES:
        assert said.count(f"'{name}_mosaic_gpu_kernel' for 'sm_90a'") == len(different)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert len(spilled) == 2 * len(NAMES) * len(different) and not any(map(int, spilled))
    # Two blocks of 256 threads on an SM leave 128 registers to each thread.
    assert all(int(r) <= 128 for r in re.findall(r"Used (\d+) registers", said))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_x_that_fits_on_the_chip(dtype, for_h200, monkeypatch, capfd):
    """Forward and backward in one program are two kernels, and nothing else at all."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    itemsize, different = jnp.dtype(dtype).itemsize, 0
    for shape in ON_CHIP:
        examples, features = math.prod(shape[:-1]), shape[-1]
        if _slabs.fitting(examples, features, itemsize, 3) is None:
            assert dtype == "float32"  # of twice the size
            continue
        compiled = for_h200(block, *arguments(shape, dtype))
        for name in PASSES:
            calls = re.findall(rf'custom_call_target="mosaic_gpu\w*".*{name}', compiled.as_text())
            assert len(calls) == 1, (shape, name, len(calls))
        assert launched(compiled) == 2
        different += 1
    assert different >= 3
    said = "".join(capfd.readouterr())
    for name in PASSES:
        assert said.count(f"'{name}_mosaic_gpu_kernel' for 'sm_90a'") == different
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert len(spilled) == 2 * len(PASSES) * different and not any(map(int, spilled))
    # A block of 512 threads on an SM leaves as many to each thread.
    assert all(int(r) <= 128 for r in re.findall(r"Used (\d+) registers", said))


def forward(x, scale, bias):
    """y, and running averages after it."""
    options: Any = dict(activation=jax.nn.relu, implementation="mosaic_gpu")
    y, stats = jax_bn.batch_norm(x, scale, bias, **options)
    return y, jax_bn.update_running_stats(bias, scale, stats)


def y_alone(*args):
    return forward(*args)[0]


def vjp(*args):
    return jax.vjp(y_alone, *args)[1]


@pytest.mark.parametrize("size", FEW)
def test_launches(size, for_h200):
    """Where the arrays are small, launches decide: one forward, one backward, one each average."""
    x, _, _, *vectors = arguments(size, "bfloat16")
    with seen_by_pallas():
        pull = jax.eval_shape(vjp, x, *vectors)
    assert launched(for_h200(y_alone, x, *vectors)) == 1
    assert launched(for_h200(forward, x, *vectors)) == 1 + 2
    assert launched(for_h200(lambda pull, dy: pull(dy), pull, x)) == 1


def test_launches_of_an_x_that_is_streamed(for_h200):
    """Beside the kernels as few as can be.

    Forward: the shift, a kernel, its blocks' sums, what the second kernel takes of each feature.
    Backward the same, but for the first of them, and dscale and dbias.
    """
    x, _, _, *vectors = arguments((8192, 1024), "bfloat16")
    with seen_by_pallas():
        pull = jax.eval_shape(vjp, x, *vectors)
    assert launched(for_h200(y_alone, x, *vectors)) == 3 + 2
    assert launched(for_h200(lambda pull, dy: pull(dy), pull, x)) == 4 + 2


@pytest.mark.parametrize("features", [1024, 8192])
def test_as_much_shared_memory_as_there_is(features, for_h200, monkeypatch):
    """The largest x that is said to fit compiles; one that needs all 227 KB does not."""

    def backward(examples):
        x, _, _, *vectors = arguments((examples, features), "bfloat16")
        with seen_by_pallas():
            pull = jax.eval_shape(vjp, x, *vectors)
        return launched(for_h200(lambda pull, dy: pull(dy), pull, x))

    def most():
        fitting = [n for n in range(64, 8192, 16) if _slabs.fitting(n, features, 2, 2)]
        return max(fitting)

    assert backward(most()) == 1
    monkeypatch.setattr(_slabs, "SHARED_BYTES", 227 * 1024)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        backward(most())


def passes_in(compiled):
    """The kernels of whole passes in a compiled program."""
    found = re.findall(r'custom_call_target="mosaic_gpu\w*".*(bn_\w+?)_', compiled.as_text())
    return sorted(found)


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "residual, relu"])
def test_without_a_name_where_the_kernels_were_measured_to_be_faster(fused, for_h200):
    """And only there; nor in a program that is spread over devices, by whomever."""

    def step(x, residual, dy, scale, bias, **options):
        options |= dict(residual=residual, activation=jax.nn.relu) if fused else {}
        y, pull = jax.vjp(lambda *args: jax_bn.batch_norm(*args, **options)[0], x, scale, bias)
        return y, pull(dy)

    def masked(*args):
        return step(*args, mask=jnp.arange(32)[:, None, None] < 31)

    def mapped(x, *args):
        return jax.vmap(lambda x: step(x, *args))(x[None])

    def exported(f, types):
        with seen_by_pallas():
            return str(jax.export.export(jax.jit(f), platforms=["cuda"])(*types).mlir_module())

    hopper_only = "mosaic_gpu"  # in the name of what is called
    there = arguments((32, 7, 7, 2048), "bfloat16")
    assert passes_in(for_h200(step, *there)) == sorted(PASSES)
    assert hopper_only not in for_h200(step, *there, devices=2).as_text()
    assert hopper_only not in for_h200(mapped, *there).as_text()
    assert hopper_only not in exported(step, there)
    assert hopper_only in exported(partial(step, implementation="mosaic_gpu"), there)
    assert not passes_in(for_h200(masked, *there))
    assert not passes_in(for_h200(partial(step, implementation="xla"), *there))
    assert passes_in(for_h200(partial(step, forward_mode=True), *there)) == ["bn_forward"]
    for shape, dtype in (((32, 7, 7, 1024), "bfloat16"), ((32, 7, 7, 2048), "float32")):
        assert not passes_in(for_h200(step, *arguments(shape, dtype)))


def test_under_a_remat_policy(for_h200):
    """x is kept, and y computed again; in one program XLA takes the two calls, alike, for one."""

    def checkpointed(*args):
        return jax.checkpoint(y_alone, policy=jax_bn.remat_policy)(*args)

    def loss(*args):
        return jnp.sum(jnp.sin(checkpointed(*args).astype(jnp.float32)))

    x, _, _, *vectors = arguments((1024, 1024), "bfloat16")
    with seen_by_pallas():
        kept = jax.eval_shape(lambda *args: jax.vjp(checkpointed, *args)[1], x, *vectors)
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(kept))
    assert 1 <= size / (2 * x.size) < 1.02
    compiled = for_h200(jax.value_and_grad(loss), x, *vectors)
    assert passes_in(compiled) == ["bn_backward", "bn_forward"]


def test_a_tile_too_large_for_the_h200(for_h200, monkeypatch):
    monkeypatch.setattr(_stream, "TILE_BYTES", 2**17)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        for_h200(block, *arguments((256, 14, 14, 192), "bfloat16"))


def test_what_the_compiler_would_partition_is_refused(for_h200):
    with pytest.raises(NotImplementedError, match=r"over 8 devices\. Call .* inside shard_map"):
        for_h200(block, *arguments((256, 7, 7, 512), "bfloat16"), devices=8)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_name, kernels, sums", [("data", 4, 3), (None, 2, 0)])
def test_inside_shard_map(axis_name, kernels, sums, check_vma, for_h200):
    """Each of two devices launches the kernels; all-reduces are those of XLA's stages."""
    del for_h200  # the compiler is here
    options: Any = dict(axis_name=axis_name, implementation="mosaic_gpu")
    compiled = step_inside_shard_map((256, 1024), options, check_vma)
    launches = re.findall(r'custom_call_target="mosaic_gpu', compiled.as_text() or "")
    assert len(launches) == kernels
    assert collectives_in(compiled)[0]["all-reduce"] == sums


@pytest.mark.parametrize("name", [None, "mosaic_gpu"])
def test_inside_shard_map_over_some_axes(name, for_h200):
    """The others are the compiler's: it would gather x for a kernel."""
    del for_h200  # the compiler is here
    mesh = jax.sharding.Mesh(np.reshape(described_h200s(4), (2, 2)), ("data", "model"))
    spec = jax.sharding.PartitionSpec
    spread = jax.sharding.NamedSharding(mesh, spec("data", None, None, "model"))
    x = jax.ShapeDtypeStruct((64, 7, 7, 2048), jnp.bfloat16, sharding=spread)
    mapped = jax.shard_map(
        lambda x: jax_bn.batch_norm(x, implementation=name)[0],
        mesh=mesh, in_specs=spec("data"), out_specs=spec("data"), axis_names={"data"},
    )  # fmt: skip
    with seen_by_pallas():
        traced = jax.jit(mapped).trace(x)
        if name is not None:
            with pytest.raises(NotImplementedError, match=r"over 2 devices.*over all axes"):
                traced.lower()
            return
        compiled = traced.lower().compile()
    assert not passes_in(compiled) and not collectives_in(compiled)[0]


@pytest.mark.parametrize("axis_name, expected", [("data", ()), (None, PASSES)])
def test_without_a_name_inside_shard_map(axis_name, expected, for_h200):
    """Of what is measured nothing sums over devices."""
    del for_h200  # the compiler is here
    compiled = step_inside_shard_map((64, 7, 7, 2048), dict(axis_name=axis_name), True)
    assert passes_in(compiled) == sorted(expected)


def step_inside_shard_map(shape, options: dict, check_vma: bool):
    """A step on two devices, which have half of x each; compiled."""
    mesh = jax.sharding.Mesh(described_h200s(2), ("data",))
    over = jax.sharding.PartitionSpec("data")
    spread = jax.sharding.NamedSharding(mesh, over)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=spread)

    def step(x):
        y, pull = jax.vjp(lambda x: jax_bn.batch_norm(x, **options)[0], x)
        return y, pull(y)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=over, out_specs=over, check_vma=check_vma)
    with seen_by_pallas():
        return jax.jit(mapped).trace(x).lower().compile()
