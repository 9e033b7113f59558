"""Batch normalization in evaluation, folded into the layer before it. Needs the extra `flax`.

With running statistics it is affine in each feature, and so is the layer before it::

    gain = scale/sqrt(var + epsilon)
    bn(w x + b) = (w*gain) x + (b - mean)*gain + bias

Which layer stands before which is read from a trace of the model and not from names: `_adjacent`.
"""

from jax_bn import _needs_flax as _needs_flax  # isort: split

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn, nnx, traverse_util
from flax.core import FrozenDict, freeze, meta
import jax
import jax.numpy as jnp

from jax_bn import _arguments, _intercept
from jax_bn._adjacent import STATS, Trace
from jax_bn.linen import BatchNorm as LinenBatchNorm
from jax_bn.nnx import BatchNorm as NNXBatchNorm

LINEN, NNX = (LinenBatchNorm, nn.BatchNorm), (NNXBatchNorm, nnx.BatchNorm)
LINEN_AFFINE = nn.Dense, nn.Conv, nn.ConvTranspose
NNX_AFFINE = nnx.Linear, nnx.Conv, nnx.ConvTranspose
FOLDED = (
    "jax_bn_folded"  # attribute of an NNX layer to be replaced: its path and the dtype of its y
)


def fold_linen(
    module: nn.Module,
    variables: dict[str, Any] | FrozenDict[str, Any],
    *args: Any,
    call: Callable[..., Any] = lambda model, *args: model(*args),
    pairs: Mapping[str, str] | None = None,
) -> tuple[Callable[..., Any], dict[str, Any] | FrozenDict[str, Any]]:
    """The model in evaluation without the batch normalizations that follow an affine layer.

    With gain = scale/sqrt(var + epsilon) the affine layer gets::

        kernel' = kernel*gain       bias' = (bias - mean)*gain + bn_bias

    and the normalization does no more than add its `residual` and apply its `activation`, if it is
    `jax_bn.linen.BatchNorm` and has them.

    Args:
        module: with `flax.linen` layers Dense, Conv (any rank, groups, dilation, masks) or
            ConvTranspose, each followed by `jax_bn.linen.BatchNorm` or `flax.linen.BatchNorm`.
        variables: of the module. They stay as they are.
        args: what the model is called with: arrays, or `jax.ShapeDtypeStruct` for them, since the
            model is traced and not run.
        call: `call(model, *args)`, which runs the bound module in evaluation:
            `lambda model, x: model(x, train=False)`.
        pairs: paths, as in `{"block1/conv1": "block1/bn1"}`: fold these, and nothing else. None:
            fold every pair of which the trace proves that it may be folded.

    Returns:
        `(apply, variables)`, with `apply(variables, *args)` in the place of `call`. The variables
        are those of a model that has no folded normalizations and whose affine layers before them
        have a bias. Both are for evaluation.

    Raises:
        ValueError: nothing to fold, or one of `pairs` that cannot be (see below), with the reason;
            a normalization that runs in training.

    A pair can be folded if each of the two is called once; the normalization gets the result of the
    affine layer, and nothing else does; nothing but that layer reads its kernel and bias; neither
    is within a transform (`nn.scan`, `nn.vmap`, `nn.remat`, `nn.jit`, `nn.map_variables`); the
    features are on the last axis; and the layer multiplies by no function of the user's own
    (`dot_general`, `conv_general_dilated`).

    Precision: gain, kernel' and bias' are computed in float32 at least and then rounded to the
    dtypes of the kernel and the bias (a new bias has the kernel's): results are the same to the
    rounding of these and of the layer's own dtype. A kernel in bfloat16 is rounded again.

    Differentiable and shardable as the model is; kernel' and bias' are computed outside of jit.

    Source: Jacob et al. 2018, section 3.2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jax_bn.fold import fold_linen
        >>> from jax_bn.linen import BatchNorm
        >>> model = nn.Sequential([nn.Dense(2), BatchNorm(use_running_average=True), nn.relu])
        >>> x = jnp.ones((1, 3))
        >>> variables = model.init(jax.random.key(0), x)
        >>> apply, folded = fold_linen(model, variables, x)
        >>> bool(jnp.allclose(apply(folded, x), model.apply(variables, x)))
        True
        >>> jax.tree.map(jnp.shape, folded)
        {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}
    """

    _intercept.model_of(nn.Module, "module", module)
    _arguments.mapping("variables", variables, "those of the module, by collection")
    _arguments.function("call", call)

    def arrays(layer, names):
        found = {n: layer.get_variable("batch_stats" if n in STATS else "params", n) for n in names}
        return {name: meta.unbox(v) for name, v in found.items() if v is not None}

    trace = Trace(arrays)

    def traced(variables, *args):
        with _intercept.in_linen(trace.watchers(LINEN_AFFINE, LINEN)):
            return nn.apply(call, module)(variables, *args)

    folds = trace.folds(traced, variables, args, pairs)
    norms = {fold.norm: fold.dtype for fold in folds.values()}
    no_bias = {path for path, fold in folds.items() if not fold.has_bias}

    def norm(layer, path, run, x, use_running_average=None, *, mask=None, residual=None):
        if path not in norms:
            rest = {} if residual is None else {"residual": residual}
            return run(x, use_running_average, mask=mask, **rest)
        given = nn.merge_param("_", layer.use_running_average, use_running_average)
        activation = getattr(layer, "activation", None)
        return _rest(path, x, _intercept.trains(layer, given), residual, activation, norms[path])

    def affine(layer, path, run, *args, **kwargs):
        y = run(*args, **kwargs)
        if path not in no_bias:
            return y
        bias = meta.unbox(layer.get_variable("params", "bias")).astype(y.dtype)
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))

    def apply(variables, *args):
        with _intercept.in_linen(dict.fromkeys(LINEN, norm) | dict.fromkeys(LINEN_AFFINE, affine)):
            return nn.apply(call, module)(variables, *args)

    new = traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)
    for path, fold in folds.items():
        at = ("params", *path.split("/"))
        for name, array in (("kernel", fold.kernel), ("bias", fold.bias)):
            boxed = new.get((*at, name), array)
            new[*at, name] = meta.replace_boxed(boxed, array)
        dropped = tuple(fold.norm.split("/"))
        new = {k: v for k, v in new.items() if k[1:-1] != dropped}
    nested = traverse_util.unflatten_dict(new)
    return apply, freeze(nested) if isinstance(variables, FrozenDict) else nested


