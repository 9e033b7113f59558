"""Strict settings for every test; and no program is compiled twice.

Float64 is switched on where a test asks for it (`jax.enable_x64`), so that all others run in the
precision of users.

Tests make the same programs again and again, from new functions, for which JAX would compile them
anew. Each process keeps those of its own, until it ends.
"""

import shutil
import tempfile

import jax

COMPILED = tempfile.mkdtemp(prefix="jax_bn-tests-")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure():
    shutil.rmtree(COMPILED, ignore_errors=True)
