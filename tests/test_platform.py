"""The choice by platform: what each program holds; every transformation goes through it."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn
from jax_bn._platform import PLATFORMS, on

X = jnp.arange(1.0, 7.0).reshape(2, 3)


def chosen(x, k):
    """k*x, and its sum; a barrier tells the program of the CPU from the others."""

    def f(x, k):
        return dict(product=lax.optimization_barrier(k * x), total=jnp.sum(k * x, 0))

    def otherwise(x, k):
        return dict(product=k * x, total=jnp.sum(k * x, 0))

    return on("cpu", f, x, k, otherwise=otherwise)


def plain(x, k):
    return dict(product=k * x, total=jnp.sum(k * x, 0))


def total(f):
    def run(x, k):
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(f(x, k)))

    return run


@pytest.mark.parametrize("platform", [*PLATFORMS, "rocm"])
def test_each_platform_gets_its_own(platform):
    text = jax.jit(chosen).trace(X, 2.0).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == (platform == "cpu")
    assert "stablehlo.case" not in text


def test_one_program_for_several_platforms():
    exported = jax.export.export(jax.jit(chosen), platforms=PLATFORMS)(X, 2.0)
    text = exported.mlir_module()
    assert text.count("stablehlo.optimization_barrier") == 1 and "stablehlo.case" in text
    jax.tree.map(np.testing.assert_array_equal, exported.call(X, 2.0), plain(X, 2.0))


def test_a_choice_within_a_choice_is_made_with_it():
    """In the branch for one platform nothing is left to choose: no conditional within another."""

    def twice(x, k):
        return on("cpu", chosen, x, k, otherwise=lambda x, k: chosen(x + 0, k))

    once, within = (
        jax.export.export(jax.jit(f), platforms=PLATFORMS)(X, 2.0) for f in (chosen, twice)
    )
    conditionals = [e.mlir_module().count("stablehlo.case") for e in (once, within)]
    assert conditionals[0] == conditionals[1] > 0
    jax.tree.map(np.testing.assert_array_equal, within.call(X, 2.0), plain(X, 2.0))


def test_layers_compile_without_conditionals():
    """Whatever the layer asks of one platform costs the others nothing."""

    def step(x):
        y, pull = jax.vjp(lambda x: jax_bn.batch_norm(x, activation=jax.nn.relu)[0], x)
        return pull(y)

    for platform in PLATFORMS:
        text = jax.jit(step).trace(X).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.case" not in text, platform
        assert ("optimization_barrier" in text) or platform not in ("cpu", "tpu")


TRANSFORMED = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "vmap, both": lambda f: lambda x, k: jax.vmap(f, (1, 0))(x, k * jnp.arange(3.0)),
    "jvp": lambda f: jax.jit(lambda x, k: jax.jvp(f, (x, k), (jnp.cos(x), 3.0))),
    "grad": lambda f: jax.jit(jax.grad(total(f), (0, 1))),
    "hessian": lambda f: jax.jit(jax.hessian(total(f))),
    "reverse over reverse": lambda f: jax.jit(
        jax.grad(lambda x, k: jnp.sum(jnp.sin(jax.grad(total(f))(x, k))))
    ),
    "of vmap": lambda f: jax.jit(jax.grad(total(jax.vmap(f, (0, None))), (0, 1))),
    "remat": lambda f: jax.jit(jax.grad(jax.checkpoint(total(f)), (0, 1))),
    "linear_transpose": lambda f: (
        lambda x, k: jax.linear_transpose(lambda x: f(x, k), x)(plain(jnp.cos(x), 1.0))
    ),
    "scan": lambda f: lambda x, k: lax.scan(lambda c, row: (c, f(row, c)), k, x),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformations(transformed):
    actual, expected = (transformed(f)(X, jnp.float32(2.0)) for f in (chosen, plain))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=4 * float(np.finfo(np.float32).eps))


def test_a_transpose_is_chosen_too():
    """The barrier of the CPU stands before the cotangents as well."""

    def back(x):
        return jax.linear_transpose(lambda x: chosen(x, 2.0), x)(plain(x, 1.0))

    texts = {p: jax.jit(back).trace(X).lower(lowering_platforms=(p,)).as_text() for p in PLATFORMS}
    barriers = {p: text.count("optimization_barrier") for p, text in texts.items()}
    assert barriers["cpu"] > 0 and barriers["cuda"] == barriers["tpu"] == 0


def test_two_that_differ_in_type_are_refused():
    def f(x):
        return on("cpu", lambda x: x.astype("bfloat16"), x, otherwise=lambda x: x)

    with pytest.raises(TypeError, match=r"on cpu results are .*bfloat16.*; expected .*float32"):
        jax.jit(f)(X)
