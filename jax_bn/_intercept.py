"""Sees the calls of chosen layers inside a Flax model, wherever in the model they are.

A watcher stands between the model and the layer: `watcher(layer, path, call, *args, **kwargs)`
returns y, and `call(*args, **kwargs)` is the layer itself. Watchers are given by class, as in
`{BatchNorm: watcher}`. A subclass that calls `super().__call__` is seen at that call, with the
arguments given there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
import inspect
import types
from typing import Any

from flax import linen as nn, nnx
import jax

from jax_bn.linen._replace import within

Watchers = Mapping[type, Callable[..., Any]]


def model_of(cls: type, name: str, model) -> None:
    """Refuses what is no model of Linen (`nn.Module`) or of NNX (`nnx.Module`)."""
    if not isinstance(model, cls):
        kind = "flax.linen.Module" if cls is nn.Module else "flax.nnx.Module"
        raise TypeError(
            f"{name} is of class {type(model).__qualname__}; expected a {kind}: there is one "
            "function for each of Linen and NNX"
        )


def trains(layer, use_running_average: bool | None) -> bool:
    """Whether a batch normalization that is called so takes the statistics of the batch.

    Not so if nobody says: that is the layer's own error.
    """
    given = layer.use_running_average if use_running_average is None else use_running_average
    return given is not None and not (given or getattr(layer, "freeze_statistics", False))


# What a jit inside a Linen model has traced under some watchers is not for others.
_watched_by = jax.make_user_context(default_value=None)


@contextmanager
def in_linen(watchers: Watchers) -> Iterator[None]:
    """A context in which the calls of Linen layers go through `watchers`."""
    if within.value is not None:
        raise RuntimeError(
            "jax_bn.recalibrate and jax_bn.fold were called within replace_batch_norm; expected "
            "outside of it: they take Flax's layers as they are"
        )
    # Both the call of a subclass and its super().__call__ are intercepted: told apart by function.
    methods = {inspect.unwrap(cls.__call__): watcher for cls, watcher in watchers.items()}

    def interceptor(call, args, kwargs, context):
        watcher = methods.get(context.orig_method.func)
        if watcher is None:
            return call(*args, **kwargs)
        return watcher(context.module, "/".join(context.module.path), call, *args, **kwargs)

    with _watched_by(tuple(methods.items())), nn.intercept_methods(interceptor):
        yield


def in_nnx(model: nnx.Module, watchers: Watchers) -> None:
    """From now on the calls of layers in `model`, a copy to be thrown away, go through `watchers`.

    Python finds `__call__` by class, so each layer gets a class of its own, which puts the watcher
    between the layer's class and the watched one. Attributes, `isinstance` and NNX's transforms,
    which carry the class along, see no difference.
    """
    for path, layer in nnx.iter_modules(model, graph=True):
        for watched, watcher in watchers.items():
            if isinstance(layer, watched):
                between = _between(watched, watcher, "/".join(map(str, path)))
                cls = type(layer)
                bases = (between,) if cls is watched else (cls, between)
                layer.__class__ = types.new_class(cls.__name__, bases)


def _between(watched: type, watcher: Callable[..., Any], path: str) -> type:
    class Between(watched):
        def __call__(self, *args, **kwargs):
            return watcher(self, path, super().__call__, *args, **kwargs)

    return Between
