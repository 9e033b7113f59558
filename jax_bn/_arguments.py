"""Arguments of the public functions, checked and in the form that the rule takes.

Each refusal names the argument, what came, what was expected and the way out.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import math
from numbers import Integral
import operator
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from jax_bn import _shapes
from jax_bn._activations import sides


def array(name: str, v) -> jax.Array:
    """`v` as an array of numbers or bools."""
    try:
        v = jnp.asarray(v)
    except (TypeError, ValueError, OverflowError) as e:
        raise TypeError(f"{name} is a {type(v).__name__}; expected an array of numbers") from e
    if jnp.issubdtype(v.dtype, jax.dtypes.extended):
        raise TypeError(f"{name} has dtype {v.dtype}; expected an array of numbers")
    return v


def inexact(name: str, v) -> jax.Array:
    """`v` as a float or complex array; integers and bools as float32, as in Flax."""
    v = array(name, v)
    if jnp.issubdtype(v.dtype, jnp.inexact):
        _wide_enough(name, v.dtype)
        return v
    if jnp.issubdtype(v.dtype, jnp.integer) or v.dtype == jnp.bool_:
        return v.astype(jnp.float32)
    raise TypeError(f"{name} has dtype {v.dtype}; expected a float, complex, integer or bool dtype")


def real_scalar(name: str, v, kind: str) -> jax.Array | np.ndarray:
    """`v` as one real number, which may be traced; `kind` says of what sort it is."""
    a = v if isinstance(v, Tracer) else np.asarray(v)
    real = jnp.issubdtype(a.dtype, jnp.floating) or jnp.issubdtype(a.dtype, jnp.integer)
    if a.ndim or not real:
        raise TypeError(f"{name}={v!r}; expected {kind}")
    return a


def flag(name: str, v) -> bool:
    """`v` as a bool that is known while tracing. None is False; so are 0 and its like, as in Flax.

    A string is refused: "False" would be true.
    """
    try:
        if not isinstance(v, str):
            return bool(v)
        why = None
    except (TypeError, ValueError) as e:  # traced, or an array of several
        why = e
    raise TypeError(
        f"{name}={v!r}; expected True or False, known while tracing: under jit make it a static "
        "argument"
    ) from why


def size(name: str, v) -> int:
    """`v` as the length of an axis."""
    try:
        n = operator.index(v)
    except TypeError as e:
        raise TypeError(f"{name}={v!r}; expected an int") from e
    if n < 0:
        raise ValueError(f"{name}={n}; expected at least 0")
    return n


def function(name: str, v) -> Callable:
    """`v`, which can be called."""
    if not callable(v):
        raise TypeError(f"{name}={v!r}; expected a function")
    return v


def mapping(name: str, v, kind: str) -> Mapping:
    """`v`, a mapping; `kind` says of what to what."""
    if not isinstance(v, Mapping):
        raise TypeError(f"{name} is a {type(v).__name__}; expected {kind}")
    return v


def inexact_dtype(name: str, v) -> jnp.dtype | None:
    """`v` as a float or complex dtype; None stays None."""
    if v is None:
        return None
    try:
        dtype = jnp.dtype(v)
    except TypeError as e:
        raise TypeError(f"{name}={v!r} is no dtype; expected one such as jnp.float32") from e
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{name}={dtype} is not inexact; it must be inexact: float or complex, not {dtype}"
        )
    _wide_enough(name, dtype)
    return dtype


def _wide_enough(name: str, dtype) -> None:
    """JAX promotes no float of 8 bits or less to another: the sums would not know their dtype."""
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{name} has dtype {dtype}; expected float16, bfloat16 or wider: {name}.astype(...)"
        )


def per_feature(name: str, v, x: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """`v`, one number a feature of x. :: [C] -> [1, C]"""
    return _shapes.per_feature(name, inexact(name, v), x.shape, features)


def running(mean, var, x: jax.Array, features: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Given statistics, one number a feature each. :: [C], [C] -> [1, C], [1, C]"""
    if mean is None or var is None:
        raise TypeError("mean or var is None; expected both (batch_norm computes them from x)")
    mean, var = per_feature("mean", mean, x, features), per_feature("var", var, x, features)
    if jnp.iscomplexobj(var):
        raise TypeError(f"var has dtype {var.dtype}; a variance is real: pass var.real")
    return mean, var


def residual(v, x: jax.Array) -> jax.Array:
    """What is added to the result: of x's shape."""
    v = inexact("residual", v)
    if v.shape != x.shape:
        raise ValueError(
            f"residual has shape {v.shape}; expected {x.shape}, that of x: what broadcasts adds a "
            "sum to its gradient, so ask for that by jnp.broadcast_to(residual, x.shape)"
        )
    return v


