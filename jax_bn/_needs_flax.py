"""Imported first by what needs Flax: says how to get it where it is not installed."""

from importlib.util import find_spec

if find_spec("flax") is None:
    raise ModuleNotFoundError(
        "the Flax layers, jax_bn.recalibrate and jax_bn.fold need Flax, which is not installed: "
        "pip install '.[flax]' in a clone of jax_bn, or pip install flax",
        name="flax",
    )
