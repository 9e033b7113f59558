"""Running statistics taken anew: those of a data set, exactly. Needs the extra `flax`.

For weights whose running statistics do not belong to them: averaged ones (SWA, EMA), quantized or
pruned ones, or a model that meets other data.

Each batch gives one `BatchStats` a layer, and they are merged by count. What is seen where, in
Linen and in NNX, is in `_intercept`.
"""

from jax_bn import _needs_flax as _needs_flax  # isort: split

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
import operator
from typing import Any

from flax import linen as nn, nnx, traverse_util
from flax.core import DenyList, FrozenDict, copy
import jax
import jax.numpy as jnp
import numpy as np

from jax_bn import _arguments, _intercept
from jax_bn._batch_norm import batch_norm
from jax_bn._shapes import flax_mask
from jax_bn._statistics import BatchStats, merge_stats
from jax_bn.linen import BatchNorm as LinenBatchNorm, BatchRenorm as LinenBatchRenorm
from jax_bn.nnx import BatchNorm as NNXBatchNorm, BatchRenorm as NNXBatchRenorm

# The variable in which a layer gathers statistics. It stands beside the running ones and is of
# their kind, so what Flax's transforms do with those (scan, vmap, remat) they do with it.
POPULATION = "jax_bn_population"
# Of a `BatchRenorm`: still in its warm-up, it does not lead to the averages that are replaced.
BEFORE_ALL = np.int32(-(2**31))
LINEN, NNX = (LinenBatchNorm, nn.BatchNorm), (NNXBatchNorm, nnx.BatchNorm)


