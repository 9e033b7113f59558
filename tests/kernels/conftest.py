"""Hand-written stages: on a Hopper GPU they run, elsewhere Pallas interprets them.

The interpreter deadlocks if XLA has fewer threads than the GPU it plays. XLA is told of as many
processors before it starts, so these tests run in a process of their own.
"""

import os

os.environ.setdefault("NPROC", "64")

from contextlib import nullcontext
from typing import Any

import jax
import pytest

from jax_bn import _implementation


@pytest.fixture(scope="session")
def hopper():
    """Makes a context in which "mosaic_gpu" runs; interpreted, a race is an error."""
    if jax.__version_info__ < _implementation.OLDEST_JAX:
        pytest.skip(f"the interpreter of Mosaic GPU wants jax 0.11; this is {jax.__version__}")
    if jax.default_backend() == "gpu":
        return nullcontext
    if jax.__version_info__ < (0, 12):
        pytest.skip(f"a race is an error from jax 0.12 on; this is {jax.__version__}")
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # an older one, which has less, is skipped above
    checked = plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
    return lambda: plgpu.force_gpu_interpret_mode(checked)
