"""Refuses a kernel in a program that the compiler spreads over several devices.

XLA would gather all of x on each of them and say nothing. Only lowering knows of it, so it takes a
primitive; and its import takes Pallas along, so it stands here.
"""

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_bn import _platform


def on_one_device(v):
    """v, in a program that no compiler spreads over devices; any other is refused when lowered.

    Inside pmap, and shard_map over all axes of the mesh, each device has a program of its own.
    """
    return _on_one_device.bind(v)


def _lowered_on_one_device(ctx, v):
    if (devices := _platform.partitioned_over(ctx)) > 1:
        raise NotImplementedError(
            f"implementation: the compiler cannot partition a hand-written kernel over {devices} "
            "devices. Call batch_norm inside shard_map, over all axes of the mesh and with "
            "axis_name, or use implementation=None"
        )
    return [v]


_on_one_device = Primitive("jax_bn_on_one_device")
_on_one_device.def_impl(lambda v: v)
_on_one_device.def_abstract_eval(lambda v: v)
mlir.register_lowering(_on_one_device, _lowered_on_one_device)
batching.primitive_batchers[_on_one_device] = lambda args, dims: (on_one_device(*args), *dims)
