"""What a program does, counted in its compiled text: memory traffic, kernels, collectives.

The programs may be compiled for an H200 or a TPU on a machine that has neither. The real compilers
run; only execution needs the device. They come with the extra `aot`. Where JAX could find
accelerators, set JAX_PLATFORMS=cpu, or the plugins look for theirs.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
import jax.extend.core

# ---- compiling for a device that is not here -----------------------------------------------------

COMPILERS = {
    "h200": ("jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"),
    "tpu": ("libtpu",),
}

# The device as XLA would find it: a GpuTargetConfig, protobuf text.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def missing_compiler(target: str) -> str | None:
    """Why nothing can be compiled for "h200" or "tpu"; None where it can."""
    installed = {d.name for d in metadata.distributions()}
    if missing := sorted(set(COMPILERS[target]) - installed):
        return f"not installed: {', '.join(missing)}; pip install '.[aot]' in a clone"
    return None


def compile_for_h200(f: Callable, *shapes, devices: int = 1) -> jax.stages.Compiled:
    """f compiled for one H200, or by the partitioner for several.

    `shapes`: f's arguments, as trees of `jax.ShapeDtypeStruct`. For several devices those of more
    than one axis are split along the first.
    """
    with seen_by_pallas():
        return _compile(f, described_h200s(devices), shapes)


def described_h200s(n: int) -> list:
    """Devices to compile for, which need not be there."""
    described = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{n}x1", target_config=_H200
    )
    return described.devices


def seen_by_pallas():
    """A context in which Pallas, which asks for the name of the device, finds an H200."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def compile_for_tpu(f: Callable, topology: str, *shapes) -> jax.stages.Compiled:
    """f compiled for one chip of "v4:2x2x1", "v5e:2x2", "v5p:2x2x1" or "v6e:2x2"."""
    return _compile(f, topologies.get_topology_desc(topology, platform="tpu").devices[:1], shapes)


def _compile(f, devices, shapes):
    mesh = jax.sharding.Mesh(devices, ("batch",))

    def placed(s):
        spec = jax.sharding.PartitionSpec("batch" if len(s.shape) > 1 else None)
        spec = spec if len(devices) > 1 else jax.sharding.PartitionSpec()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    return jax.jit(f).trace(*jax.tree.map(placed, shapes)).lower().compile()


# ---- memory --------------------------------------------------------------------------------------


def bytes_moved(compiled: jax.stages.Compiled) -> float:
    """Bytes read from the device's memory and written to it."""
    cost = compiled.cost_analysis()  # None for a GPU that is not there
    if cost:
        return cost["bytes accessed"]
    return sum(_traffic(kernel) for kernel in _launched(compiled))


def passes(compiled: jax.stages.Compiled, x: jax.ShapeDtypeStruct) -> float:
    """How often x could have gone through the device's memory instead: bytes moved / bytes of x."""
    return bytes_moved(compiled) / (x.size * x.dtype.itemsize)


def peak_temporary(compiled: jax.stages.Compiled) -> int:
    """Bytes at most in use at once beside the arguments and the results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def residual_bytes(f: Callable, *args) -> int:
    """Bytes that `jax.vjp(f, *args)` keeps for the backward pass, each array once.

    Arguments that are kept count as well. `args`: arrays, or `jax.ShapeDtypeStruct` for them.
    """
    traced = jax.make_jaxpr(lambda *args: jax.vjp(f, *args)[1])(*args)
    kept = {v for v in traced.jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)  # pyright: ignore


# ---- instructions --------------------------------------------------------------------------------

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<kind>{COLLECTIVES})(?:-start)?\(")
# A TPU writes products of matrices as convolutions too, but these have no window.
_CONVOLUTION = re.compile(r' convolution\(.*window=|custom_call_target="__cudnn\$conv')


def collectives(f: Callable, *args) -> tuple[Counter, int]:
    """Of f compiled for the devices of its arguments."""
    return collectives_in(jax.jit(f).lower(*args).compile())


def collectives_in(compiled: jax.stages.Compiled) -> tuple[Counter, int]:
    """How many of each kind, and the most elements that one of them yields."""
    text = _text(compiled.as_text())
    found = [m for m in map(_COLLECTIVE.search, text.splitlines()) if m]
    return Counter(m["kind"] for m in found), max((_size(m["result"])[0] for m in found), default=0)


def convolutions(compiled: jax.stages.Compiled) -> int:
    """How many convolutions, those inside fusions included."""
    return len(_CONVOLUTION.findall(_text(compiled.as_text())))


def kernels(compiled: jax.stages.Compiled) -> int:
    """How many kernels a GPU program launches."""
    return sum(1 for _ in _launched(compiled))


def bytes_of_libraries(compiled: jax.stages.Compiled) -> float:
    """Of a GPU program's `bytes_moved` those of cuDNN and cuBLAS: convolutions and products."""
    return sum(_traffic(k) for k in _launched(compiled) if _LIBRARY in k.instruction.attributes)


