"""The counters, on programs whose count is known; and that not everything compiles."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
import pytest

from benchmarks.compiled import convolutions, kernels, passes, peak_temporary, residual_bytes

X = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
BYTES = 4 * 1024 * 1024


def repeated(x):
    return lax.fori_loop(0, 10, lambda _, x: jnp.sin(x) @ x, x)


@pytest.mark.parametrize(
    "f, expected, launched",
    [
        (lambda x: x + 1, 2, 1),
        (jnp.sum, 1, 2),
        (lambda x: 2 * x[:256], 0.5, 1),  # a quarter is read
        (lambda x: x @ x, 2, 1),  # one operand
        (repeated, 42, 42),  # 2 copies; each time a product, a copy, the loop's counter and its end
    ],
)
def test_passes_and_kernels(f, expected, launched, for_h200):
    compiled = for_h200(f, X)
    assert passes(compiled, X) == pytest.approx(expected, abs=0.01)
    assert kernels(compiled) == launched


def test_an_instruction_without_a_rule_is_an_error(for_h200):
    with pytest.raises(NotImplementedError, match="a fft"):
        passes(for_h200(jnp.fft.fft, X), X)


def network(images, filters, weights):
    """A product of matrices is none of its convolutions, though a TPU writes it as one."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    features = lax.conv_general_dilated(images, filters, (1, 1), "SAME", None, None, dimensions)
    return jnp.sum(jnp.sin(jnp.mean(features, (1, 2)) @ weights))


NETWORK = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 28, 28, 64), (3, 3, 64, 64))]
NETWORK.append(jax.ShapeDtypeStruct((64, 128), jnp.bfloat16))


def assert_three_convolutions(compile_):
    """Forward, and backward to the filters and to the images."""
    assert convolutions(compile_(jax.grad(network, argnums=(0, 1, 2)), *NETWORK)) == 3


def test_convolutions_for_an_h200(for_h200):
    assert_three_convolutions(for_h200)


def test_convolutions_for_a_tpu(for_tpu):
    assert_three_convolutions(for_tpu)


def test_convolutions_for_a_cpu():
    assert_three_convolutions(lambda f, *shapes: jax.jit(f).lower(*shapes).compile())


def test_residual_bytes():
    assert residual_bytes(lambda x: 2 * x, X) == 0
    assert residual_bytes(lambda x: x * x, X) == BYTES  # x, twice used
    assert residual_bytes(lambda x: jnp.exp(jnp.exp(x)), X) == 2 * BYTES


# ---- what must not compile, so that it means something when something does -----------------------


def in_one_block(n):
    """A kernel that holds an n by n matrix, twice, in the memory shared by one block of threads."""

    def product(x_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...])

    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    few_warps = triton.CompilerParams(num_warps=4, num_stages=1)
    return pl.pallas_call(product, out_shape=x, compiler_params=few_warps), x


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_kernel_too_large_for_the_h200(for_h200):
    for_h200(*in_one_block(64))
    with pytest.raises(jax.errors.JaxRuntimeError, match="requested 1048576, available: 232448"):
        for_h200(*in_one_block(512))


def test_a_program_too_large_for_the_tpu(for_tpu):
    def product(x):
        return x @ x.T @ x

    small, large = (jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (1 << 10, 1 << 17))
    assert peak_temporary(for_tpu(product, small)) <= 4 * small.size
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory on HBM"):
        for_tpu(product, large)
