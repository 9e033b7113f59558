"""Every public callable, every parameter, and how it can be misused: each a clear error of ours.

An error names the parameter and is raised in jax_bn, not somewhere inside JAX or Flax where the
user never was. `test_nothing_is_left_out` holds the table to `public_api.txt`.
"""

from collections.abc import Callable
from pathlib import Path
import re
import subprocess
import sys
from typing import Any, NamedTuple

from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn
from jax_bn import fold, linen as ours_linen, nnx as ours_nnx, recalibrate, torch as exchange

X = np.arange(12, dtype=np.float32).reshape(4, 3) ** 1.5
V = np.ones(3, np.float32)
STATS, OTHERS = (jax_bn.BatchStats(jnp.ones(n), jnp.ones(n), jnp.ones(n)) for n in (3, 2))
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, X.shape)
TRACED = "a traced value"  # stands for one: see `run`


class Row(NamedTuple):
    """A misuse: `arguments` beside or in place of good ones; the first is the one misused."""

    arguments: dict[str, Any]
    error: type[Exception]
    names: str = ""  # what the error names, if not the parameter

    @property
    def parameter(self) -> str:
        return next(iter(self.arguments))


def rows(
    parameter: str, error: type[Exception], *values: Any, names: str = "", **others: Any
) -> list[Row]:
    return [Row({parameter: value} | others, error, names) for value in values]


# ---- the functions -------------------------------------------------------------------------------

ARRAYS = [
    *rows("x", TypeError, None, "x", KEYS),
    *rows("x", ValueError, np.float32(1)),
    *rows("scale", ValueError, V[:2], X, 1.0),
    *rows("scale", TypeError, "ones", KEYS),
    *rows("bias", ValueError, V[:2], 0.0),
    *rows("bias", TypeError, "zeros"),
]
OPTIONS = [
    *rows("axis", ValueError, 2, -3, (0, 0)),
    *rows("axis", TypeError, None, 1.5, "0", [0, None]),
    *rows("epsilon", ValueError, -1e-5, np.nan, np.inf),
    *rows("epsilon", TypeError, None, "small", 1j, V, TRACED),
    *rows("residual", ValueError, X[0], X[:2]),
    *rows("residual", TypeError, "x", KEYS),
    *rows("activation", TypeError, "relu", 1, lambda z: z * jnp.asarray(X[:2])),
    *rows("activation", ValueError, jnp.sum, lambda z: z.astype(jnp.float16), lambda a, b: a),
    *rows("dtype", ValueError, int, bool),
    *rows("dtype", TypeError, "float23", X, jnp.float8_e5m2),
]
IN_TRAINING = [
    *rows("mask", TypeError, X, "all", KEYS),
    *rows("mask", ValueError, np.ones(5, bool), np.ones((4, 4), bool)),
    *rows("axis_name", ValueError, "nowhere", 5, ["a", "a"], [["a"]]),
    *rows("axis_index_groups", ValueError, [[0]]),
    *rows("axis_index_groups", ValueError, 5, [], [[0], [1, 2]], [0, 1], [["a"]], axis_name="i"),
    *rows("virtual_batch_size", ValueError, 0, -2, 3),
    *rows("virtual_batch_size", TypeError, 2.0, "2", TRACED),
    *rows("forward_mode", TypeError, "no", V, TRACED),
    *rows("implementation", ValueError, "cuda", 5, ["xla"]),
]
if jax.default_backend() != "gpu":  # or it might run
    IN_TRAINING += rows("implementation", NotImplementedError, "mosaic_gpu")
