"""`on`: one function for programs of one platform, another that computes the same for all others.

If asked for, that is so only where the program stands as it is: not mapped, transposed, exported,
or spread over devices by a compiler. `jax.lax.platform_dependent` knows of platforms alone, and
leaves two conditionals in the program at each call, for the compiler to remove. Here the choice is
a primitive, lowered to the chosen function and to nothing else.

Knows functions and platforms; what they are good for is the business of `_compiler`.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

import jax
from jax import lax
from jax.core import Tracer, eval_jaxpr
from jax.interpreters import ad, batching, mlir

Primitive: Any = type(lax.add_p)  # `jax.extend.core` has it by name, and takes all of Pallas along
PLATFORMS = ("cpu", "cuda", "tpu")

_on = Primitive("jax_bn_on")
_on.multiple_results = True


def on(platform: str, f: Callable, *args, otherwise: Callable, alone: bool = False) -> Any:
    """f(*args) in programs that are lowered for `platform`, otherwise(*args) in all others.

    With `alone` only as it stands here: in a program that no compiler spreads over devices, not
    under vmap nor transposed, and not in a file that another device of the platform may load
    (`jax.export`).

    Where nothing is traced no program is lowered: otherwise(*args). All results depend on all
    arguments, for what JAX knows, so what is linear in some of them should not be mixed with what
    is not.
    """
    leaves = jax.tree.leaves(args)
    if not any(isinstance(v, Tracer) for v in leaves):
        return otherwise(*args)

    elsewhere, results = jax.make_jaxpr(otherwise, return_shape=True)(*args)
    here = jax.make_jaxpr(f)(*args)
    bound = _bind(platform, alone, here, elsewhere, leaves)
    return jax.tree.unflatten(jax.tree.structure(results), bound)


def partitioned_over(ctx) -> int:
    """How many devices a compiler spreads the program over that is lowered in this context.

    1 inside pmap, and inside shard_map over all axes of the mesh: each device has its own program.
    """
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        automatic = set(context.mesh.axis_names) - set(context.manual_axes)
        return math.prod(context.mesh.shape[axis] for axis in automatic)
    return getattr(context, "num_devices", None) or 1


def _bind(platform: str, alone: bool, here, elsewhere, args) -> list:
    types = [[(v.shape, v.dtype) for v in jaxpr.out_avals] for jaxpr in (here, elsewhere)]
    if types[0] != types[1]:
        raise TypeError(f"on {platform} results are {types[0]}; expected {types[1]}, as elsewhere")
    return _on.bind(*args, platform=platform, alone=alone, here=here, elsewhere=elsewhere)


def _as_function(closed) -> Callable:
    return partial(eval_jaxpr, closed.jaxpr, closed.consts)


def _run(*args, platform, alone, here, elsewhere):
    del platform, alone, here
    return _as_function(elsewhere)(*args)


def _results(*avals, platform, alone, here, elsewhere):
    del avals, platform, alone, here
    return elsewhere.out_avals


def _lowered(ctx, *args, platform, alone, here, elsewhere, lowered_for=None):
    exported = ctx.module_context.lowering_parameters.for_export
    as_is = not alone or (partitioned_over(ctx) == 1 and not exported)
    chosen = here if platform == lowered_for and as_is else elsewhere
    # `mlir.lower_fun` does this too, but traces it once more first: a third of what lowering takes.
    module = ctx.module_context
    module = module if ctx.platforms is None else module.replace(platforms=ctx.platforms)
    results, tokens = mlir.jaxpr_subcomp(
        module,
        chosen.jaxpr,
        ctx.name_stack,
        ctx.tokens_in,
        [mlir.ir_constant(v) for v in chosen.consts],
        *args,
        dim_var_values=ctx.dim_var_values,
        const_lowering=ctx.const_lowering,
        outer_traceback=None,
    )
    ctx.set_tokens_out(tokens)
    return results


def _changed(change: Callable, args, *, platform, alone, here, elsewhere) -> list:
    """Both functions as `change` makes them, of `args`; of those `alone` but the one elsewhere.

    The other one no longer stands as it did, and JAX may be unable to change it: a general
    reduction has no transpose.
    """
    otherwise = change(elsewhere)
    if alone:
        return _as_function(otherwise)(*args)
    return _bind(platform, alone, change(here), otherwise, args)


def _batched(args, dims, **params):
    def mapped(jaxpr):
        return jax.make_jaxpr(jax.vmap(_as_function(jaxpr), in_axes=tuple(dims)))(*args)

    results = _changed(mapped, args, **params)
    return results, [0] * len(results)


def _jvp(primals, tangents, **params):
    # The tangents of either one will do: both compute the same.
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    _, along = jax.jvp(_as_function(params["elsewhere"]), tuple(primals), tangents)
    return _on.bind(*primals, **params), along


def _transposed(cotangents, *args, **params):
    is_linear = [ad.is_undefined_primal(v) for v in args]
    known = [v for v, linear in zip(args, is_linear, strict=True) if not linear]
    avals = [v.aval for v, linear in zip(args, is_linear, strict=True) if linear]
    given = *known, *map(ad.instantiate_zeros, cotangents)

    def transposed(jaxpr):
        def run(*given):
            def f(*linear):
                of = {True: iter(linear), False: iter(given)}
                return _as_function(jaxpr)(*(next(of[linear]) for linear in is_linear))

            return jax.linear_transpose(f, *avals)(list(given[len(known) :]))

        return jax.make_jaxpr(run)(*given)

    found = iter(_changed(transposed, given, **params))
    return [next(found) if linear else None for linear in is_linear]


_on.def_impl(_run)
_on.def_abstract_eval(_results)
batching.primitive_batchers[_on] = _batched
ad.primitive_jvps[_on] = _jvp
ad.primitive_transposes[_on] = _transposed
mlir.register_lowering(_on, _lowered)
for name in PLATFORMS:
    mlir.register_lowering(_on, partial(_lowered, lowered_for=name), platform=name)
