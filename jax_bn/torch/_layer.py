"""One layer: its entries in a `state_dict`, checked, by our names and by PyTorch's."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}
_COUNTER = "num_batches_tracked"


def fields_from_torch(module: Any) -> dict[str, Any]:
    """The fields of our layer that make it compute and average as a PyTorch layer does.

    Args:
        module: a `torch.nn.BatchNorm1d`, `2d` or `3d`, or a `SyncBatchNorm`.

    Returns:
        `momentum` (1 - PyTorch's, or None for plain means), `epsilon`, `use_scale`, `use_bias`,
        `unbiased=True`; with `track_running_stats=False` also `use_running_average=False`, for such
        a layer normalizes with the batch in evaluation too: leave it out of the call, and out of
        `.eval()`. PyTorch's feature axis is 1 (add `axis=1`); JAX's convolutions have it last.

    Raises:
        TypeError: something else; `InstanceNorm`, which has the same attributes, is refused too.

    Example:
        >>> from jax_bn.linen import BatchNorm
        >>> from jax_bn.torch import fields_from_torch
        >>> def converted(module):  # of a torch.nn.BatchNorm2d
        ...     return BatchNorm(**fields_from_torch(module))
    """
    if not any(base.__name__ == "_BatchNorm" for base in type(module).__mro__):
        raise TypeError(
            f"module is a {type(module).__name__}; expected a torch.nn.BatchNorm1d, 2d or 3d, or a "
            "SyncBatchNorm: convert the submodules one by one"
        )
    return dict(
        momentum=None if module.momentum is None else 1 - module.momentum,
        epsilon=module.eps,
        use_scale=module.weight is not None,
        use_bias=module.bias is not None,
        unbiased=True,
    ) | ({} if module.track_running_stats else {"use_running_average": False})


def from_torch(
    state_dict: Mapping[str, Any],
    prefix: str,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    track_running_stats: bool = True,
) -> dict[str, jax.Array]:
    """The arrays of one layer of a PyTorch `state_dict`, by our names.

    Args:
        state_dict: of a model; its values are tensors or arrays.
        prefix: the layer's name there, such as `"layer1.0.bn1"`; `""` for its own `state_dict`.
        use_scale, use_bias: whether it has a weight, a bias; both False for `affine=False`.
        track_running_stats: as in PyTorch; False for a layer without running averages.

    Returns:
        Those of `scale`, `bias`, `mean`, `var` and `num_batches_tracked` (int32; old checkpoints
        have none) that the layer has, in their own dtype.

    Raises:
        ValueError: entries that are missing, or there against an argument; shapes that differ or
            are not of rank 1; float64 where JAX has none; a layer that is no batch norm.
        TypeError: entries that are not of floats, a `state_dict` that is no mapping.

    Example:
        >>> import numpy as np
        >>> from jax_bn.torch import from_torch
        >>> entries = {"bn.weight": np.ones(2, np.float32), "bn.bias": np.zeros(2, np.float32)}
        >>> sorted(from_torch(entries, "bn", track_running_stats=False))
        ['bias', 'scale']
    """
    used = {"scale": use_scale, "bias": use_bias}
    used |= {name: track_running_stats for name in ("mean", "var")}
    expected = {name for name, is_used in used.items() if is_used}
    found = read_layer(state_dict, prefix, expected, track_running_stats)
    return {
        name: exactly(key_of(prefix, name), v, jax.dtypes.canonicalize_dtype(v.dtype))
        for name, v in found.items()
    }


def to_torch(arrays: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: the entries of one layer for a PyTorch `state_dict`.

    Args:
        arrays: those of `scale`, `bias`, `mean`, `var` and `num_batches_tracked` that there are.
        prefix: the layer's name in PyTorch, or `""`.

    Returns:
        NumPy arrays by PyTorch's names; `num_batches_tracked` as int64, bfloat16 as float32, which
        holds it exactly: NumPy has no bfloat16 that PyTorch reads. For PyTorch:
        `model.load_state_dict({k: torch.from_numpy(v) for k, v in entries.items()}, strict=False)`.

    Raises:
        ValueError: another name, shapes that differ or are not of rank 1, none at all.
        TypeError: arrays that are not of floats; PyTorch's layer knows no complex ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_bn.torch import to_torch
        >>> to_torch({"scale": jnp.ones(2)}, "layer1.bn")
        {'layer1.bn.weight': array([1., 1.], dtype=float32)}
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays is a {type(arrays).__name__}; expected a mapping of our names to arrays"
        )
    if not arrays or (arrays.keys() - NAMES.keys()):
        raise ValueError(
            f"arrays has {listed(arrays)}; expected some of {listed(NAMES)}, those of one layer"
        )
    named = {ours: np.array(v) for ours, v in arrays.items()}
    _check(named)

    def readable(v: np.ndarray) -> np.ndarray:
        if v.ndim == 0:
            return v.astype(np.int64)
        return v.astype(np.float32) if v.dtype == jnp.bfloat16 else v

    return {key_of(prefix, ours): readable(v) for ours, v in named.items()}


def read_layer(state_dict, prefix: str, expected: set[str], tracked: bool) -> dict[str, np.ndarray]:
    """The arrays of one layer by our names: those expected, and the counter where it may be."""
    start = f"{prefix}." if prefix else ""
    known = layers(state_dict)  # checks the type too
    entries = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
    if not entries or (entries.keys() - set(NAMES.values())):
        raise ValueError(
            f"prefix {prefix!r} is no batch-norm layer of state_dict, which holds there "
            f"{listed(entries)}; the layers with running averages are {listed(known)}"
        )
    found = {ours: _numpy(entries[n]) for ours, n in NAMES.items() if n in entries}
    if missing := expected - found.keys():
        raise ValueError(
            f"state_dict lacks {listed(key_of(prefix, n) for n in missing)}. If the layer has "
            "affine=False or bias=False, ours has use_scale=False or use_bias=False; if it has "
            "track_running_stats=False, pass that; old checkpoints do not count batches: add 0"
        )
    if extra := found.keys() - expected - ({_COUNTER} if tracked else set()):
        raise ValueError(
            f"state_dict holds {listed(key_of(prefix, n) for n in extra)}, which use_scale, "
            "use_bias or track_running_stats exclude; expected them to be as in PyTorch's layer"
        )
    _check({key_of(prefix, n): v for n, v in found.items()})
    return found


def layers(state_dict) -> list[str]:
    """The names of all layers with running averages."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}; expected a mapping of names to tensors "
            "or arrays: model.state_dict()"
        )
    ends = f".{NAMES['mean']}"
    return [f".{k}".removesuffix(ends)[1:] for k in state_dict if f".{k}".endswith(ends)]