STATISTICS = [
    *rows("mean", ValueError, V[:2], X),
    *rows("mean", TypeError, None, "zeros"),
    *rows("var", ValueError, V[:2], X),
    *rows("var", TypeError, None, V + 1j),
]
BOUNDS = [
    *rows("r_max", ValueError, 0.5),
    *rows("r_max", TypeError, None, "3", V, 1j),
    *rows("d_max", ValueError, -1.0),
    *rows("d_max", TypeError, None, V),
]
MOMENTUM = [
    *rows("momentum", ValueError, -0.1, 1.5, np.nan),
    *rows("momentum", TypeError, "0.9", V, 1j),
]
FUNCTIONS: dict[str, list[Row]] = {
    "batch_norm": [
        *ARRAYS,
        *OPTIONS,
        *IN_TRAINING,
        *rows("x", ValueError, X[:0]),
        *rows("dtype", ValueError, "float32", x=X + np.complex64(1j)),
    ],
    "normalize": ARRAYS[:3] + ARRAYS[4:] + OPTIONS + STATISTICS,
    "batch_renorm": ARRAYS + OPTIONS + IN_TRAINING + STATISTICS + BOUNDS,
    "update_running_stats": [
        *rows("mean", ValueError, V[:2]),
        *rows("mean", TypeError, None, "zeros", np.zeros(3, int)),
        *rows("var", ValueError, X),
        *rows("var", TypeError, None, np.ones(3, int)),
        *rows("stats", TypeError, None, (V, V, V)),
        *rows("unbiased", ValueError, True),  # STATS count one example
        *rows("unbiased", TypeError, "yes", TRACED),
        *MOMENTUM,
        *rows("momentum", TypeError, None),
    ],
    "merge_stats": [
        *rows("stats", ValueError, (), (STATS, OTHERS)),
        *rows("stats", TypeError, ([STATS, STATS],), (STATS, None)),
    ],
}

# ---- the layers ----------------------------------------------------------------------------------

FLAGS = [
    Row({name: value}, TypeError)
    for name in ("use_bias", "use_scale", "unbiased", "freeze_statistics", "freeze_affine")
    for value in ("yes", V)
]
FIELDS = [
    *rows("use_running_average", TypeError, "no", V, TRACED),
    *(row for row in OPTIONS if row.parameter != "residual"),
    *(row for row in IN_TRAINING if row.parameter != "mask"),
    *MOMENTUM,
    *rows("param_dtype", TypeError, "float23"),
    *rows("bias_init", TypeError, "zeros"),
    *rows("scale_init", TypeError, 1.0),
    *rows("scale_init", ValueError, lambda key, shape, dtype: jnp.ones(2, dtype), names="scale"),
    *FLAGS,
]
CALL = [
    *(row for row in ARRAYS if row.parameter == "x"),
    *rows("use_running_average", TypeError, "no", V, TRACED),
    *rows("mask", TypeError, "all", KEYS),
    *rows("mask", ValueError, np.ones(5, bool), np.ones((4, 4), bool)),
    *(row for row in OPTIONS if row.parameter == "residual"),
]
RENORM = [
    *BOUNDS,  # here a schedule too
    *rows("warmup_steps", ValueError, -1, 2**31),
    *rows("warmup_steps", TypeError, 1.5, None, "all"),
]
LAYERS: dict[str, list[Row]] = {
    "linen.BatchNorm": [*FIELDS, *rows("activation", TypeError, nn.Dense(3))],
    "linen.BatchNorm.__call__": CALL,
    "linen.BatchRenorm": RENORM,
    "nnx.BatchNorm": [
        *FIELDS,
        *rows("use_running_average", ValueError, None),
        *rows("activation", TypeError, nnx.Linear(3, 3, rngs=nnx.Rngs(0))),
        *rows("num_features", ValueError, -1),
        *rows("num_features", TypeError, None, 1.5, "3"),
        *rows("rngs", TypeError, None, KEY),
        *rows("promote_dtype", TypeError, None, "float32"),
        *rows("bias_metadata", TypeError, None, 1),
        *rows("scale_metadata", TypeError, ["sharding"]),
    ],
    "nnx.BatchNorm.__call__": [*CALL, *rows("x", ValueError, X[:, :2])],
    "nnx.BatchRenorm": [
        *RENORM,
        *rows("rngs", TypeError, None),
        *rows("fields", TypeError, "eps", names="eps"),
    ],
}

# ---- models --------------------------------------------------------------------------------------


def linen_model(train: bool = False):
    return nn.Sequential([nn.Dense(3), ours_linen.BatchNorm(use_running_average=not train)])


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), ours_nnx.BatchNorm(3, rngs=rngs))


