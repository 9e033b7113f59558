"""What the property-based tests compute of a case, and how closely two results have to agree.

A result is y, the statistics, the gradient of <cotangent, (y, mean, var)>, and the derivative of
that gradient along a direction.
"""

from functools import cache, partial
from typing import Any

from cases import KINKED, Case, Numbers, Params, Seed, aligned, numbers as drawn
import chex
from hypothesis import assume
import jax
import jax.numpy as jnp
import numpy as np
from sizes import Results, facts, sizes, wide
from tolerance import assert_as_accurate, in_float64, narrowed

import jax_bn

OURS, DEFINITION = jax_bn.batch_norm, jax_bn.reference.batch_norm
QUICK = {"xla_backend_optimization_level": 0}  # to compile


def call(batch_norm, case: Case, params: Params, mask, **options):
    """(y, mean, var), count."""
    if mask is not None and batch_norm is DEFINITION:
        mask = aligned(case, mask)
    if batch_norm is OURS:
        options |= dict(forward_mode=case.forward_mode)
    x, scale, bias, residual = params
    y, stats = batch_norm(
        x,
        scale,
        bias,
        axis=case.axis,
        epsilon=case.epsilon,
        mask=mask,
        residual=residual,
        activation=case.activation,
        dtype=case.dtype,
        **options,
    )
    mean, var, count = jax.tree.leaves(stats)
    return (y, mean, var), count


def results(f, case: Case, numbers: Numbers) -> Results:
    """f :: params, mask -> (y, mean, var), count, as `call`."""
    params, mask, cotangent, direction = numbers
    moving = params if case.differentiable else params._replace(x=None)

    def gradient(moving):
        def values(moving):
            return f(moving if case.differentiable else moving._replace(x=params.x), mask)

        out, pull, count = jax.vjp(values, moving, has_aux=True)
        return pull(_as(cotangent, out))[0], (out, count)

    direction = _as(direction, moving)
    if case.outer == "forward":
        first, second, ((y, mean, var), _) = jax.jvp(
            gradient, (moving,), (direction,), has_aux=True
        )
    else:  # the same number, since second derivatives are symmetric
        first, pull, ((y, mean, var), _) = jax.vjp(gradient, moving, has_aux=True)
        (second,) = pull(direction)
    return Results(y, mean, var, first, second)


def _as(tree, like):
    return jax.tree.map(lambda v, of: jnp.asarray(v, of.dtype), tree, like)


def first_order(f, case: Case, numbers: Numbers) -> Results:
    """`results` without the second derivative."""
    params, mask, cotangent, _ = numbers
    moving = params if case.differentiable else params._replace(x=None)

    def values(moving):
        return f(moving if case.differentiable else moving._replace(x=params.x), mask)

    out, pull, _ = jax.vjp(values, moving, has_aux=True)
    y, mean, var = out
    return Results(y, mean, var, pull(_as(cotangent, out))[0], None)


def tangents(f, case: Case, numbers: Numbers):
    """Of y, mean and var along the direction."""
    params, mask, _, direction = numbers
    moving = params if case.differentiable else params._replace(x=None)

    def values(moving):
        return f(moving if case.differentiable else moving._replace(x=params.x), mask)[0]

    return jax.jvp(values, (moving,), (_as(direction, moving),))[1]


@cache
def program(batch_norm, case: Case, of=results):
    """Compiled once for each kind of call."""
    return jax.jit(partial(of, partial(call, batch_norm, case), case), compiler_options=QUICK)


def ours(case: Case, numbers: Numbers, of: Any = results):
    with jax.enable_x64(case.wide):
        return jax.tree.map(np.asarray, program(OURS, case, of)(numbers))


def definition(case: Case, numbers: Numbers, of: Any = results):
    """In 32 bits at most: beside what is wider it is judged by the ratio of eps."""
    fields: Any = ({"float64": "float32"}.get(v, v) if isinstance(v, str) else v for v in case)
    narrow = Case(*fields)._replace(outer="forward")
    return jax.tree.map(np.asarray, program(DEFINITION, narrow, of)(narrowed(numbers)))


