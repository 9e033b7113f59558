"""Inputs that strain the numbers of a batch normalization, and what is exact for them.

Each is rounded to its dtype first, and the exact results are those of the rounded input, in float64
by NumPy and the formulas, a chunk of examples at a time: no JAX, and no float64 copy of all of x.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5  # the default of all that are compared
CHUNK = 2**22  # numbers in float64 at once
LARGE = 2**24  # numbers from which on there are no gradients, and few implementations
SHAPE, QUICK_SHAPE = (4096, 8), (512, 4)
COUNTS = (1, 2, 3, 16, 256, 4096, 2**16, 2**20, 2**24, 2**27)
QUICK_COUNTS = (1, 2)
DTYPES = ("float32", "bfloat16", "float16")


class Case(NamedTuple):
    """An input: x [N, C] in its dtype."""

    name: str
    x: np.ndarray

    @property
    def large(self) -> bool:
        return self.x.size >= LARGE


class Exact(NamedTuple):
    """What is right, in float64. `y` and `dx` are functions of a slice of the examples.

    `unit`: in what errors of each quantity are told: the size of the terms that it is made of, so
    that where these cancel nobody is blamed for their rounding.
    """

    mean: np.ndarray
    var: np.ndarray
    dscale: np.ndarray
    x: np.ndarray
    dy: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    unit: dict[str, float]

    def y(self, part: slice) -> np.ndarray:
        return self.x_hat(part) * self.scale + self.bias

    def dx(self, part: slice) -> np.ndarray:
        dy, n = self.dy[part].astype(np.float64), len(self.x)
        dbias = self.dy.sum(0, np.float64)
        slope = self.scale / np.sqrt(self.var + EPSILON) / n
        return slope * (n * dy - dbias - self.x_hat(part) * self.dscale)

    def x_hat(self, part: slice) -> np.ndarray:
        # One example is its own mean: x_hat is 0, exactly, as in jax_bn.
        return (self.x[part].astype(np.float64) - self.mean) / np.sqrt(self.var + EPSILON)


def cases(quick: bool = False) -> Iterator[Case]:
    """All of them, one at a time: the largest takes half a gigabyte."""
    for dtype in DTYPES:
        shape = QUICK_SHAPE if quick else SHAPE
        yield from (Case(name, rounded(x, dtype)) for name, x in inputs(shape, dtype))
    random = np.random.default_rng(1)
    for n in QUICK_COUNTS if quick else COUNTS:
        yield Case(f"N = {n}", 3 + random.standard_normal((n, 1), np.float32))


def names(quick: bool = False) -> Iterator[str]:
    """Of all cases, without the arrays."""
    for dtype in DTYPES:
        yield from (name for name, _ in inputs((8, 2), dtype))
    yield from (f"N = {n}" for n in (QUICK_COUNTS if quick else COUNTS))


def inputs(shape: tuple[int, int], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values in float64; those that the dtype can represent."""
    normal = np.random.default_rng(0).standard_normal(shape)
    info = jnp.finfo(dtype)
    for power in range(7):
        if 10**power * float(info.eps) < 1:  # else the steps of the dtype are wider than the std
            yield f"mean/std = 1e{power}", 10**power + normal
    one, worst = normal.copy(), normal.copy()
    one[shape[0] // 3] = 1e4
    worst[:2] = 1e4
    yield "one outlier of 1e4 std", one
    yield "outliers of 1e4 std first and second", worst
    yield "constant", np.broadcast_to(1 / np.arange(3.0, 3 + shape[1]), shape)
    yield "subnormal", normal * float(info.smallest_normal) / 8
    if float(info.max) > 1e30:  # the squares are within float32, their sum is not
        yield "std = 1e18", 1e18 * normal
    yield "largest finite, half of them negative", float(info.max) * np.sign(normal)
    yield "largest finite, from half of it on", float(info.max) * (0.75 + normal / 4).clip(0.5, 1)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    info = jnp.finfo(dtype)
    return x.clip(float(info.min), float(info.max)).astype(info.dtype)


def arguments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy in x's dtype, and scale and bias in float32: eighths, which every dtype holds."""
    random = np.random.default_rng(2)
    features = x.shape[1:]
    # Of size 1 whatever x is; for the largest x in the same pattern over and over.
    pattern = random.standard_normal((min(len(x), SHAPE[0]), *features), np.float32)
    dy = np.resize(pattern, x.shape).astype(x.dtype)
    scale, bias = ((random.integers(4, 13, features) / 8).astype(np.float32) for _ in range(2))
    return dy, scale, bias


def parts(n: int, features: int) -> list[slice]:
    """Of the examples, so that each has about `CHUNK` numbers."""
    step = max(1, CHUNK // features)
    return [slice(start, start + step) for start in range(0, n, step)]


def exact(x: np.ndarray, dy: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Exact:
    """By the formulas of `jax_bn.batch_norm`, in float64; the variance in a sweep of its own."""
    n, features = x.shape

    def total(term) -> np.ndarray:
        return sum((term(part).sum(0) for part in parts(n, features)), np.zeros(features))

    def wide(part: slice) -> np.ndarray:
        return x[part].astype(np.float64)

    mean = total(wide) / n
    mean += total(lambda part: wide(part) - mean) / n  # what the first sum rounded
    var = total(lambda part: np.square(wide(part) - mean)) / n
    wide_scale, wide_bias = scale.astype(np.float64), bias.astype(np.float64)
    known = Exact(mean, var, np.zeros(features), x, dy, wide_scale, wide_bias, {})

    def dscale(part: slice) -> np.ndarray:
        return dy[part].astype(np.float64) * known.x_hat(part)

    units = dict(
        mean=np.sqrt(mean**2 + var),
        var=var,
        y=max(np.max(np.abs(known.y(part))) for part in parts(n, features)),
        dx=scale / np.sqrt(var + EPSILON) * np.max(np.abs(dy)).astype(np.float64),
        dscale=np.sqrt(total(lambda part: dscale(part) ** 2)),
    )
    unit = {name: float(np.max(v)) or 1.0 for name, v in units.items()}
    return known._replace(dscale=total(dscale), unit=unit)
