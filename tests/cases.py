"""What the property-based tests draw: calls of `batch_norm`, and the numbers they are made with.

A `Case` is what is static about a call. Cases come from a pool, since each has to be compiled; the
numbers, which need not be, are new in every example.

The profile is chosen by the environment variable HYPOTHESIS_PROFILE: "short" (the default), the
same few examples on every run, or "long", for `make fuzz`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
import os
import random
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np

# Compiling takes longer than any deadline. There is no database, so nothing is kept between runs: a
# failure prints the case and the seed that it is made of.
_COMMON: Any = dict(
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("short", max_examples=8, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=1000, print_blob=True, **_COMMON)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "short")
settings.load_profile(PROFILE)
LONG = PROFILE == "long"
POOL = int(os.environ.get("FUZZ_POOL", "0"))  # other calls, for another number

leaky_relu = partial(jax.nn.leaky_relu, negative_slope=0.1)
KINKED = jax.nn.relu, leaky_relu


class Case(NamedTuple):
    """One call, but for the numbers."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    x: str = "float32"  # dtypes; None: there is none
    scale: str | None = None
    bias: str | None = None
    residual: str | None = None
    mask: str | None = None  # "batch": of the batch axes; "x": of x's shape; with a 1: "spread"
    mask_dtype: str = "bool"
    activation: Any = None
    dtype: str | None = None
    epsilon: float = 1e-5
    forward_mode: bool = False
    outer: str = "forward"  # mode of the second derivative; the first is by reverse mode

    @property
    def features(self) -> tuple[int, ...]:
        given = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(sorted(a % len(self.shape) for a in given))

    @property
    def reduced(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a not in self.features)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.features)

    @property
    def examples(self) -> int:
        return int(np.prod([self.shape[a] for a in self.reduced], dtype=int))

    @property
    def wide(self) -> bool:
        """Whether it needs 64 bits."""
        return "float64" in (self.x, self.scale, self.bias, self.residual, self.dtype)

    @property
    def complex(self) -> bool:
        return "complex64" in (self.x, self.scale, self.bias, self.dtype)

    @property
    def differentiable(self) -> bool:
        """In x."""
        return jnp.issubdtype(self.x, jnp.inexact)

    @property
    def eps(self) -> float:
        """Of the arithmetic."""
        return float(jnp.finfo("float64" if self.wide else "float32").eps)


FLOATS = "float32", "float32", "bfloat16", "float16"
ACTIVATIONS = None, None, jax.nn.relu, leaky_relu, jax.nn.gelu, jax.nn.silu


def _drawn(pick: random.Random) -> Case | None:
    """A case by chance, or None: one that says nothing, or that jax_bn refuses."""
    rank = pick.choice([1, 2, 2, 3, 3, 4, 5])
    shape = tuple(pick.choice([1, 2, 3, 5, 7, 8]) for _ in range(rank))
    features = pick.sample(range(rank), pick.choice([1, 1, 1, 2, rank - 1, rank, 0]) % (rank + 1))
    axis: Any = tuple(a - rank * pick.randint(0, 1) for a in features)
    axis = axis[0] if len(axis) == 1 and pick.random() < 0.7 else axis
    x = pick.choice([*FLOATS, "float64", "complex64", "int32", "int8", "bool"])
    also = pick.choice([None, "float32", x if x in (*FLOATS, "float64") else "bfloat16"])
    case = Case(shape, axis, x, residual=pick.choice([None, also]))
    scale, bias = (pick.choice([None, also, "float32", "bfloat16"]) for _ in range(2))
    if x == "complex64":
        activation, dtype = pick.choice([None, jnp.sin]), None
        scale = pick.choice([scale, "complex64"])
    else:
        activation = pick.choice(ACTIVATIONS)
        dtype = pick.choice([None, None, None, "float32", "bfloat16", "float16"])
        if pick.random() < 0.05:  # real x, complex y
            scale, dtype, activation = "complex64", "complex64", None
    case = case._replace(
        scale=scale,
        bias=bias,
        activation=activation,
        dtype=dtype,
        mask=pick.choice([None, None, "batch", "x", "spread"]),
        mask_dtype=pick.choice(["bool", "int32", "uint8"]),
        epsilon=pick.choice([1e-5, 1e-5, 1e-3, 1.0, 0.0]),
        outer=pick.choice(["forward", "reverse"]),
    )
    narrow = "float16" in (case.x, case.scale, case.bias, case.residual, case.dtype)
    if narrow:  # second derivatives grow as 1/epsilon, and float16 ends at 65504
        case = case._replace(epsilon=1.0)
    if case.epsilon == 0 and (case.mask or case.x in ("bfloat16", "int32", "int8", "bool")):
        case = case._replace(epsilon=1e-5)  # without variance the definition has 0/0
    if case.complex:
        case = case._replace(outer="forward")  # what reverse mode gives is conjugate in part
    if case.complex and activation is not None:
        case = case._replace(mask=None)  # the definition's sin overflows where masked: 0*inf
    if not case.differentiable and scale is None and bias is None and case.residual is None:
        return None
    if np.prod(shape) > 600 or case.examples < pick.choice([1, 2, 3, 3, 3]):
        return None
    return None if case.epsilon == 0 and case.examples == 1 else case


