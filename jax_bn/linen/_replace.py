"""Linen models as they are, with our layer in the place of Flax's."""

from collections.abc import Iterator
from contextlib import contextmanager
import inspect
from typing import Any

from flax import linen as nn
import jax

from jax_bn import _arguments
from jax_bn.linen._batch_norm import BatchNorm, batch_normalized

# `forward_mode` within the context, None outside. It is part of the key of JAX's caches, so that a
# model that was traced outside is traced anew inside.
within = jax.make_user_context(default_value=None)


@contextmanager
def replace_batch_norm(*, forward_mode: bool = False) -> Iterator[list[tuple[str, ...]]]:
    """Within it every `flax.linen.BatchNorm` runs as `jax_bn.linen.BatchNorm`, in any model.

    y and the running averages are then those of `jax_bn.linen.BatchNorm`. Fields, variables, their
    paths and dtypes are Flax's as before: in `init` and in `apply`, in training and in evaluation,
    under `nn.jit`, `nn.remat`, `nn.scan`, `nn.vmap` and JAX's own transforms. Neither the model nor
    its variables know of it.

    `jax.jit` traces anew what it compiled outside, and the other way round: neither program runs in
    the place of the other. What is already a program stays as it was made: the functions that
    `jax.vjp` and `jax.linearize` return, `.lower()`, `.compile()`, `jax.export`.

    Args:
        forward_mode: of all the layers, as in `jax_bn.linen.BatchNorm`. Where `jax.jvp` has to pass
            through the model in training, as it does through Flax's layers, True lets it.

    Yields:
        The paths of the layers that ran so, `Module.path`, in the order of their first calls; `()`
        for a model that is the layer itself. The list fills while models are traced: a program that
        jit has kept from an earlier such context runs as it should and adds nothing.

    Raises:
        TypeError: from the model's call, for a subclass of `flax.linen.BatchNorm` with a `__call__`
            of its own, which ours cannot stand for. Subclasses that set fields alone and the
            classes that `nn.remat` and its like make are replaced as any other.
        RuntimeError: within another such context.

    Precision, differentiability, sharding: those of `jax_bn.batch_norm`.

    It holds in the thread that enters it. Other interceptors see the calls of these layers if they
    were entered before it, not if within. A class that is no subclass of Flax's, but a copy of it,
    is left alone: look for its path in what is yielded.

    Source: `flax.linen.intercept_methods`, of which it is made.

    Example:
        >>> from flax import linen as nn
        >>> import jax, jax.numpy as jnp
        >>> from jax_bn.linen import replace_batch_norm
        >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> variables = model.init(jax.random.key(0), x)
        >>> with replace_batch_norm() as replaced:
        ...     y, updated = model.apply(variables, x, mutable="batch_stats")
        >>> replaced
        [('layers_1',)]
    """
    if within.value is not None:
        raise RuntimeError(
            "replace_batch_norm is entered within another replace_batch_norm, with "
            f"forward_mode={within.value}; expected one at a time: leave that one first"
        )
    own = BatchNorm(forward_mode=_arguments.flag("forward_mode", forward_mode), parent=None)
    replaced: list[tuple[str, ...]] = []

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if _function(type(layer)) is not _function(nn.BatchNorm):
            raise TypeError(
                f"the layer at {layer.path} is of class {type(layer).__qualname__}, a subclass of "
                "flax.linen.BatchNorm with a __call__ of its own; expected Flax's __call__: derive "
                "the class from jax_bn.linen.BatchNorm, or run the model outside of "
                "replace_batch_norm"
            )
        if layer.path not in replaced:
            replaced.append(layer.path)
        return batch_normalized(layer, own, *args, **kwargs)

    with within(own.forward_mode), nn.intercept_methods(interceptor):
        yield replaced


def _function(cls: type[nn.Module]) -> Any:
    """What the class calls, without the wrappers of Flax and of its transforms."""
    return inspect.unwrap(cls.__call__)