def recalibrate_linen(
    module: nn.Module,
    variables: dict[str, Any] | FrozenDict[str, Any],
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    rngs: Mapping[str, jax.Array] | None = None,
    num_batches: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> dict[str, Any] | FrozenDict[str, Any]:
    """Variables whose running statistics are those of all batches taken as one.

    For each layer, with the statistics of its input in batch i::

        count = sum count_i             mean = sum count_i*mean_i / count
        var = sum count_i*(var_i + |mean_i - mean|^2) / count

    The model runs as in training: every layer normalizes with the statistics of the batch, so what
    a layer further on sees depends on how the data is cut into batches, as it did in training. For
    what a layer sees, mean and var are exact. PyTorch's `update_bn` runs the model in the same way,
    but averages the batches' variances, n/(n-1) times the biased ones, each batch counting alike:
    without the |mean_i - mean|^2, and with a short last batch weighing as much as any other.

    Args:
        module: with layers `jax_bn.linen.BatchNorm` or `flax.linen.BatchNorm`, or subclasses.
        variables: of the module. They stay as they are.
        batches: an iterable of pytrees of arrays, consumed once. The last one may be shorter (each
            shape is compiled once), any may be sharded over devices.
        call: `call(model, batch)`, which runs the bound module in training, with whatever flags and
            masks it takes: `lambda model, batch: model(batch["image"], train=True)`. Masks count as
            in the layer. Traced; the result is ignored.
        rngs: keys by name, as `module.apply` takes them; each batch gets its own, made from them.
        num_batches: how many batches to take; None for all.
        progress: wraps `batches`, for a bar: `tqdm.tqdm`, `functools.partial(tqdm.tqdm, total=9)`.

    Returns:
        `variables` with new `mean` and `var` in `batch_stats`, in the dtypes they had (a complex
        mean makes the running one complex). A layer that `call` runs in evaluation or not at all,
        and a feature that masks hide wholly, keep theirs. Calls of one layer count together. All
        other variables are as given: every batch starts from these.

    Raises:
        ValueError: no batches, or fewer than `num_batches`; no layer that runs in training; a layer
            without running statistics in `variables`.
        TypeError: `batches` that are one array or one dict; a `num_batches` that is no integer.

    Precision: that of `jax_bn.batch_norm`, in float32 at least; batches are merged in pairs, pairs
    of pairs and so on, so the rounding grows with the logarithm of their number.

    Not differentiable: a loop in Python. Under the transforms of Linen (`nn.scan`, `nn.vmap`,
    `nn.remat`, `nn.jit`) a layer gathers as it keeps its running statistics.

    Sharding: under plain `jit`, with the statistics of whole batches. A layer with an `axis_name`
    needs that axis to be there, so here the module is made without; its variables are the same.

    Source: Chan, Golub and LeVeque 1983 for the merge; Izmailov et al. 2018 for averaged weights.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_bn.linen import BatchNorm
        >>> from jax_bn.recalibrate import recalibrate_linen
        >>> layer = BatchNorm(use_running_average=False)
        >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]
        >>> variables = layer.init(jax.random.key(0), batches[0])
        >>> new = recalibrate_linen(layer, variables, batches)["batch_stats"]
        >>> new["mean"].item(), new["var"].item()
        (3.0, 3.5)
    """
    _intercept.model_of(nn.Module, "module", module)
    _arguments.mapping("variables", variables, "those of the module, by collection")
    _arguments.function("call", call)
    rngs = _arguments.mapping("rngs", {} if rngs is None else rngs, "keys by name")
    given = traverse_util.flatten_dict({**variables}.get("batch_stats", {}))
    paths = [path[:-1] for path in given if path[-1] == "var" and (*path[:-1], "mean") in given]
    called: set[str] = set()

    def gather(layer, path, call, x, use_running_average=None, *, mask=None, **rest):
        if isinstance(layer, LinenBatchRenorm) and layer.has_variable("batch_stats", "var"):
            layer.put_variable("batch_stats", "steps", BEFORE_ALL)
        y = call(x, use_running_average, mask=mask, **rest)
        if not _intercept.trains(layer, use_running_average):
            return y
        called.add(path)
        sofar = layer.get_variable("batch_stats", POPULATION)
        if sofar is None:
            raise ValueError(
                f"layer {path!r} has no running statistics in variables; expected its mean and "
                "var in the collection batch_stats: pass the variables of this module"
            )
        layer.put_variable("batch_stats", POPULATION, _with(sofar, layer, x, mask))
        return y

    def step(variables, index, batch):
        start = {(*p, POPULATION): _none_of(given[*p, "mean"], given[*p, "var"]) for p in paths}
        stats = traverse_util.unflatten_dict(
            traverse_util.flatten_dict({**variables}.get("batch_stats", {})) | start
        )
        keys = {k: jax.random.fold_in(key, index) for k, key in rngs.items()}
        with _intercept.in_linen(dict.fromkeys(LINEN, gather)):
            run = nn.apply(call, module, mutable=DenyList(("params",)))
            _, after = run({**variables, "batch_stats": stats}, batch, rngs=keys)
        after = traverse_util.flatten_dict(after["batch_stats"])
        return {path: after[*path, POPULATION] for path in paths}, index + 1

    population = _pooled(step, variables, jnp.uint32(0), batches, called, num_batches, progress)
    new = dict(given)
    for path, stats in population.items():
        for name in ("mean", "var"):
            new[*path, name] = _replaced(given[*path, name], getattr(stats, name), stats.count)
    return copy(variables, {"batch_stats": traverse_util.unflatten_dict(new)})


def recalibrate_nnx(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    num_batches: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> None:
    """Makes the running statistics of a model those of all batches taken as one, in place.

    The formulas, the precision and the comparison with PyTorch are in `recalibrate_linen`.

    Args:
        model: with layers `jax_bn.nnx.BatchNorm` or `flax.nnx.BatchNorm`, or subclasses. Its
            running statistics change, and nothing else of it, once all batches are through: an
            error leaves it as it was.
        batches, num_batches, progress: as in `recalibrate_linen`.
        call: `call(copy, batch)`, which runs a copy of the model, after `copy.train()`:
            `lambda model, batch: model(batch["image"], mask=batch["mask"])`. To leave layers out or
            dropout off it may change the copy first: `model.frozen.eval()`. Traced; the result is
            ignored. The copy's `nnx.Rngs` go on from batch to batch, the model's stay.

    Raises:
        ValueError: no batches, or fewer than `num_batches`; no layer that runs in training.
        TypeError: `batches` that are one array or one dict; a `num_batches` that is no integer.

    Not differentiable. Sharding: as in `recalibrate_linen`, and under the transforms of NNX a layer
    gathers as it keeps its running statistics, in an `nnx.BatchStat`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_bn.nnx import BatchNorm
        >>> from jax_bn.recalibrate import recalibrate_nnx
        >>> model = nnx.Sequential(BatchNorm(1, rngs=nnx.Rngs(0)))
        >>> recalibrate_nnx(model, [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])])
        >>> model.layers[0].mean[...].item(), model.layers[0].var[...].item()
        (3.0, 3.5)
    """
    _intercept.model_of(nnx.Module, "model", model)
    _arguments.function("call", call)
    called: set[str] = set()
    graphdef, rngs, rest = nnx.split(model, nnx.RngState, ..., graph=True)

    def gather(layer, path, call, x, use_running_average=None, *, mask=None, **rest):
        if isinstance(layer, NNXBatchRenorm):
            layer.steps[...] = jnp.asarray(BEFORE_ALL)
        y = call(x, use_running_average, mask=mask, **rest)
        if _intercept.trains(layer, use_running_average):
            called.add(path)
            variable = getattr(layer, POPULATION)
            variable.set_value(_with(variable.get_value(), layer, x, mask))
        return y

    def step(rest, rngs, batch):
        copy = nnx.merge(graphdef, rngs, rest)
        copy.train()
        layers = _layers(copy)
        for layer in layers.values():
            start = _none_of(layer.mean.get_value(), layer.var.get_value())
            setattr(layer, POPULATION, nnx.BatchStat(start))
        _intercept.in_nnx(copy, dict.fromkeys(NNX, gather))
        call(copy, batch)
        stats = {path: getattr(layer, POPULATION).get_value() for path, layer in layers.items()}
        return stats, nnx.state(copy, nnx.RngState, graph=True)

    population = _pooled(step, rest, rngs, batches, called, num_batches, progress)
    layers = _layers(model)
    for path, stats in population.items():
        for name in ("mean", "var"):
            variable = getattr(layers[path], name)
            variable.set_value(_replaced(variable.get_value(), getattr(stats, name), stats.count))


def _layers(model: nnx.Module) -> dict[Any, Any]:
    return {p: m for p, m in nnx.iter_modules(model, graph=True) if isinstance(m, NNX)}


def _with(sofar: BatchStats, layer, x, mask) -> BatchStats:
    """The statistics gathered so far and those of one more input of `layer`."""
    x = jnp.asarray(x)
    _, stats = batch_norm(
        x,
        axis=layer.axis,
        mask=None if mask is None else flax_mask(jnp.asarray(mask), x.shape),
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )
    with jax.numpy_dtype_promotion("standard"):  # the start does not know x's dtype
        return merge_stats(sofar, stats)


def _none_of(mean, var) -> BatchStats:
    """Statistics of no examples, for running ones like these."""
    with jax.numpy_dtype_promotion("standard"):  # asked for by name, so not implicit
        wide = [jnp.promote_types(v.dtype, jnp.float32) for v in (mean, var, var)]
    return BatchStats(*(jnp.zeros(var.shape, dtype) for dtype in wide))


def _replaced(old, new, count):
    """`new` where there are examples, in the dtype of `old` (complex if it must be)."""
    dtype = new.dtype if jnp.iscomplexobj(new) else old.dtype
    return jnp.where(count > 0, new.astype(dtype), old.astype(dtype))


def _pooled(step, model, carry, batches, called, num_batches, progress) -> dict[Any, BatchStats]:
    """The statistics of all batches, with step :: (model, carry, batch) -> (stats, carry)."""
    one = isinstance(batches, (jax.Array, np.ndarray, Mapping))
    if one or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches is one {type(batches).__name__}; expected an iterable of batches: pass "
            "[batch] for a single one"
        )
    if num_batches is not None:
        try:
            num_batches = operator.index(num_batches)
        except TypeError as e:
            raise TypeError(f"num_batches={num_batches!r}; expected an int or None") from e
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches}; expected at least 1, or None for all")
        batches = islice(batches, num_batches)
    if progress is not None:
        _arguments.function("progress", progress)
    step = jax.jit(step)
    merge = jax.jit(lambda a, b: {path: merge_stats(a[path], b[path]) for path in a})
    got = 0
    # Statistics of runs of batches, each of a power of two, shorter ones last: what is merged has
    # seen about as much, so that a small count is never lost in a large one.
    runs: list[dict[Any, BatchStats]] = []
    for batch in batches if progress is None else progress(batches):
        stats, carry = step(model, carry, batch)
        if not called:
            raise ValueError(
                "call ran no batch norm layer of Flax or jax_bn in training, so there are no "
                "statistics; expected at least one: pass call=, which sets the model's flag, as in "
                "call=lambda model, batch: model(batch, train=True)"
            )
        got += 1
        for _ in range((got & -got).bit_length() - 1):
            stats = merge(runs.pop(), stats)
        runs.append(stats)
    if got == 0 or got < (num_batches or 0):
        wanted = "at least 1" if num_batches is None else f"num_batches={num_batches}"
        raise ValueError(
            f"batches gave {got} batches; expected {wanted}: an iterator that was used before "
            "gives no more"
        )
    population = runs.pop()
    while runs:
        population = merge(runs.pop(), population)
    return population
