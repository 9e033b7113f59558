"""What is counted and not timed: residuals, programs for an H200, collectives."""

from collections.abc import Iterable
from functools import partial
import json
import math
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiled import (
    bytes_moved,
    collectives,
    compile_for_h200,
    kernels,
    missing_compiler,
    peak_temporary,
    residual_bytes,
)
from benchmarks.failures import OURS, attempt
from benchmarks.measure import arguments, as_shapes, functions, why_not
from benchmarks.peers import FLAX, NNX, PEERS, block, loose

DEVICES = 8  # for collectives
ROOT = Path(__file__).parents[1]


def residuals(shape: tuple[int, ...], dtype: str, names: Iterable[str]) -> list[dict]:
    """Bytes that autodiff keeps: of one normalization, and of one block, relu(bn(x) + x)."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    feature = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    args = x, feature, feature
    nbytes = math.prod(shape) * x.dtype.itemsize
    rows = []
    with loose():
        for name in names:
            if name not in PEERS or why_not(name, "network", shape):
                continue
            peer = PEERS[name]
            apply, state = peer.make(x)
            fs = {"block": block(peer, apply)} | ({} if peer.fused else {"one": apply})
            kept = {of: residual_bytes(partial(_y, f, state), *args) for of, f in fs.items()}
            case = dict(shape=list(shape), dtype=dtype, implementation=name, x_bytes=nbytes)
            rows += [case | dict(of=of, residual_bytes=n) for of, n in kept.items()]
    return rows


def _y(f, state, *args):
    return f(*args, state)[0]


def h200(cases: Iterable[tuple], measures: Iterable[str], names: Iterable[str]) -> dict:
    """Passes over x, kernels and temporaries of programs compiled for an H200, if that can be."""
    if why := missing_compiler("h200"):
        return dict(missing=why, rows=[])
    rows = []
    with loose():
        for shape, dtype in cases:
            for measure in measures:
                for name in names:
                    if name not in PEERS or why_not(name, measure, shape):
                        continue
                    case = dict(measure=measure, shape=list(shape), dtype=dtype)
                    case |= dict(implementation=name)
                    failed: dict[str, str] = {}
                    with attempt(name, failed):
                        case |= _on_h200(name, measure, shape, dtype)
                    rows.append(case | dict(reason=why) if (why := failed.get(name)) else case)
    return dict(missing=None, rows=rows)


def _on_h200(name: str, measure: str, shape: tuple[int, ...], dtype: str) -> dict:
    peer = PEERS[name]
    x = jax.ShapeDtypeStruct(shape, dtype)
    feature = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    apply, state = peer.make(x)
    fs = functions(peer, apply)

    def vjp(*args):
        return jax.eval_shape(fs["vjp"], *args)

    data: Any = _Shapes([(x, x)], feature, feature)
    (args,) = arguments(measure, data, as_shapes(state), vjp)
    compiled = compile_for_h200(fs[measure], *args)
    moved = bytes_moved(compiled)
    return dict(
        bytes_moved=moved,
        passes=moved / (math.prod(shape) * x.dtype.itemsize),
        kernels=kernels(compiled),
        peak_temporary_bytes=peak_temporary(compiled),
    )


class _Shapes:
    """`measure.Inputs` without the numbers."""

    def __init__(self, pairs, scale, bias):
        self.pairs, self.scale, self.bias = pairs, scale, bias


def collectives_elsewhere() -> dict:
    """`count_collectives` in a process of its own: devices have to be asked for at the start."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counters"],
        cwd=ROOT,
        env=os.environ | dict(XLA_FLAGS=flags.strip(), JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or ["no message"]
        return dict(missing=last[:200], rows=[])
    return dict(missing=None, rows=json.loads(done.stdout))


def count_collectives() -> list[dict]:
    """All-reduces in programs for a batch that lies on several devices, under plain jit."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 7, 7, 32), jnp.float32, sharding=spread)
    feature = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=everywhere)
    rows = []
    with loose():
        for name in (OURS, FLAX, NNX):
            if why_not(name, "forward", x.shape):
                continue
            apply, state = PEERS[name].make(x)
            state = jax.tree.map(
                lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere), state
            )
            fs = functions(PEERS[name], apply)
            args = dict(forward=(x, feature, feature), step=(x, x, feature, feature))
            for measure, values in args.items():
                counts, elements = collectives(fs[measure], *values, state)
                case = dict(implementation=name, measure=measure, devices=DEVICES)
                rows.append(case | dict(collectives=dict(counts), most_elements=elements))
    return rows


if __name__ == "__main__":
    print(json.dumps(count_collectives()))