class Sub(nnx.BatchNorm):
    pass


class _BatchNorm:
    """As PyTorch's: its base class has this name."""

    momentum, eps, weight, bias, track_running_stats = 0.1, 1e-5, None, None, True


LINEN, NNX = linen_model(), nnx_model()
VARIABLES = jax.device_get(LINEN.init(KEY, X))
ENTRIES = {f"bn.{name}": V for name in ("weight", "bias", "running_mean", "running_var")}
NAMES = {"bn": "layers_1"}
POOLED = [
    *rows("batches", TypeError, X, {"x": X}, None, 5),
    *rows("batches", ValueError, []),
    *rows("call", TypeError, None, "model"),
    *rows("num_batches", ValueError, 0, 2),
    *rows("num_batches", TypeError, 1.5, "all"),
    *rows("progress", TypeError, True, "bar"),
]
PAIRS = [
    *rows("call", TypeError, None, "model"),
    *rows("pairs", TypeError, "a", [("a", "b")]),
    *rows("pairs", ValueError, {"nowhere": "layers_1"}),
]
MODELS: dict[str, list[Row]] = {
    "nnx.replace_batch_norm": [
        *rows("model", TypeError, None, LINEN, Sub(3, rngs=nnx.Rngs(0))),
        *rows("model", ValueError, nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        *rows("forward_mode", TypeError, "no", V),
    ],
    "nnx.restore_batch_norm": [
        *rows("model", TypeError, None, LINEN),
        *rows("model", ValueError, nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    ],
    "linen.replace_batch_norm": rows("forward_mode", TypeError, "no", V),
    "recalibrate.recalibrate_linen": [
        *POOLED,
        *rows("module", TypeError, None, NNX, VARIABLES),
        *rows("variables", TypeError, None, V),
        *rows("variables", ValueError, {"params": VARIABLES["params"]}),
        *rows("rngs", TypeError, KEY, 0),
    ],
    "recalibrate.recalibrate_nnx": [*POOLED, *rows("model", TypeError, None, LINEN)],
    "fold.fold_linen": [
        *PAIRS,
        *rows("module", TypeError, None, NNX, VARIABLES),
        *rows("variables", TypeError, None, V),
    ],
    "fold.fold_nnx": [*PAIRS, *rows("model", TypeError, None, LINEN)],
    "fold.Folded.__call__": [
        *rows("use_running_average", ValueError, False),
        *rows("residual", ValueError, X[0]),
        *rows("residual", TypeError, "x"),
    ],
    "torch.fields_from_torch": rows("module", TypeError, None, V),
    "torch.from_torch": [
        *rows("state_dict", TypeError, None, [V]),
        *rows("prefix", ValueError, "nowhere"),
        *rows("use_scale", ValueError, False),
        *rows("use_bias", ValueError, False),
        *rows("track_running_stats", ValueError, False),
    ],
    "torch.to_torch": [
        *rows("arrays", ValueError, {}, {"gamma": V}),
        *rows("arrays", TypeError, None, [V]),
    ],
    "torch.model_from_torch": [
        *rows("variables", TypeError, None, LINEN),
        *rows("state_dict", TypeError, None, [V]),
        *rows("names", TypeError, None, ["bn"], {"bn": 5}),
        *rows("names", ValueError, {}, {"bn": "nowhere"}),
        *rows("track_running_stats", ValueError, False),
    ],
    "torch.model_to_torch": [
        *rows("variables", TypeError, None, LINEN),
        *rows("names", TypeError, None, ["bn"]),
        *rows("names", ValueError, {"bn": "nowhere"}),
    ],
}
TABLE = FUNCTIONS | LAYERS | MODELS

# Callables that cannot be misused, or not so that we could know.
WHOLE = {
    "BatchStats": "a pytree: JAX makes it of whatever it maps; who takes one checks it",
    "remat_policy": "jax.checkpoint calls it",
    "reference.batch_norm": "the definition: it has no code but the definition's",
    "fold.Folded": "fold_nnx makes it",
    "fold.Folded.set_view": "kept, and checked by the next call",
    "nnx.BatchNorm.set_view": "kept, and checked by the next call",
    "nnx.BatchRenorm.set_view": "kept, and checked by the next call",
}
FLAX_S_OWN = {
    "use_fast_variance": "accepted for Flax's sake, whatever it is: the variance is stable",
    "force_float32_reductions": "as Flax's: true or false",
    "parent": "Flax checks it",
    "name": "Flax checks it",
}
NO_MISUSE: dict[str, dict[str, str]] = {
    "linen.BatchNorm": FLAX_S_OWN,
    "nnx.BatchNorm": FLAX_S_OWN,
    "fold.fold_linen": {"args": "the model's own"},
    "fold.fold_nnx": {"args": "the model's own"},
    "fold.Folded.__call__": {"x": "what the layer before gives", "mask": "means nothing here"},
    "torch.to_torch": {"prefix": "any name"},
}

# ---- how each is called --------------------------------------------------------------------------


def linen_layer(cls, **given):
    """A step of training, or `init` where what is wrong is only used there."""
    call = {k: given.pop(k) for k in ("x", "mask", "residual") if k in given}
    given = {"use_running_average": False} | given
    x = call.pop("x", X)
    if given.keys() & {"bias_init", "scale_init", "param_dtype"}:
        return cls(**given).init(KEY, x, **call)
    variables = {"params": {"scale": V, "bias": V}, "batch_stats": {"mean": V, "var": V}}
    return cls(**given).apply(variables, x, **call, mutable="batch_stats")


def linen_call(use_running_average=False, *, x=X, **call):
    variables = {"params": {"scale": V, "bias": V}, "batch_stats": {"mean": V, "var": V}}
    layer = ours_linen.BatchNorm()
    return layer.apply(variables, x, use_running_average, **call, mutable="batch_stats")


def nnx_layer(cls, **given):
    """The constructor and a step of training."""
    given = {"num_features": 3, "rngs": nnx.Rngs(0)} | given
    return cls(given.pop("num_features"), **given)(X)


def nnx_call(x=X, **call):
    return ours_nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, **call)


def nnx_renorm(**given):
    if "fields" in given:
        given = {given.pop("fields"): 1}
    return nnx_layer(ours_nnx.BatchRenorm, **given)


def by_good(f: Callable, **good: Any) -> Callable:
    """f with good arguments, in keywords, but for those given."""
    return lambda **given: f(**(good | given))


def fold_linen(**given):
    return fold.fold_linen(
        given.pop("module", LINEN), given.pop("variables", VARIABLES), X, **given
    )


def fold_nnx(model=NNX, **given):
    return fold.fold_nnx(model, X, **given)


def within_replacement(**given):
    with ours_linen.replace_batch_norm(**given):
        pass


RUN: dict[str, Callable[..., Any]] = {
    "batch_norm": by_good(jax_bn.batch_norm, x=X),
    "normalize": by_good(jax_bn.normalize, x=X, mean=V, var=V),
    "batch_renorm": by_good(jax_bn.batch_renorm, x=X, mean=V, var=V),
    "update_running_stats": by_good(jax_bn.update_running_stats, mean=V, var=V, stats=STATS),
    "merge_stats": lambda stats: jax_bn.merge_stats(*stats),
    "linen.BatchNorm": lambda **given: linen_layer(ours_linen.BatchNorm, **given),
    "linen.BatchNorm.__call__": linen_call,
    "linen.BatchRenorm": lambda **given: linen_layer(ours_linen.BatchRenorm, **given),
    "nnx.BatchNorm": lambda **given: nnx_layer(ours_nnx.BatchNorm, **given),
    "nnx.BatchNorm.__call__": nnx_call,
    "nnx.BatchRenorm": nnx_renorm,
    "nnx.replace_batch_norm": by_good(ours_nnx.replace_batch_norm, model=NNX),
    "nnx.restore_batch_norm": ours_nnx.restore_batch_norm,
    "linen.replace_batch_norm": within_replacement,
    "recalibrate.recalibrate_linen": by_good(
        recalibrate.recalibrate_linen, module=linen_model(True), variables=VARIABLES, batches=[X]
    ),
    "recalibrate.recalibrate_nnx": by_good(recalibrate.recalibrate_nnx, model=NNX, batches=[X]),
    "fold.fold_linen": fold_linen,
    "fold.fold_nnx": fold_nnx,
    "fold.Folded.__call__": by_good(fold.Folded("bn", "float32", None).__call__, x=X),
    "torch.fields_from_torch": exchange.fields_from_torch,
    "torch.from_torch": by_good(exchange.from_torch, state_dict=ENTRIES, prefix="bn"),
    "torch.to_torch": by_good(exchange.to_torch, arrays={"scale": V}, prefix="bn"),
    "torch.model_from_torch": by_good(
        exchange.model_from_torch, variables=VARIABLES, state_dict=ENTRIES, names=NAMES
    ),
    "torch.model_to_torch": by_good(exchange.model_to_torch, variables=VARIABLES, names=NAMES),
}


def run(name: str, arguments: dict[str, Any]) -> None:
    """The call; with a tracer where the row says `TRACED`."""
    if not any(v is TRACED for v in arguments.values()):
        RUN[name](**arguments)
        return

    @jax.jit
    def traced(v):
        RUN[name](**{k: v if given is TRACED else given for k, given in arguments.items()})
        return v

    traced(np.int32(1))


# ---- the tests -----------------------------------------------------------------------------------

CASES = [
    pytest.param(name, row, id=f"{name}-{row.parameter}-{i}")
    for name, table in TABLE.items()
    for i, row in enumerate(table)
]


@pytest.mark.parametrize("name, row", CASES)
def test_misuse_is_refused_by_name(name, row):
    with pytest.raises(row.error) as caught:
        run(name, row.arguments)
    assert re.search(rf"\b{row.names or row.parameter}\b", str(caught.value)), caught.value
    innermost = caught.traceback[-1].frame.f_globals["__name__"].split(".")[0]
    assert innermost == "jax_bn", f"raised in {innermost}: {caught.value}"


GOOD = {  # where `RUN` has none
    "merge_stats": dict(stats=(STATS,)),
    "nnx.restore_batch_norm": dict(model=ours_nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
    "torch.fields_from_torch": dict(module=_BatchNorm()),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_good_arguments_are_good(name):
    """What the table rests on: a row is refused for what it changes and for nothing else."""
    RUN[name](**GOOD.get(name, {}))


def test_a_plain_mean_needs_its_counter():
    layer = ours_nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.momentum = None
    with pytest.raises(ValueError, match="momentum=None was set after the layer was made"):
        layer(X)


def test_nothing_is_left_out():
    """Every parameter of every public callable is in the table, or here with the reason."""
    public = {}
    for line in Path(__file__).with_name("public_api.txt").read_text().splitlines():
        name, arguments = line.removeprefix("jax_bn.").removesuffix(")").split("(", 1)
        names = (re.match(r"\**(\w+)", word) for word in re.split(r", (?=[\w*]+)", arguments))
        public[name] = {found[1] for found in names if found} - {"self"}
    assert public.keys() >= TABLE.keys() and public.keys() >= NO_MISUSE.keys()
    for name, parameters in public.items():
        base = name.replace("BatchRenorm", "BatchNorm")  # whose fields and call are the same
        misused = {row.parameter for n in (name, base) for row in TABLE.get(n, [])}
        excused = NO_MISUSE.get(name, {}).keys() | NO_MISUSE.get(base, {}).keys()
        if name not in WHOLE:
            assert parameters == (misused & parameters) | (excused & parameters), name
            assert not misused & NO_MISUSE.get(name, {}).keys(), name
    assert WHOLE.keys() <= public.keys() - TABLE.keys()


def test_without_flax_the_import_says_how_to_get_it():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "flax" else find(name)
sys.modules["flax"] = None  # as if it were not installed
for module in ("linen", "nnx", "recalibrate", "fold"):
    try:
        importlib.import_module(f"jax_bn.{module}")
    except ModuleNotFoundError as e:
        assert e.name == "flax" and "pip install '.[flax]'" in str(e), e
    else:
        raise AssertionError(f"{module} was imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
