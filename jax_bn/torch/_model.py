"""All layers of a model: where they are in its variables, and their exchange."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jax_bn.torch._layer import NAMES, exactly, key_of, layers, listed, read_layer, to_torch

_EXPECTED = (
    "expected nested dicts of arrays: flax.nnx.to_pure_dict(state), or "
    "flax.linen.meta.unbox(variables)"
)


def model_from_torch(
    variables: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    names: Mapping[str, str | None],
    *,
    track_running_stats: bool = True,
) -> dict[str, Any]:
    """The variables of a model with all its batch-norm layers taken from a PyTorch `state_dict`.

    Args:
        variables: of the new model, as a template too: nested dicts with `"batch_stats"` (and
            `"params"`) at the top, as Linen has them, or an NNX model's
            `nnx.to_pure_dict(nnx.state(model))`; leaves may be `jax.ShapeDtypeStruct`.
        state_dict: of the PyTorch model.
        names: the path of each layer in `variables` by its name in PyTorch, such as
            `{"layer1.0.bn1": "ResNetBlock_0/BatchNorm_0"}`; None leaves a layer out. Every layer
            of `state_dict` that has running averages must be there.
        track_running_stats: False if the PyTorch layers have no running averages: then those of
            `variables` stay, and only evaluation with the batch (`use_running_average=False`) is
            PyTorch's.

    Returns:
        A copy of `variables`: in the layers named, the values of `state_dict` in the dtypes of
        `variables`; all else as it was. `num_batches_tracked` is taken where the layer counts
        (`momentum=None`), and means nothing elsewhere. For NNX, `nnx.update(model, result)`.

    Raises:
        ValueError: as `from_torch`; layers not in `names`, two with one path, a path that leads to
            no batch-norm layer, a scale or bias on one side only, shapes that differ, values that
            the dtype cannot hold exactly.
        TypeError: `variables` that is no nested dict, `names` that is no mapping of strings.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from jax_bn.torch import model_from_torch
        >>> variables = {"batch_stats": {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}}
        >>> state_dict = {"bn.running_mean": np.full(1, 2.0, np.float32),
        ...               "bn.running_var": np.full(1, 3.0, np.float32)}
        >>> model_from_torch(variables, state_dict, {"bn": "norm"})["batch_stats"]["norm"]["var"]
        Array([3.], dtype=float32)
    """
    paths = _paths(names)
    if unnamed := set(layers(state_dict)) - names.keys():
        raise ValueError(
            f"names lacks the layers {listed(unnamed)} of state_dict; expected the path of each "
            "in variables, or None to leave one out"
        )
    result = variables
    for prefix, path in paths:
        nodes = _nodes(variables, path)
        target = {name: leaf for node in nodes.values() for name, leaf in node.items()}
        expected = {n for n in target if track_running_stats or n in ("scale", "bias")}
        found = read_layer(state_dict, prefix, expected, track_running_stats)
        for keys, node in nodes.items():
            new = {n: _fitted(key_of(prefix, n), found[n], node[n]) for n in node if n in expected}
            result = _replaced(result, keys, new)
    return dict(result)


def model_to_torch(
    variables: Mapping[str, Any], names: Mapping[str, str | None]
) -> dict[str, np.ndarray]:
    """The inverse of `model_from_torch`: the entries of all batch-norm layers for PyTorch.

    Args:
        variables, names: as in `model_from_torch`.

    Returns:
        As `to_torch`, for all layers. Where ours do not count batches, there is no
        `num_batches_tracked`: `load_state_dict` then leaves PyTorch's as it is.

    Raises:
        ValueError, TypeError: as `model_from_torch` and `to_torch`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_bn.torch import model_to_torch
        >>> variables = {"batch_stats": {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}}
        >>> sorted(model_to_torch(variables, {"bn": "norm"}))
        ['bn.running_mean', 'bn.running_var']
    """
    result = {}
    for prefix, path in _paths(names):
        arrays = {}
        for node in _nodes(variables, path).values():
            arrays |= node
        result |= to_torch(arrays, prefix)
    return result


def _fitted(key: str, v: np.ndarray, leaf) -> jax.Array:
    """`v` in place of `leaf`."""
    if v.shape != leaf.shape:
        raise ValueError(f"{key} has shape {v.shape}; expected {leaf.shape}, that of variables")
    return exactly(key, v, leaf.dtype)


def _paths(names) -> Iterable[tuple[str, str]]:
    """`names` without what is left out."""
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names is a {type(names).__name__}; expected a mapping of layers in PyTorch to paths "
            "in variables"
        )
    paths = {prefix: path for prefix, path in names.items() if path is not None}
    if not all(isinstance(path, str) for path in paths.values()):
        raise TypeError(f"names has the paths {list(paths.values())}; expected strings, 'a/b'")
    if twice := {path for path in paths.values() if list(paths.values()).count(path) > 1}:
        raise ValueError(
            f"names leads to {listed(twice)} more than once; expected one layer each: map all but "
            "one name of a shared module to None"
        )
    return paths.items()


def _nodes(variables, path: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The dicts that hold the arrays of the layer at `path`, by their keys: two in Linen, or one.

    Keys are compared as strings: the items of an `nnx.List` have integers.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables is a {type(variables).__name__}; {_EXPECTED}")
    parts = path.split("/") if path else []
    nodes = {}
    for root in [["params"], ["batch_stats"]] if "batch_stats" in variables else [[]]:
        keys, node = (), variables
        for part in root + parts:
            same = [k for k in node if str(k) == part] if isinstance(node, Mapping) else []
            if not same:
                break
            keys, node = (*keys, same[0]), node[same[0]]
        if len(keys) == len(root + parts) and isinstance(node, Mapping):
            nodes[keys] = {k: v for k, v in node.items() if k != "steps"}  # those of `BatchRenorm`
    found = {n: v for node in nodes.values() for n, v in node.items()}
    if not {"mean", "var"} <= found.keys() <= set(NAMES):
        raise ValueError(
            f"path {path!r} of names is no batch-norm layer of variables, which hold there "
            f"{listed(found)}; expected 'mean' and 'var', and scale and bias if it has them"
        )
    for name, leaf in found.items():
        if not isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} at path {path!r} is a {type(leaf).__name__}; {_EXPECTED}")
    return nodes


def _replaced(tree, keys: tuple[Any, ...], new: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested dicts with `new` in the one at `keys`."""
    if not keys:
        return {**tree, **new}
    first, *rest = keys
    return {**tree, first: _replaced(tree[first], tuple(rest), new)}
