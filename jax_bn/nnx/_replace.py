"""NNX models as they are, with our layer in the place of Flax's."""

import inspect
from typing import Any, TypeVar

from flax import nnx

from jax_bn import _arguments
from jax_bn.nnx._batch_norm import BatchNorm

Layer = TypeVar("Layer", bound=nnx.Module)
Path = tuple[str | int, ...]

# Our layer has the attributes of Flax's, with the same meaning, and these: name and default.
OWN = {
    name: parameter.default
    for name, parameter in inspect.signature(BatchNorm.__init__).parameters.items()
    if name not in inspect.signature(nnx.BatchNorm.__init__).parameters
}


def replace_batch_norm(model: nnx.Pytree, *, forward_mode: bool = False) -> dict[Path, BatchNorm]:
    """Makes every `flax.nnx.BatchNorm` of a model a `jax_bn.nnx.BatchNorm`, in place.

    y and the running averages are then those of `jax_bn.nnx.BatchNorm`. The layers stay the objects
    that they are and change their class, for the two classes have the same attributes. So whatever
    holds a layer has it replaced: modules, containers, several places at once, functions that close
    over it. The variables are the same objects too, stacked by `nnx.vmap` or not, with their
    metadata, shardings and paths: optimizers, states and checkpoints go on to fit. Training or
    evaluation stays as it is set. To keep the model as it was, pass `nnx.clone(model)`.

    Args:
        model: a module, which may be the layer itself, or another `nnx.Pytree` of modules.
        forward_mode: of all the layers, as in `jax_bn.nnx.BatchNorm`. Where `jax.jvp` has to pass
            through the model in training, as it does through Flax's layers, True lets it.

    Returns:
        The replaced layers by path, as in `nnx.iter_modules`; `()` for the model itself. One that
        is used in several places has the first of its paths. Empty if all are ours already.

    Raises:
        TypeError: `model` is something else, or holds a layer of a subclass of
            `flax.nnx.BatchNorm`, whose own code would be lost. No layer is changed then.
        ValueError: the model has no batch normalization, ours or Flax's.

    A layer that NNX does not take for a part of the model, because nothing but a function or a
    `functools.partial` holds it, is not found: make it an attribute. A model that is passed into
    `nnx.jit` or another transform of NNX has to be replaced outside of it: NNX refuses the change
    of class when the transform returns, and leaves the model without its attributes. `nnx.jit`
    traces the replaced model anew; `nnx.cached_partial` holds a copy of what it was given before.

    Precision, differentiability, sharding: those of `jax_bn.batch_norm`.

    Example:
        >>> from flax import nnx
        >>> from jax_bn.nnx import replace_batch_norm, restore_batch_norm
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        >>> list(replace_batch_norm(model)), type(model.layers[1]).__module__
        ([('layers', 1)], 'jax_bn.nnx._batch_norm')
        >>> list(restore_batch_norm(model)), type(model.layers[1]).__module__
        ([('layers', 1)], 'flax.nnx.nn.normalization')
    """
    forward_mode = _arguments.flag("forward_mode", forward_mode)
    layers = _layers(model, nnx.BatchNorm, target=BatchNorm)
    for layer in layers.values():
        for name, default in OWN.items():
            setattr(layer, name, forward_mode if name == "forward_mode" else default)
        _set_class(layer, BatchNorm)
    return layers  # pyright: ignore[reportReturnType]  # of that class now


def restore_batch_norm(model: nnx.Pytree) -> dict[Path, nnx.BatchNorm]:
    """Makes every `jax_bn.nnx.BatchNorm` of a model a `flax.nnx.BatchNorm`, in place.

    Undoes `replace_batch_norm`, of the whole model or of one of the layers that it returned. It
    also takes a model that was built with our layer to code that knows Flax's alone.

    Args:
        model: as in `replace_batch_norm`.

    Returns:
        The restored layers by path; empty if all are Flax's already.

    Raises:
        TypeError, ValueError: as `replace_batch_norm`, with the classes exchanged.
        ValueError: a layer has momentum=None, or an attribute that Flax's has not, such as
            `activation`, set to something that it would compute otherwise without. No layer is
            changed then. `forward_mode` and `implementation`, which change no number, are dropped.

    Precision, differentiability, sharding: from here on those of Flax.

    Example: see `replace_batch_norm`.
    """
    layers = _layers(model, BatchNorm, target=nnx.BatchNorm)
    for path, layer in layers.items():
        if layer.momentum is None:
            raise ValueError(f"the layer at {path} has momentum=None; expected a number for Flax's")
        for name, default in OWN.items():
            if name not in ("forward_mode", "implementation") and getattr(layer, name) != default:
                raise ValueError(
                    f"the layer at {path} has {name}={getattr(layer, name)}, which "
                    f"flax.nnx.BatchNorm has not; expected {default}: set it so, and let the model "
                    "do without or do it elsewhere"
                )
    for layer in layers.values():
        for name in OWN:
            delattr(layer, name)
        _set_class(layer, nnx.BatchNorm)
    return layers  # pyright: ignore[reportReturnType]  # of that class now


def _layers(model: Any, source: type[Layer], target: type[nnx.Module]) -> dict[Path, Layer]:
    """The layers of class `source` by path; refuses its subclasses, and a model with no layer."""
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            f"model is of class {type(model).__qualname__}; expected an nnx.Module or another "
            "nnx.Pytree (Linen models run in the context jax_bn.linen.replace_batch_norm)"
        )
    # With graph=True, each object once, however often it is used.
    nodes: dict[Any, Any] = dict(nnx.iter_graph(model, graph=True))
    for path, node in nodes.items():
        if isinstance(node, source) and type(node) is not source:
            raise TypeError(
                f"model: the layer at {path} is of class {type(node).__qualname__}, a subclass of "
                f"{_name(source)} whose own code would be lost; expected {_name(source)} itself: "
                f"put a layer of {_name(target)} or of a class derived from it in its place"
            )
    if not any(isinstance(node, (source, target)) for node in nodes.values()):
        raise ValueError(
            f"model is of class {type(model).__qualname__} and has no batch normalization that NNX "
            f"finds; expected a {_name(source)} among nnx.iter_modules(model): a layer that only a "
            "function or a functools.partial holds has to become an attribute of a module"
        )
    return {path: node for path, node in nodes.items() if type(node) is source}


def _name(cls: type) -> str:
    """Where users import the class from."""
    return "flax.nnx.BatchNorm" if cls is nnx.BatchNorm else "jax_bn.nnx.BatchNorm"


def _set_class(layer: nnx.Module, cls: type[nnx.Module]) -> None:
    # As Python does it: NNX would make `__class__` one of the attributes that it traces.
    object.__setattr__(layer, "__class__", cls)