def elementwise(activation, dtype) -> None:
    """Refuses an `activation` that does not keep shape and dtype; no more of it can be seen."""
    if activation is None:
        return
    if not callable(activation) or not isinstance(activation, Hashable):
        raise TypeError(
            f"activation={activation!r}; expected a hashable function, such as jax.nn.relu"
        )
    if sides(activation) is not None:
        return
    probe = jax.ShapeDtypeStruct((2, 3), dtype)
    try:
        traced, result = jax.make_jaxpr(lambda z: activation(z), return_shape=True)(probe)
    except Exception as e:  # whatever a user's function raises
        raise ValueError(
            f"activation={activation!r} cannot be applied to {dtype}[2,3]; expected an elementwise "
            "function, such as jax.nn.relu"
        ) from e
    if traced.consts:
        raise TypeError(
            f"activation={activation!r} closes over an array, which would be read once and get no "
            "gradient; expected a function of its argument alone. Apply this one to y instead"
        )
    if getattr(result, "shape", None) != probe.shape or result.dtype != dtype:
        raise ValueError(
            f"activation maps {dtype}[2,3] to {result}; expected the same shape and dtype: an "
            "elementwise function. Apply anything else to y"
        )


def mapped_axes(axis_name, groups):
    """axis_name and groups in static form, and how many devices share one mean."""
    if axis_name is None:
        if groups is not None:
            raise ValueError("axis_index_groups needs axis_name, the mapped axis that it divides")
        return (), None, 1
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    known = isinstance(names, Sequence) and all(isinstance(n, Hashable) for n in names)
    if not known or len(set(names)) < len(names):
        raise ValueError(f"axis_name={axis_name!r}; expected a name, or several different ones")
    if groups is not None:
        known = isinstance(groups, Sequence) and all(isinstance(g, Sequence) for g in groups)
        whole = known and all(isinstance(i, Integral) for g in groups for i in g)
        if not whole or len({len(g) for g in groups}) != 1:
            raise ValueError(
                f"axis_index_groups={groups}; expected sequences of indices, at least one, all of "
                "one length"
            )
        groups = tuple(tuple(g) for g in groups)
    names = tuple(names)
    try:
        devices = lax.psum(1, names)
    except NameError as e:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here; expected the name of an axis of an "
            "enclosing shard_map, vmap or pmap. Under plain jit leave axis_name out: the compiler "
            "takes the statistics over the whole batch, however it is sharded"
        ) from e
    if groups is None:
        return names, None, devices
    if sorted(i for group in groups for i in group) != list(range(devices)):
        raise ValueError(
            f"axis_index_groups={groups}; expected each of the {devices} indices along "
            f"{axis_name!r} in one of them"
        )
    return names, groups, len(groups[0])


def static_epsilon(epsilon) -> float:
    """`epsilon` as a number: the rules differentiate as if it were a constant."""
    try:
        value = float(epsilon)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as e:
        raise TypeError(
            f"epsilon={epsilon!r}; expected one real number, known while tracing: under jit "
            "make it a static argument"
        ) from e
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"epsilon={epsilon}; expected a finite number >= 0")
    return value


def dtype_of_y(dtype, x: jax.Array) -> jnp.dtype:
    """`dtype`, or x's own."""
    known = inexact_dtype("dtype", dtype)
    return jax.dtypes.canonicalize_dtype(x.dtype if known is None else known)


def arithmetic_dtype(y_dtype, *arrays: jax.Array | None) -> jnp.dtype:
    """T, in which everything is computed: the widest of float32 and all dtypes involved."""
    dtypes = [v.dtype for v in arrays if v is not None]
    with jax.numpy_dtype_promotion("standard"):  # asked for by name, so not implicit
        wide = jnp.result_type(jnp.float32, y_dtype, *dtypes)
    if jnp.issubdtype(wide, jnp.complexfloating) and not jnp.issubdtype(
        y_dtype, jnp.complexfloating
    ):
        raise ValueError(f"y is complex, but would have dtype {y_dtype}: pass dtype={wide}")
    return wide


def in_arithmetic(wide, x, *per_feature) -> tuple[Any, ...]:
    """Per-feature arrays in T. x stays as narrow as it came, since it is kept for the backward."""
    complexify = jnp.issubdtype(wide, jnp.complexfloating) and not jnp.iscomplexobj(x)
    cast = (None if v is None else v.astype(wide) for v in per_feature)
    return (x.astype(wide) if complexify else x), *cast