def _numpy(v) -> np.ndarray:
    """A copy of a tensor or an array: PyTorch goes on writing into its own."""
    if hasattr(v, "detach"):
        v = v.detach().cpu()
        if str(v.dtype) == "torch.bfloat16":  # which NumPy lacks, and float32 holds exactly
            return v.float().numpy().astype(jnp.bfloat16)
        v = v.numpy()
    return np.array(v)


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses what cannot be the arrays of one layer; by PyTorch's names or by ours."""
    lengths = {}
    for name, v in arrays.items():
        if name.endswith(_COUNTER):
            if v.shape != () or not (np.issubdtype(v.dtype, np.integer) and 0 <= v < 2**31):
                raise ValueError(
                    f"{name} is {v!r}; expected one whole number, at least 0 and below 2**31"
                )
        elif not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {v.dtype}; expected a real float dtype")
        elif v.ndim != 1:
            raise ValueError(
                f"{name} has shape {v.shape}; expected one axis: PyTorch's layer has one axis of "
                "features"
            )
        else:
            lengths[name] = len(v)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lengths are {lengths}; expected the same for all arrays of one layer")


def exactly(key: str, v: np.ndarray, dtype) -> jax.Array:
    """`v` in a dtype that holds all values of its own."""
    if key.endswith(_COUNTER):
        return jnp.asarray(v.astype(np.int32))  # below 2**31, see `_check`
    if not np.can_cast(v.dtype, dtype):
        raise ValueError(
            f"{key} has dtype {v.dtype}, which {dtype} would round; expected a dtype that it holds "
            "exactly: convert one of the two models, or enable x64 in JAX for float64"
        )
    return jnp.asarray(v, dtype)


def key_of(prefix: str, name: str) -> str:
    """PyTorch's key of the array that we call `name`."""
    return f"{prefix}.{NAMES[name]}" if prefix else NAMES[name]


def listed(names: Iterable[Any]) -> str:
    """Names, for an error."""
    return ", ".join(sorted(map(repr, names))) or "nothing"
