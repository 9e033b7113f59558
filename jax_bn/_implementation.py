"""Which stages run: a name -> `Stages`, and why one is refused.

Each backend is imported when it is asked for by name. Here its stages get what all of them need:
one program for each shape, a refusal where a compiler would have to partition them, results that by
their types vary as the arguments do, and derivatives of their own, those of the XLA stages, so that
a second derivative never has to look into a kernel.
"""

from functools import cache
from typing import Any

import jax

from jax_bn import _devices, _stages
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


def checked(name: Any) -> str:
    """The name of an implementation; None is XLA's.

    On an H200 the kernels save 5% of the device's time of a ResNet-50, by the clock less than 1%,
    and cost half a minute of compiling: benchmarks/results/2026-11-26-1643-h200-resnet.json.
    """
    if name is None:
        return "xla"
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"implementation={name!r}; expected None or one of {NAMES}")
    return name


def stages(name: str, x, mask, residual, **options) -> Stages:
    """The stages of that name; `options` are the static ones of the call.

    Raises NotImplementedError with the reason where they cannot run it.
    """
    if name == "xla":
        return _stages.XLA
    if jax.__version_info__ < OLDEST_JAX:
        why = f"jax is {jax.__version__}; expected 0.11 or later"
    else:
        import jax_bn.kernels.mosaic_gpu as mosaic_gpu

        why = mosaic_gpu.why_not_here() or mosaic_gpu.why_not(x, mask, residual, **options)
        if why is None:
            return _wrapped(mosaic_gpu.stages(x, residual, options["activation"]))
    raise NotImplementedError(f'implementation="{name}": {why}. implementation=None runs it')


@cache
def _wrapped(kernels: Stages) -> Stages:
    """The stages of kernels; always the same functions, since JAX keeps programs by these."""
    return Stages(*map(_stage, kernels, _stages.WHOLE, STATIC))


def _stage(kernel, definition, static) -> Any:
    if kernel is None:
        return None
    import jax_bn.kernels._one_device as _one_device

    def stage(first, *args, **options):
        def typed(f, args):  # a kernel does not say that its results differ between devices
            results, given = f(*args, **options), jax.tree.leaves(args)
            return jax.tree.map(lambda v: _devices.varying_as(v, *given), results)

        @jax.custom_jvp
        def run(first, *args):
            return typed(kernel, (_one_device.on_one_device(first), *args))

        @run.defjvp
        def _(primals, tangents):
            return jax.jvp(lambda *args: typed(definition, args), primals, tangents)

        return run(first, *args)

    return jax.jit(stage, static_argnames=static)
