"""Which stages run: a name -> `Stages`, and why one is refused.

Each backend is imported when it is asked for by name, or by None where it was measured to be
faster. Here its stages get what all of them need: one program for each shape, a refusal where a
compiler would have to partition them, results that by their types vary as the arguments do, and
derivatives of their own, those of the XLA stages, so that a second derivative never has to look
into a kernel.
"""

from functools import cache, partial
import math
from typing import Any

import jax

from jax_bn import _devices, _platform, _stages
from jax_bn._stages import Stages

NAMES = ("xla", "mosaic_gpu")
OLDEST_JAX = (0, 11)  # with Mosaic GPU's interpreter and `out_type`
STATIC = (  # arguments of each of the four, and of the passes
    ("axes", "dtype"),
    ("activation", "dtype"),
    ("activation", "axes"),
    ("activation", "dtype"),
    ("activation", "axes", "dtype", "epsilon", "y_dtype"),
    ("activation", "axes", "dtype"),
)


# Where None takes the kernels that are whole passes: device, dtype, examples and features of x. In
# the last run of all shapes on that device each measure of it (forward, backward, both; alone, and
# with residual and relu) took less time with them than with XLA, on the device and by the clock.
FASTER = {("NVIDIA H200", "bfloat16", 32 * 7 * 7, 2048)}


def checked(name: Any) -> str | None:
    """The name of an implementation, or None."""
    if name is not None and (not isinstance(name, str) or name not in NAMES):
        raise ValueError(f"implementation={name!r}; expected None or one of {NAMES}")
    return name


def stages(name: str | None, x, mask, residual, **options) -> Stages:
    """The stages of that name; `options` are the static ones of the call.

    Raises NotImplementedError with the reason where they cannot run it. None: XLA's; but the
    kernels for whole passes, where they can run it and are `FASTER`, in programs for one GPU;
    mapped or exported ones are XLA's.
    """
    too_old = jax.__version_info__ < OLDEST_JAX
    if name == "xla" or (name is None and (too_old or not _faster(x))):
        return _stages.XLA
    if too_old:
        why = f"jax is {jax.__version__}; expected 0.11 or later"
    else:
        import jax_bn.kernels.mosaic_gpu as mosaic_gpu

        why = mosaic_gpu.why_not_here() or mosaic_gpu.why_not(x, mask, residual, **options)
        if why is None:
            kernels = _wrapped(mosaic_gpu.stages(x, residual, options["activation"]), name is None)
            passes = dict(forward=kernels.forward, backward=kernels.backward)
            return _stages.XLA._replace(**passes) if name is None else kernels
    if name is None:
        return _stages.XLA
    raise NotImplementedError(f'implementation="{name}": {why}. implementation=None runs it')


def _faster(x) -> bool:
    """Whether the kernels were measured to be faster for an x like this one, where it is."""
    of_x = x.dtype.name, math.prod(x.shape[:-1]), *x.shape[-1:]
    devices = [device for device, *measured in FASTER if tuple(measured) == of_x]
    return bool(devices) and _device_kind() in devices


def _device_kind() -> str:
    """Asked of no other x: it starts JAX, after which `jax.distributed` cannot be initialized."""
    compiled_for = jax.sharding.get_abstract_mesh().abstract_device  # a device that is not here
    return (compiled_for or jax.local_devices()[0]).device_kind


@cache
def _wrapped(kernels: Stages, or_xla: bool) -> Stages:
    """The stages of kernels; always the same functions, since JAX keeps programs by these.

    `or_xla`: only in programs for one GPU, in all others those of XLA.
    """
    wrapped = map(partial(_stage, or_xla), kernels, _stages.WHOLE, STATIC)
    return Stages(*wrapped)


def _stage(or_xla: bool, kernel, definition, static) -> Any:
    if kernel is None:
        return None
    import jax_bn.kernels._one_device as _one_device

    def stage(*args, **options):
        by_kernel, by_xla = (partial(f, **options) for f in (kernel, definition))
        either = partial(_platform.on, "cuda", by_kernel, otherwise=by_xla, alone=True)

        def typed(f, *args):  # a kernel does not say that its results differ between devices
            results, given = f(*args), jax.tree.leaves(args)
            return jax.tree.map(lambda v: _devices.varying_as(v, *given), results)

        @jax.custom_jvp
        def run(first, *args):
            if or_xla:
                return typed(either, first, *args)
            return typed(by_kernel, _one_device.on_one_device(first), *args)

        @run.defjvp
        def _(primals, tangents):
            return jax.jvp(partial(typed, by_xla), primals, tangents)

        return run(*args)

    return jax.jit(stage, static_argnames=static)
