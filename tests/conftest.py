"""Strict settings for every test.

Float64 is switched on where a test asks for it (`jax.enable_x64`), so that all others run in the
precision of users.
"""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