# ---- GPU programs --------------------------------------------------------------------------------
#
# Each instruction of a GPU program's entry computation is a kernel: it reads its operands once and
# writes its result. Values inside a fusion stay on the chip; its body only tells which operands are
# read no further than a slice. A call to a library counts by its operands and results.

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_KERNELS = {"fusion", "custom-call", "copy", "reduce", "transpose"}
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?^}", re.M | re.S)
_INSTRUCTION = re.compile(r"^  (ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.M)
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # pred[8], f32[512,64], f32[]
_LIBRARY = 'custom_call_target="__cu'
_SCRATCH = re.compile(r", [su]8\[\d+\]\{0\}\)$")  # the last result of a cuDNN or cuBLAS call


class _Instruction(NamedTuple):
    is_root: bool
    type: str
    opcode: str
    arguments: str
    attributes: str


_Computation = dict[str, _Instruction]


class _Kernel(NamedTuple):
    instruction: _Instruction
    operands: list[_Instruction]
    body: _Computation | None  # of a fusion


def _launched(compiled: jax.stages.Compiled) -> Iterator[_Kernel]:
    """The kernels of a GPU program; those of a loop as often as it runs."""
    program, entry = {}, ""
    for computation in _COMPUTATION.finditer(_text(compiled.as_text())):
        found = _INSTRUCTION.findall(computation[0])
        program[computation[2]] = {i[1]: _Instruction(bool(i[0]), *i[2:]) for i in found}
        entry = computation[2] if computation[1] else entry

    def of(computation: _Computation) -> Iterator[_Kernel]:
        for i in computation.values():
            called = dict(re.findall(r"\b(calls|to_apply|condition|body)=%([\w.-]+)", i.attributes))
            if i.opcode == "call":  # a recorded sequence of kernels
                yield from of(program[called["to_apply"]])
            elif i.opcode == "while":
                times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes)
                if times is None:
                    raise NotImplementedError("a while whose number of iterations is not known")
                for part in (called["condition"], called["body"]) * int(times[1]):
                    yield from of(program[part])
            elif i.opcode in _KERNELS:
                operands = [computation[name] for name in _NAME.findall(i.arguments)]
                yield _Kernel(i, operands, program[called["calls"]] if "calls" in called else None)
            elif i.opcode not in _FREE:
                raise NotImplementedError(f"no rule for the traffic of a {i.opcode}")

    yield from of(program[entry])


def _traffic(kernel: _Kernel) -> float:
    result = kernel.instruction.type
    if _LIBRARY in kernel.instruction.attributes:
        result = _SCRATCH.sub(")", result)
    read = [_size(operand.type)[1] for operand in kernel.operands]
    shares = [1.0] * len(read) if kernel.body is None else _shares_read(kernel.body)
    return _size(result)[1] + sum(n * share for n, share in zip(read, shares, strict=True))


def _shares_read(body: _Computation) -> list[float]:
    """How much of each operand a fusion reads: 1 is all of it."""
    read = dict.fromkeys(body, 0.0)
    for name, user in reversed(body.items()):  # users before what they use
        needed = 1.0 if user.is_root else read[name]
        elements, _ = _size(user.type)
        for operand in _NAME.findall(user.arguments):
            of, _ = _size(body[operand].type)
            if user.opcode == "slice":
                share = elements / of
            else:  # as many elements: elementwise, so it needs what is needed of its result
                share = needed if elements == of else 1.0
            read[operand] = min(1.0, read[operand] + share)
    parameters = {int(i.arguments): name for name, i in body.items() if i.opcode == "parameter"}
    return [read[parameters[i]] for i in range(len(parameters))]


def _size(type_: str) -> tuple[int, int]:
    """Elements and bytes of an array, or of all in a tuple."""
    arrays = [
        (math.prod(int(n) for n in shape.split(",") if n), int(bits or 8))
        for bits, shape in _ARRAY.findall(type_)
    ]
    return sum(n for n, _ in arrays), sum(n * bits // 8 for n, bits in arrays)


def _text(text: str | None) -> str:
    assert text is not None, "the backend has no text of its programs"
    return text