@lru_cache
def pool(size: int) -> tuple[Case, ...]:
    """The same cases on every run."""
    pick = random.Random(POOL)
    cases: dict[Case, None] = {}
    while len(cases) < size:
        if (case := _drawn(pick)) is not None:
            cases[case] = None
    return tuple(cases)


def cases(long: int, short: int = 3, fits: Callable[[Case], bool] = lambda case: True):
    """A strategy: one of that many cases, the simple ones first."""
    size = long if LONG else short
    chosen = [case for case in pool(40 * size) if fits(case)][:size]
    assert len(chosen) == size, "too few cases fit"
    return st.sampled_from(sorted(chosen, key=_complexity))


def _complexity(case: Case):
    plain = Case(case.shape, case.axis)
    return np.prod(case.shape) + 100 * sum(a != b for a, b in zip(case, plain, strict=True))


class Seed(NamedTuple):
    """What the numbers of an example are made of."""

    seed: int
    location: float
    spread: float
    kind: str
    hidden: float


seeds = st.builds(
    Seed,
    seed=st.integers(0, 2**32 - 1),
    location=st.sampled_from([0.0, 1.0, -30.0, 1000.0]),
    spread=st.sampled_from([1.0, 0.1, 20.0]),
    kind=st.sampled_from(["normal", "grid", "two values", "outlier", "constant", "sorted"]),
    hidden=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)


class Params(NamedTuple):
    """The array arguments that derivatives are taken in."""

    x: Any
    scale: Any
    bias: Any
    residual: Any


class Numbers(NamedTuple):
    """One example's."""

    params: Params
    mask: Any
    cotangent: Any  # of y, mean and var
    direction: Params


def numbers(case: Case, seed: Seed) -> Numbers:
    """All of them in the dtypes that they go in with, but cotangents and direction.

    These are multiples of 1/16 below 4, and so the same numbers in every dtype.
    """
    normal = np.random.default_rng(seed.seed).normal

    def exact(shape):
        return np.clip(np.round(16 * normal(size=shape)) / 16, -4, 4)

    def some(dtype, shape, make=normal):
        if dtype is None:
            return None
        v = make(size=shape)
        return np.asarray(v + 1j * make(size=shape) if dtype == "complex64" else v, dtype)

    params = Params(
        x=some(case.x, case.shape, partial(_examples, case, seed, normal)),
        scale=some(case.scale, case.feature_shape),
        bias=some(case.bias, case.feature_shape),
        residual=some(case.residual, case.shape),
    )
    direction = Params(*(None if v is None else exact(v.shape) for v in params))
    cotangent = exact(case.shape), exact(case.feature_shape), exact(case.feature_shape)
    if not case.differentiable:
        direction = direction._replace(x=None)
    return Numbers(params, _mask(case, seed), cotangent, direction)


def _examples(case: Case, seed: Seed, normal, size):
    """x: numbers that are hard in one way or another."""
    location, spread, kind = seed.location, seed.spread, seed.kind
    v = normal(size=size)
    if kind == "grid":
        v = np.round(4 * v) / 4
    if kind == "two values":
        v = np.sign(v)
    if kind == "outlier" and v.size:
        v.flat[0] = 100
    if kind == "constant" and case.epsilon > 0:  # some of the features
        v = v * (normal(size=[n if a in case.features else 1 for a, n in enumerate(size)]) > 0)
    if kind == "sorted":
        for a in case.reduced:
            v = np.sort(v, a)
    v = location + spread * v
    return v > location if case.x == "bool" else np.clip(v, -120, 120) if case.x == "int8" else v


def _mask(case: Case, seed: Seed):
    if case.mask is None:
        return None
    random = np.random.default_rng(seed.seed + 1)
    shape = case.shape
    if case.mask == "batch":
        shape = tuple(shape[a] for a in case.reduced)
    if case.mask == "spread":
        shape = tuple(n if a % 2 else 1 for a, n in enumerate(shape))
    return np.asarray(random.uniform(size=shape) >= seed.hidden, case.mask_dtype)


def aligned(case: Case, mask):
    """The mask as the definition wants it: bool, of x's rank."""
    if case.mask == "batch":
        ones = (1 if a in case.features else n for a, n in enumerate(case.shape))
        mask = mask.reshape(tuple(ones))
    return mask.astype(bool)