def fold_nnx(
    model: nnx.Module,
    *args: Any,
    call: Callable[..., Any] = lambda model, *args: model(*args),
    pairs: Mapping[str, str] | None = None,
) -> nnx.Module:
    """A copy of the model, in evaluation, without the normalizations that follow an affine layer.

    The formulas, the precision, and when a pair can be folded, are in `fold_linen`.

    Args:
        model: with `flax.nnx` layers Linear, Conv or ConvTranspose, each followed by
            `jax_bn.nnx.BatchNorm` or `flax.nnx.BatchNorm`. It stays as it is.
        args: what it is called with: arrays, or `jax.ShapeDtypeStruct` for them.
        call: `call(copy, *args)`, which runs a copy of the model, after `copy.eval()`.
        pairs: paths, as in `{"block1/conv1": "block1/bn1"}` or `{"layers/0": "layers/1"}`: fold
            these, and nothing else. None: every pair of which the trace proves that it may be.

    Returns:
        The copy. Each folded normalization is a `Folded`, and the layer before it has a bias.

    Raises:
        ValueError: nothing to fold, or one of `pairs` that cannot be, with the reason; a
            normalization that runs in training.

    Differentiable and shardable as the model is.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_bn.fold import fold_nnx
        >>> from jax_bn.nnx import BatchNorm
        >>> rngs, x = nnx.Rngs(0), jnp.ones((1, 3))
        >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), BatchNorm(2, rngs=rngs), nnx.relu)
        >>> folded = fold_nnx(model, x)
        >>> model.eval()
        >>> bool(jnp.allclose(folded(x), model(x)))
        True
    """
    _intercept.model_of(nnx.Module, "model", model)
    _arguments.function("call", call)
    graphdef, state = nnx.split(model, graph=True)

    def arrays(layer, names):
        found = {name: getattr(layer, name) for name in names}
        return {k: v.get_value() for k, v in found.items() if v is not None}

    calls = {cls.__call__ for cls in NNX}
    norms = {p: m for p, m in nnx.iter_modules(model, graph=True) if isinstance(m, NNX)}
    own_code = [_path(p) for p, m in norms.items() if type(m).__call__ not in calls]
    trace = Trace(arrays, own_code)

    def traced(state, *args):
        copy = nnx.merge(graphdef, state)
        copy.eval()
        _intercept.in_nnx(copy, trace.watchers(NNX_AFFINE, NNX))
        return call(copy, *args)

    folds = trace.folds(traced, state, args, pairs)
    folded = nnx.clone(model)
    folded.eval()
    layers: dict[str, Any] = {_path(p): m for p, m in nnx.iter_modules(folded, graph=True)}
    for path, fold in folds.items():
        layer = layers[path]
        layer.kernel.set_value(fold.kernel)
        if fold.has_bias:
            layer.bias.set_value(fold.bias)
        else:
            layer.bias, layer.use_bias = nnx.Param(fold.bias), True
        setattr(layers[fold.norm], FOLDED, (fold.norm, fold.dtype))

    def replaced(path, node):
        if not hasattr(node, FOLDED):
            return node
        return Folded(*getattr(node, FOLDED), activation=getattr(node, "activation", None))

    return nnx.recursive_map(replaced, folded, graph=True)


def _path(keys) -> str:
    return "/".join(map(str, keys))


class Folded(nnx.Module):
    """What `fold_nnx` leaves of a batch normalization: y = activation(x + residual).

    Args:
        path: where the layer was, for errors.
        dtype: of y, which the layer had.
        activation: that of the layer, or None.
    """

    def __init__(self, path: str, dtype: Any, activation: Callable[[jax.Array], jax.Array] | None):
        self.path, self.dtype, self.activation = path, dtype, activation
        self.use_running_average = True

    def __call__(self, x, use_running_average=None, *, mask=None, residual=None):
        """As the layer that was folded, in evaluation."""
        x = _arguments.array("x", x)
        training = _intercept.trains(self, use_running_average)
        return _rest(self.path, x, training, residual, self.activation, self.dtype)

    def set_view(self, use_running_average: bool | None = None):
        """Called by `nnx.view`.

        Args:
          use_running_average: training, if False, is an error of the next call.
        """  # indented as `nnx.view_info` reads it
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _rest(path, x, training, residual, activation, dtype) -> jax.Array:
    """What is left to do of a folded normalization, computed as `jax_bn.normalize` does."""
    if training:
        raise ValueError(
            f"the batch normalization {path!r} is folded into the layer before it, and was called "
            "in training, use_running_average=False; expected evaluation: train the model that was "
            "folded"
        )
    if residual is not None:
        residual = _arguments.residual(residual, x)
    if residual is not None or activation is not None:
        wide = _arguments.arithmetic_dtype(jnp.dtype(dtype), x, residual)
        x = x.astype(wide) if residual is None else x.astype(wide) + residual.astype(wide)
    return (x if activation is None else activation(x)).astype(dtype)
