"""Which affine layer stands right before which normalization, proven from a trace of the model.

A fold changes the affine layer's arrays and its result. So a pair may be folded if in the model's
jaxpr nothing but the layer reads the arrays, and nothing but the normalization reads the result.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
import jax.numpy as jnp

from jax_bn import _arguments, _intercept
from jax_bn._shapes import feature_axes

STATS = "mean", "var"
PRODUCTS = "dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls"
MARK = "jax_bn_fold "  # before the path of a layer, where the jaxpr names its input or its result


class Call(NamedTuple):
    """A call of a layer: where its arrays are among the model's, -1 if they are none of them."""

    places: dict[str, int]
    refusal: str | None  # why it cannot be folded
    out_axis: int = -1  # of an affine layer: its features' axis in the kernel
    epsilon: float = 0.0  # of a normalization
    dtype: Any = None  # of its result


class Fold(NamedTuple):
    """What takes the place of an affine layer's arrays and of the normalization after it."""

    norm: str  # its path
    kernel: jax.Array
    bias: jax.Array
    has_bias: bool  # whether the layer had one before
    dtype: Any  # of the normalization's result


class Trace:
    """What a model calls and where the results go, seen in its jaxpr.

    An affine layer's result and a normalization's input are marked with the layer's path, by a
    `checkpoint_name`. The pair stands alone if the one mark is read by the other and nothing else.
    """

    def __init__(
        self, arrays: Callable[[Any, Iterable[str]], dict[str, Any]], own_code: Iterable[str] = ()
    ):
        self.arrays = arrays
        self.own_code = set(own_code)  # paths of normalizations that do more than their class does
        self.affines: dict[str, list[Call]] = defaultdict(list)
        self.norms: dict[str, list[Call]] = defaultdict(list)
        self.leaves: list[jax.Array] = []  # the model's arrays, as they are traced
        self.array_readers: list[int] = []  # how many operations read each of them
        self.result_readers: dict[str, list[str | None]] = {}  # of each affine layer; None: no norm

    def watchers(self, affines: Iterable[type], norms: Iterable[type]) -> dict[type, Callable]:
        """For `_intercept`: what looks at the calls of layers of these classes."""
        return dict.fromkeys(affines, self.affine) | dict.fromkeys(norms, self.norm)

    def places(self, layer, *names: str) -> dict[str, int]:
        place = {id(leaf): i for i, leaf in enumerate(self.leaves)}
        return {name: place.get(id(v), -1) for name, v in self.arrays(layer, names).items()}

    def affine(self, layer, path, run, *args, **kwargs):
        refusal = None
        for name in PRODUCTS:
            if getattr(layer, name, None) not in (None, lax.dot_general, lax.conv_general_dilated):
                refusal = f"{path!r} has a {name} of its own, which need not be linear"
        out_axis = -2 if getattr(layer, "transpose_kernel", False) else -1
        call = Call(self.places(layer, "kernel", "bias"), refusal, out_axis)
        self.affines[path].append(call)
        return checkpoint_name(run(*args, **kwargs), MARK + path)

    def norm(self, layer, path, run, x, use_running_average=None, **rest):
        if _intercept.trains(layer, use_running_average):
            raise ValueError(
                f"cannot fold: {path!r} runs in training; expected evaluation: pass call=, which "
                "sets the model's flag, as in call=lambda model, x: model(x, train=False)"
            )
        x = jnp.asarray(x)
        y = run(checkpoint_name(x, MARK + path), use_running_average, **rest)
        refusal = None
        if feature_axes(layer.axis, x.ndim) != (x.ndim - 1,):
            refusal = f"{path!r} has axis={layer.axis}; expected the last axis of x, rank {x.ndim}"
        places = self.places(layer, "scale", "bias", *STATS)
        call = Call(places, refusal, epsilon=layer.epsilon, dtype=y.dtype)
        self.norms[path].append(call)
        return y

    def folds(self, traced, variables, args, pairs) -> dict[str, Fold]:
        """What to fold, by the path of the affine layer."""

        def f(variables, *args):
            self.leaves = jax.tree.leaves(variables)
            return traced(variables, *args)

        self.read(jax.make_jaxpr(f)(variables, *args).jaxpr)
        wanted = pairs
        if pairs is not None:
            _arguments.mapping("pairs", pairs, "paths of affine layers to paths of normalizations")
        if pairs is None:
            wanted = {a: n for a, to in self.result_readers.items() for n in to if n in self.norms}
        refusals = {a: r for a, n in wanted.items() if (r := self.refusal(a, n)) is not None}
        chosen = {a: n for a, n in wanted.items() if a not in refusals}
        if not chosen or (pairs is not None and refusals):
            why = "; ".join(refusals.values()) or (
                f"none of the normalizations {sorted(self.norms)} gets the result of one of the "
                f"layers {sorted(self.affines)}"
            )
            raise ValueError(f"cannot fold: {'' if pairs is None else 'of pairs, '}{why}")
        values = jax.tree.leaves(variables)
        return {a: self.fold(a, n, values) for a, n in chosen.items()}

    def read(self, jaxpr) -> None:
        """Who reads what. Layers within a sub-jaxpr are not found here, and so not folded."""
        readers, marked = defaultdict(list), {}
        for eqn in jaxpr.eqns:
            name = str(eqn.params.get("name", ""))
            mark = name.removeprefix(MARK) if name.startswith(MARK) else None
            if mark is not None:
                marked[mark] = eqn.outvars[0]
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    readers[v].append(mark)
        for v in jaxpr.outvars:
            if not isinstance(v, Literal):
                readers[v].append(None)
        self.array_readers = [len(readers[v]) for v in jaxpr.invars]
        self.result_readers = {p: readers[marked[p]] if p in marked else [] for p in self.affines}

    def refusal(self, affine: str, norm: str) -> str | None:
        """Why this pair cannot be folded, None if it can."""
        for path, calls, kind in (
            (affine, self.affines, "affine layers"),
            (norm, self.norms, "batch normalizations"),
        ):
            if path not in calls:
                return f"{path!r} is none of the {kind} that were called: {sorted(calls)}"
            if len(calls[path]) > 1:
                return f"{path!r} is called {len(calls[path])} times; expected once"
            if -1 in calls[path][0].places.values():
                return (
                    f"{path!r} is within a transform (scan, vmap, remat, jit, map_variables): "
                    "its arrays need not be the model's; expected none: fold a model made without"
                )
            if calls[path][0].refusal:
                return calls[path][0].refusal
        if norm in self.own_code:
            return f"{norm!r} is of a subclass with a __call__ of its own, which would be lost"
        if self.result_readers[affine] != [norm]:
            return (
                f"the result of {affine!r} goes elsewhere than to {norm!r} alone, or the two are "
                "within a transform"
            )
        for name, place in self.affines[affine][0].places.items():
            if self.array_readers[place] != 1:
                return f"the {name} of {affine!r} is read elsewhere too"
        return None

    def fold(self, affine: str, norm: str, values: list[jax.Array]) -> Fold:
        """The formula, with values for the model's arrays."""
        a, n = self.affines[affine][0], self.norms[norm][0]
        own, bn = ({k: _wide(values[i]) for k, i in c.places.items()} for c in (a, n))
        with jax.numpy_dtype_promotion("standard"):  # of float32 with what is wider
            gain = bn.get("scale", 1) * lax.rsqrt(bn["var"] + n.epsilon)
            bias = (own.get("bias", 0) - bn["mean"]) * gain + bn.get("bias", 0)
            axes = range(-own["kernel"].ndim, 0)
            kernel = own["kernel"] * jnp.expand_dims(gain, [i for i in axes if i != a.out_axis])
        kernel = _rounded(kernel, values[a.places["kernel"]])
        bias = _rounded(bias, values[a.places.get("bias", a.places["kernel"])])
        return Fold(norm, kernel, bias, "bias" in own, n.dtype)


def _wide(v) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # asked for by name, so not implicit
        return jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))


def _rounded(v: jax.Array, like) -> jax.Array:
    """`v` in the dtype of `like`, or complex if it is."""
    return v.astype(v.dtype if jnp.iscomplexobj(v) else like.dtype)