def oracle(case: Case, numbers: Numbers, of: Any = results):
    exact = case._replace(dtype="complex128" if case.complex else "float64", outer="forward")
    return in_float64(program(DEFINITION, exact, of), numbers)


def example(case: Case, seed: Seed) -> Numbers:
    """Numbers that the definition is defined for, off the kinks of relu."""
    made = drawn(case, seed)
    if case.epsilon == 0:  # a feature without variance is 0/0 in the definition
        assume(np.all(facts(case, made).rstd < 1e4))
        assume(np.all(case.eps * sizes(case, made).y < 1e-2))
    return off_the_kinks(case, made)


def off_the_kinks(case: Case, numbers: Numbers) -> Numbers:
    """No cotangent where z is 0 up to rounding: there relu takes a side by luck."""
    if case.activation not in KINKED:
        return numbers
    _, _, mean, r = facts(case, numbers)
    x, scale, bias, residual = (None if v is None else wide(v) for v in numbers.params)
    z = (x - mean) * r
    for v, combine in ((scale, np.multiply), (bias, np.add)):
        z = z if v is None else combine(z, np.expand_dims(v, case.reduced))
    z = z if residual is None else z + residual
    y_dtype = case.dtype or (case.x if case.differentiable else "float32")
    tiny = float(jnp.finfo(y_dtype).tiny)
    near = np.abs(z) <= 4 * np.sqrt(case.examples) * case.eps * sizes(case, numbers).y + tiny
    dy, *others = numbers.cotangent
    return numbers._replace(cotangent=(np.where(near, 0, dy), *others))


def seen(case: Case, numbers: Numbers, of: Results) -> Results:
    """Without what y is where nothing asks for it."""
    return of._replace(y=np.where(facts(case, numbers).valid, of.y, np.zeros_like(of.y)))


def assert_is_definition(case: Case, numbers: Numbers, actual: Results) -> None:
    """By the one tolerance."""
    of_terms = terms(case, sizes(case, numbers), actual)
    if case.x in ("bfloat16", "float16"):
        # The definition casts x once. The rule takes it as it is wherever it needs it, and JAX adds
        # what a second derivative brings back from there in x's own dtype: a few roundings more.
        term = 8 * float(jnp.finfo(case.x).eps) * np.abs(wide(actual.second.x)).max(initial=0)
        of_terms = of_terms._replace(second=of_terms.second._replace(x=term))
    actual, plain, exact = (
        seen(case, numbers, r) for r in (actual, definition(case, numbers), oracle(case, numbers))
    )
    assert_as_accurate(actual, plain, exact, case.examples, of_terms)


def terms(case: Case, sizes, like) -> Any:
    """eps*sizes, one number for each leaf of `like`."""

    def term(leaf, sizes):
        return None if leaf is None else case.eps * float(np.max(sizes, initial=0))

    return jax.tree.map(term, like, sizes, is_leaf=lambda v: v is None)


def assert_same(case: Case, numbers: Numbers, actual: Results, expected: Results) -> None:
    """Two results of our own are alike where they are looked at."""
    actual, expected = seen(case, numbers, actual), seen(case, numbers, expected)
    assert_alike(case, actual, expected, sizes(case, numbers))


def assert_alike(case: Case, actual, expected, sizes) -> None:
    """Each is within the tolerance, without the definition's own error; so twice that, apart."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    rows = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        jax.tree.leaves(terms(case, sizes, expected)),
        strict=True,
    )
    for (path, a), e, term in rows:
        assert np.isfinite(e).all(), f"{path}: not finite"
        error, allowed = np.abs(wide(a) - wide(e)).max(initial=0), 2 * rounding(case, e, term)
        assert error <= allowed, (
            f"{jax.tree_util.keystr(path)}: {error:.3g} apart, allowed {allowed:.3g}"
        )


def rounding(case: Case, leaf, term) -> Any:
    """What the tolerance allows one entry of a result, `term` being that of its terms."""
    eps = float(jnp.finfo(leaf.dtype).eps)
    return np.sqrt(case.examples) * (eps * np.abs(wide(leaf)).max(initial=0) + term)
