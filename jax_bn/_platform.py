"""`on`: one function for programs of one platform, another that computes the same for all others.

`jax.lax.platform_dependent` says that too, and leaves two conditionals in the program at each call:
for a compiler to remove, which takes it as long as a part of what the layer computes. Here the
choice is a primitive, lowered to the chosen function and to nothing else.

Knows functions and platforms; what they are good for is the business of `_compiler`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.core import Tracer, eval_jaxpr
from jax.interpreters import ad, batching, mlir

Primitive: Any = type(lax.add_p)  # `jax.extend.core` has it by name, and takes all of Pallas along
PLATFORMS = ("cpu", "cuda", "tpu")

_on = Primitive("jax_bn_on")
_on.multiple_results = True


def on(platform: str, f: Callable, *args, otherwise: Callable) -> Any:
    """f(*args) in programs that are lowered for `platform`, otherwise(*args) in all others.

    Where nothing is traced no program is lowered: otherwise(*args). All results depend on all
    arguments, for what JAX knows, so what is linear in some of them should not be mixed with what
    is not.
    """
    leaves, tree = jax.tree.flatten(args)
    if not any(isinstance(v, Tracer) for v in leaves):
        return otherwise(*args)

    def flat(g):
        return lambda *leaves: jax.tree.leaves(g(*jax.tree.unflatten(tree, leaves)))

    results = jax.tree.structure(jax.eval_shape(otherwise, *args))
    return jax.tree.unflatten(results, _bind(platform, flat(f), flat(otherwise), *leaves))


def _bind(platform: str, f: Callable, otherwise: Callable, *leaves) -> list:
    here, elsewhere = jax.make_jaxpr(f)(*leaves), jax.make_jaxpr(otherwise)(*leaves)
    return _on.bind(*leaves, platform=platform, here=here, elsewhere=elsewhere)


def _as_function(closed) -> Callable:
    return partial(eval_jaxpr, closed.jaxpr, closed.consts)


def _run(*args, platform, here, elsewhere):
    del platform, here
    return _as_function(elsewhere)(*args)


def _results(*avals, platform, here, elsewhere):
    del avals, platform, here
    return elsewhere.out_avals


def _lowered(ctx, *args, platform, here, elsewhere, lowered_for=None):
    chosen = here if platform == lowered_for else elsewhere
    return mlir.lower_fun(_as_function(chosen), multiple_results=True)(ctx, *args)


def _batched(args, dims, *, platform, here, elsewhere):
    f, otherwise = (jax.vmap(_as_function(j), in_axes=tuple(dims)) for j in (here, elsewhere))
    results = _bind(platform, f, otherwise, *args)
    return results, [0] * len(results)


def _jvp(primals, tangents, **params):
    # The tangents of either one will do: both compute the same.
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    _, along = jax.jvp(_as_function(params["elsewhere"]), tuple(primals), tangents)
    return _on.bind(*primals, **params), along


def _transposed(cotangents, *args, platform, here, elsewhere):
    is_linear = [ad.is_undefined_primal(v) for v in args]
    known = [v for v, linear in zip(args, is_linear, strict=True) if not linear]
    avals = [v.aval for v, linear in zip(args, is_linear, strict=True) if linear]

    def transpose_of(jaxpr):
        def run(*known_and_cotangents):
            known = known_and_cotangents[: -len(cotangents)]

            def f(*linear):
                given = {True: iter(linear), False: iter(known)}
                return _as_function(jaxpr)(*(next(given[linear]) for linear in is_linear))

            return jax.linear_transpose(f, *avals)(list(known_and_cotangents[len(known) :]))

        return run

    cotangents = [ad.instantiate_zeros(v) for v in cotangents]
    found = _bind(platform, transpose_of(here), transpose_of(elsewhere), *known, *cotangents)
    found = iter(found)
    return [next(found) if linear else None for linear in is_linear]


_on.def_impl(_run)
_on.def_abstract_eval(_results)
batching.primitive_batchers[_on] = _batched
ad.primitive_jvps[_on] = _jvp
ad.primitive_transposes[_on] = _transposed
mlir.register_lowering(_on, _lowered)
for name in PLATFORMS:
    mlir.register_lowering(_on, partial(_lowered, lowered_for=name), platform=name)
