"""The one tolerance of the tests: twice the definition's own error, plus rounding; no constants.

An implementation in some dtype is judged beside the plain definition in the same dtype, both
against the definition in float64. Where the dtype is float64 itself there is nothing wider to see
the definition's error with; then it is given in float32 and counts for less by the ratio of eps.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

# A GPU's sine, exponential or rsqrt is wrong by up to two units in the last place, where the best
# result is by half of one (CUDA's programming guide, "Mathematical Functions").
ELEMENTARY = 4 if jax.default_backend() == "gpu" else 1


def in_float64(f, *args):
    """f(*args) with every inexact array of `args` widened to float64 or complex128, as NumPy."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, f(*jax.tree.map(_widen, args)))


def _widen(a):
    kind = np.asarray(a).dtype
    if np.issubdtype(kind, np.complexfloating):
        return np.asarray(a, np.complex128)
    if np.issubdtype(kind, np.integer) or kind == np.bool_:
        return np.asarray(a)
    return np.asarray(a, np.float64)


def narrowed(tree):
    """Every 64-bit inexact array of the tree in 32 bits: the definition's arguments then."""

    def narrow(a):
        kind = np.asarray(a).dtype
        return np.asarray(a, {"float64": "float32", "complex128": "complex64"}.get(kind.name, kind))

    return jax.tree.map(narrow, tree)


def assert_as_accurate(actual, definition, oracle, examples: int, terms=None):
    """Asserts |actual - oracle| <= 2 |definition - oracle| + eps*sqrt(examples)*scale, by leaf.

    On a GPU the last term counts `ELEMENTARY` times. `scale` is the largest magnitude in the leaf;
    `eps` of the dtype of `actual`. Where a leaf is a sum that may cancel, `terms` says by how much
    its terms are rounded, a number for each leaf, to be added to eps*scale: else a definition that
    had luck would set what is allowed.
    """
    chex.assert_trees_all_equal_structs(actual, definition, oracle)
    chex.assert_trees_all_equal_shapes(actual, definition, oracle)
    chex.assert_trees_all_equal_dtypes(narrowed(actual), narrowed(definition))
    for (path, a), d, o, t in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(definition),
        jax.tree.leaves(oracle),
        jax.tree.leaves(terms) if terms is not None else [0.0] * len(jax.tree.leaves(oracle)),
        strict=True,
    ):
        assert np.isfinite(o).all(), f"{path}: the oracle is not finite"
        eps, eps_d = (float(jnp.finfo(v.dtype).eps) for v in (a, d))
        error, budget = (np.abs(_widen(v) - o).max(initial=0) for v in (a, d))
        rounding = eps * np.abs(o).max(initial=0) + t
        allowed = 2 * budget * eps / eps_d + ELEMENTARY * np.sqrt(examples) * rounding
        assert error <= allowed, (
            f"{jax.tree_util.keystr(path)}: error {error:.3g}, allowed {allowed:.3g}"
        )
