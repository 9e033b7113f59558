"""Activations whose derivative depends on the side of zero alone.

Knows activations as functions; where z comes from is the business of `_stages`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax


class Sides(NamedTuple):
    """An activation that is z above zero and slope*z below."""

    slope: float
    closed: bool  # whether zero itself counts as above, as JAX's derivative has it


def sides(activation: Callable) -> Sides | None:
    """The two sides of relu and leaky_relu; None for any other function, whatever it does."""
    if activation is jax.nn.relu:
        return Sides(0.0, closed=False)
    slope = 0.01 if activation is jax.nn.leaky_relu else None
    if isinstance(activation, partial) and activation.func is jax.nn.leaky_relu:
        if not activation.args and activation.keywords.keys() <= {"negative_slope"}:
            slope = activation.keywords.get("negative_slope", 0.01)
    # A slope of 0 or less would leave y no sign to tell the sides by.
    if isinstance(slope, (int, float)) and slope > 0:
        return Sides(float(slope), closed=True)
    return None
