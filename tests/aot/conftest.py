"""Compilers for devices that are not here. Without them a test skips, and says why; or it fails,
with `--need-compilers`.
"""

import os

# Each of pytest's workers loads the library for TPUs, which would keep others out for a TPU's sake.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"

import jax
import pytest

from benchmarks.compiled import compile_for_h200, compile_for_tpu, missing_compiler

jax.config.update("jax_platforms", "cpu")  # before JAX starts, or the plugins look for devices
jax.config.update("jax_enable_compilation_cache", False)  # whose programs want a device to load


def pytest_addoption(parser):
    parser.addoption("--need-compilers", action="store_true", help="fail where one is missing")


def needs_compiler(target, request):
    if reason := missing_compiler(target):
        if request.config.getoption("--need-compilers"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def for_h200(request):
    needs_compiler("h200", request)
    return compile_for_h200


@pytest.fixture(scope="session")
def for_v5e(request):
    return compiler_for(request, "v5e:2x2")


@pytest.fixture(scope="session", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def for_tpu(request):
    return compiler_for(request, request.param)


def compiler_for(request, topology):
    needs_compiler("tpu", request)
    return lambda f, *shapes: compile_for_tpu(f, topology, *shapes)
