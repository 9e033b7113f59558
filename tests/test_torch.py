"""PyTorch's conventions in our layers, and the exchange of weights; with PyTorch where it is."""

from functools import partial
import importlib
import re
import sys
from typing import Any

import chex
from flax import linen, nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks import gpu_programs, measure
import jax_bn.linen
import jax_bn.nnx
from jax_bn.torch import (
    fields_from_torch,
    from_torch,
    model_from_torch,
    model_to_torch,
    to_torch,
)

COUNTER = "num_batches_tracked"


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make peers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several only wait for each other on such small arrays
    yield torch
    torch.set_num_threads(threads)


def linen_layer(features, **fields):
    """Our Linen layer: its variables by name, and itself as a function of them."""
    layer = jax_bn.linen.BatchNorm(**fields)
    variables: Any = layer.init(jax.random.key(0), jnp.ones((2, features)), True)
    params = {"scale", "bias"}

    def apply(flat, x, train, **call):
        nested = {
            "params": {k: v for k, v in flat.items() if k in params},
            "batch_stats": {k: v for k, v in flat.items() if k not in params},
        }
        y, updated = layer.apply(nested, x, not train, mutable="batch_stats", **call)
        return y, flat | updated["batch_stats"]

    return variables["params"] | variables["batch_stats"], apply


def nnx_layer(features, **fields):
    """Our NNX layer, the same."""
    graphdef, state = nnx.split(jax_bn.nnx.BatchNorm(features, rngs=nnx.Rngs(0), **fields))

    def apply(flat, x, train, **call):
        layer = nnx.merge(graphdef, state, copy=True)
        nnx.update(layer, flat)
        y = layer(x, use_running_average=not train, **call)
        return y, nnx.to_pure_dict(nnx.state(layer))

    return nnx.to_pure_dict(state), apply


LAYERS = pytest.mark.parametrize("make", [linen_layer, nnx_layer], ids=["linen", "nnx"])


@LAYERS
def test_momentum_none_averages_all_batches_alike(make):
    """Also through a batch that is padding alone, which is none; compiled once."""
    variables, apply = make(3, momentum=None, unbiased=True)
    batches = np.random.default_rng(0).normal(2, 3, (5, 7, 3)).astype(np.float32)
    valid = np.ones((5, 7), bool)
    valid[0] = valid[3] = False
    valid[2, 4:] = False

    traced = []

    @jax.jit
    def train(variables, x, valid):
        traced.append(x)
        return apply(variables, x, True, mask=valid[:, None])[1]

    for x, v in zip(batches, valid, strict=True):
        variables = train(variables, x, v)
    assert len(traced) == 1
    assert variables[COUNTER] == 3 and variables[COUNTER].dtype == jnp.int32
    seen = [x[v] for x, v in zip(batches, valid, strict=True) if v.any()]
    for name, expected in [
        ("mean", np.mean([x.mean(0) for x in seen], 0)),
        ("var", np.mean([x.var(0, ddof=1) for x in seen], 0)),
    ]:
        np.testing.assert_allclose(variables[name], expected, rtol=1e-5)
    y, after = apply(variables, batches[1], False)
    chex.assert_trees_all_equal(after, variables)
    mean, var = (np.asarray(variables[k]) for k in ("mean", "var"))
    expected = (batches[1] - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@LAYERS
def test_unbiased_refuses_one_example_in_training_alone(make):
    variables, apply = make(3, unbiased=True)
    x = jnp.ones((1, 3))
    apply(variables, x, False)
    with pytest.raises(ValueError, match="unbiased=True with a batch of one example"):
        apply(variables, x, True)


def test_initializing_counts_no_batch_and_takes_one_example():
    layer = jax_bn.linen.BatchNorm(False, momentum=None, unbiased=True)
    assert layer.init(jax.random.key(0), jnp.ones((1, 3)))["batch_stats"][COUNTER] == 0


def entries(prefix="", dtype: Any = np.float32):
    """A layer of three features as in a `state_dict`; values with every kind of bits."""
    start = f"{prefix}." if prefix else ""
    names = ("weight", "bias", "running_mean", "running_var")
    values = [[1 / 3, -0.0, np.nan], [np.inf, 1e-4, 3], [-2, 0, 2], [0, 1, 7e4]]
    layer = {f"{start}{n}": np.array(v).astype(dtype) for n, v in zip(names, values, strict=True)}
    return layer | {f"{start}{COUNTER}": np.array(5)}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, v in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (v.dtype, v.shape), key
        assert actual[key].tobytes() == v.tobytes(), key


@pytest.mark.parametrize("prefix", ["", "layer1.0.bn"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_one_layer_there_and_back(prefix, dtype):
    given = entries(prefix, dtype)
    layer = from_torch(given | ({"fc.weight": np.ones((2, 2))} if prefix else {}), prefix)
    assert list(layer) == ["scale", "bias", "mean", "var", COUNTER]
    assert (layer["var"].dtype, layer[COUNTER].dtype) == (dtype, np.int32)
    for v in given.values():
        v[...] = 0  # as PyTorch does when it trains on
    expected = entries(prefix, dtype)  # in float32, for PyTorch reads no bfloat16 of NumPy's
    expected |= {k: v.astype(np.float32) for k, v in expected.items() if v.ndim}
    assert_same_bits(to_torch(layer, prefix), expected)


@pytest.mark.parametrize(
    "lacking, options, names",
    [
        (["weight", "bias"], dict(use_scale=False, use_bias=False), ["mean", "var", COUNTER]),
        (["bias"], dict(use_bias=False), ["scale", "mean", "var", COUNTER]),
        ([COUNTER], {}, ["scale", "bias", "mean", "var"]),
        (
            ["running_mean", "running_var", COUNTER],
            dict(track_running_stats=False),
            ["scale", "bias"],
        ),
    ],
    ids=["affine=False", "bias=False", "old checkpoint", "track_running_stats=False"],
)
def test_what_a_layer_lacks_has_to_be_said(lacking, options, names):
    state_dict = {k: v for k, v in entries("bn").items() if k.split(".")[1] not in lacking}
    assert list(from_torch(state_dict, "bn", **options)) == names
    for wrong in ([state_dict, {}], [entries("bn"), options]):
        if options:
            with pytest.raises(ValueError, match=rf"state_dict (lacks|holds) .*{lacking[0]}"):
                from_torch(wrong[0], "bn", **wrong[1])


@pytest.mark.parametrize(
    "changed, prefix, error, message",
    [
        ({}, "nb", ValueError, r"'nb' is no batch-norm layer .* averages are 'bn'"),
        ({"bn.lin.weight": 1}, "bn", ValueError, "which holds there .*'lin.weight'"),
        ({"bn.bias": np.zeros(4)}, "bn", ValueError, "lengths are .*'bn.bias': 4"),
        ({"bn.bias": np.zeros((3, 1))}, "bn", ValueError, r"shape \(3, 1\); expected one axis"),
        ({"bn.bias": np.zeros(3, complex)}, "bn", TypeError, "dtype complex128; expected a real"),
        ({"bn.bias": np.zeros(3)}, "bn", ValueError, "dtype float64, which float32 would round"),
        ({f"bn.{COUNTER}": np.array(2**31)}, "bn", ValueError, "below 2"),
        ({f"bn.{COUNTER}": np.zeros(3, int)}, "bn", ValueError, "one whole number"),
    ],
)
def test_refused_from_a_state_dict(changed, prefix, error, message):
    with pytest.raises(error, match=message):
        from_torch(entries("bn") | changed, prefix)


def test_refused_for_a_state_dict():
    with pytest.raises(TypeError, match="state_dict is a list; expected a mapping"):
        from_torch([1], "bn")  # pyright: ignore[reportArgumentType]
    for arrays, error, message in [
        ({}, ValueError, "arrays has nothing; expected some of"),
        ({"gamma": np.ones(3)}, ValueError, "arrays has 'gamma'"),
        ({"mean": np.ones((3, 5))}, ValueError, r"mean has shape \(3, 5\)"),
        ({"mean": np.ones(3, complex)}, TypeError, "mean has dtype complex128"),
    ]:
        with pytest.raises(error, match=message):
            to_torch(arrays, "bn")


class Block(linen.Module):
    """A layer without a bias, one level down."""

    norm: Any

    @linen.compact
    def __call__(self, x):
        return self.norm(use_bias=False, name="norm")(x, True)


class Linen(linen.Module):
    """Two layers, and one that is none."""

    norm: Any

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4, name="dense")(self.norm(name="first")(x, True))
        return Block(self.norm, name="last")(x)


class NNX(nnx.Module):
    """The same; paths of its list have a number."""

    def __init__(self, norm):
        self.first = norm(3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.last = nnx.List([norm(4, use_bias=False, rngs=nnx.Rngs(0))])


def linen_model(norm: Any = jax_bn.linen.BatchNorm):
    """Its variables, and the names of its layers."""
    variables = Linen(norm).init(jax.random.key(0), jnp.ones((2, 3)))
    return variables, {"bn1": "first", "block.0.bn": "last/norm", "head": None}


def nnx_model(norm: Any = jax_bn.nnx.BatchNorm):
    variables = nnx.to_pure_dict(nnx.state(NNX(norm)))
    return variables, {"bn1": "first", "block.0.bn": "last/0", "head": None}


def two_layers():
    """A `state_dict` for either of the two, with a third layer that they lack."""
    second = {
        f"block.0.bn.{k}": np.append(v, v[:1]) if v.ndim else v
        for k, v in entries().items()
        if k != "bias"
    }
    return entries("bn1") | second | entries("head") | {"fc.weight": np.ones((3, 3), np.float32)}


@pytest.mark.parametrize(
    "made",
    [
        partial(linen_model, linen.BatchNorm),
        linen_model,
        partial(linen_model, partial(jax_bn.linen.BatchNorm, momentum=None)),
        partial(nnx_model, nnx.BatchNorm),
        nnx_model,
        partial(nnx_model, partial(jax_bn.nnx.BatchNorm, momentum=None)),
    ],
    ids=["flax linen", "linen", "linen counting", "flax nnx", "nnx", "nnx counting"],
)
def test_a_model_there_and_back(made):
    variables, names = made()
    loaded = model_from_torch(variables, two_layers(), names)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, variables)  # the same tree
    chex.assert_trees_all_equal(variables, made()[0])  # untouched
    dense = ("params", "dense") if "params" in loaded else ("dense",)
    for tree in (loaded, variables):
        for key in dense:
            tree = tree[key]
        np.testing.assert_array_equal(tree["bias"], np.zeros(4))
    counts = any(COUNTER in jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(loaded))
    expected = {k: v for k, v in two_layers().items() if not k.startswith(("head", "fc"))}
    expected = {k: v for k, v in expected.items() if counts or not k.endswith(COUNTER)}
    assert_same_bits(model_to_torch(loaded, names), expected)
    template = jax.eval_shape(lambda: variables)
    chex.assert_trees_all_equal(
        model_from_torch(template, two_layers(), names) | {"dense": 0, "params": 0},
        loaded | {"dense": 0, "params": 0},
    )


def test_an_nnx_model_takes_the_result():
    model = NNX(jax_bn.nnx.BatchNorm)
    variables, names = nnx_model()
    nnx.update(model, model_from_torch(variables, two_layers(), names))
    x = jnp.ones((2, 4))
    layer = from_torch(two_layers(), "block.0.bn", use_bias=False)
    expected = jax_bn.normalize(x, layer["mean"], layer["var"], layer["scale"])
    np.testing.assert_array_equal(model.last[0](x, use_running_average=True), expected)


def test_a_model_without_running_averages_keeps_ours():
    variables, names = linen_model()
    state_dict = {k: v for k, v in two_layers().items() if k.endswith(("weight", "bias"))}
    loaded = model_from_torch(variables, state_dict, names, track_running_stats=False)
    chex.assert_trees_all_equal(loaded["batch_stats"], variables["batch_stats"])
    assert loaded["params"]["first"]["scale"][0] == np.float32(1 / 3)
    for wrong, options in [(state_dict, {}), (two_layers(), dict(track_running_stats=False))]:
        with pytest.raises(ValueError, match=r"state_dict (lacks|holds) 'bn1.(running|num)"):
            model_from_torch(variables, wrong, names, **options)


@pytest.mark.parametrize(
    "changed, names, error, message",
    [
        ({}, {"block.0.bn": None}, ValueError, "names lacks the layers 'bn1', 'head'"),
        ({}, {"bn1": "dense"}, ValueError, "'dense' of names is no .* hold there 'bias', 'kernel'"),
        ({}, {"bn1": "first/mean"}, ValueError, "which hold there nothing"),
        ({}, {"bn1": "last/0"}, ValueError, "names leads to 'last/0' more than once"),
        ({}, {"bn1": 0}, TypeError, "expected strings"),
        ({"bn1.bias": None}, {}, ValueError, "lacks 'bn1.bias'.*bias=False"),
        ({"block.0.bn.bias": np.ones(4)}, {}, ValueError, "holds 'block.0.bn.bias', which use"),
        (
            {k: v for k, v in entries("block.0.bn").items() if k != "block.0.bn.bias"},
            {},
            ValueError,
            r"bn.\w+ has shape \(3,\); expected \(4,\), that of variables",
        ),
        ({"bn1.weight": np.ones(3)}, {}, ValueError, "float64, which float32 would round"),
    ],
)
def test_refused_for_a_model(changed, names, error, message):
    variables, all_names = nnx_model()
    state_dict = {k: v for k, v in (two_layers() | changed).items() if v is not None}
    names = names if names.keys() == {"block.0.bn"} else all_names | names
    with pytest.raises(error, match=message):
        model_from_torch(variables, state_dict, names)


def test_refused_as_variables():
    names: Any = {"bn1": "first"}
    state: Any = nnx.state(NNX(nnx.BatchNorm))
    wrong: Any
    for wrong in (state, [1]):
        with pytest.raises(TypeError, match="expected nested dicts of arrays"):
            model_to_torch(wrong, names)
    with pytest.raises(TypeError, match="names is a list; expected a mapping"):
        model_to_torch(nnx_model()[0], ["bn1"])  # pyright: ignore[reportArgumentType]


def test_fields_are_refused_of_another_module():
    with pytest.raises(TypeError, match=r"module is a int; expected a torch.nn.BatchNorm1d"):
        fields_from_torch(3)


def test_fields_are_those_of_the_torch_layer(torch):
    made = torch.nn.BatchNorm2d
    fields = dict(momentum=0.9, epsilon=1e-5, use_scale=True, use_bias=True, unbiased=True)
    assert fields_from_torch(made(3)) == fields
    assert fields_from_torch(made(3, eps=1e-3, momentum=None, affine=False)) == fields | dict(
        momentum=None, epsilon=1e-3, use_scale=False, use_bias=False
    )
    untracked = made(3, track_running_stats=False)
    assert fields_from_torch(untracked) == fields | dict(use_running_average=False)
    with pytest.raises(TypeError, match="module is a InstanceNorm2d"):
        fields_from_torch(torch.nn.InstanceNorm2d(3))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_there_and_back(torch, dtype):
    """Bit for bit, and PyTorch loads the result."""
    layer = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    with torch.no_grad():
        for v in layer.state_dict().values():
            v.copy_(torch.randn(v.shape) * 100)
        layer.num_batches_tracked.fill_(7)
    ours = from_torch(layer.state_dict(), "")
    other = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    other.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(ours, "").items()})
    for key, v in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], v), key
    assert str(ours["mean"].dtype) == dtype
    before = np.array(ours["mean"])
    with torch.no_grad():
        layer.running_mean.zero_()
    np.testing.assert_array_equal(ours["mean"], before)  # a copy


@pytest.mark.parametrize(
    "make, momentum, dtype, steps, tolerance",
    [
        (linen_layer, 0.1, "float64", 200, 1e-10),
        (nnx_layer, None, "float64", 200, 1e-10),
        (linen_layer, 0.1, "float32", 20, 1e-4),
    ],
    ids=["linen", "nnx, momentum=None", "linen, float32"],
)
def test_training_is_that_of_pytorch(torch, make, momentum, dtype, steps, tolerance):
    """The same weights, data and optimizer: the curves, the averages and the evaluation agree."""
    rng = np.random.default_rng(0)
    xs = rng.normal(1, 2, (steps, 6, 5, 5, 2)).astype(dtype)  # features last, as in JAX
    targets = np.stack([xs.max((2, 3, 4)), xs.std((2, 3, 4)), xs.mean((2, 3, 4))], -1)
    theirs = torch_network(torch, momentum).to(getattr(torch, dtype))
    start = {k: v.numpy().copy() for k, v in theirs.state_dict().items()}
    their_losses = train_in_torch(torch, theirs, xs, targets)
    theirs.eval()
    their_y = theirs(torch.from_numpy(xs[0]).movedim(-1, 1)).detach().numpy()

    _, apply = make(4, **fields_from_torch(theirs[1]))
    with jax.enable_x64(dtype == "float64"):
        layer = from_torch(start, "1")
        if momentum is not None:
            del layer[COUNTER]
        weights = {k: layer.pop(k) for k in ("scale", "bias")}
        weights["kernel"] = jnp.asarray(start["0.weight"].transpose(2, 3, 1, 0))
        weights["dense"] = jnp.asarray(start["5.weight"].T)
        network = partial(our_network, apply)
        weights, layer, losses = train_in_jax(network, weights, layer, xs, targets)
        losses = np.asarray(losses)
        y = np.asarray(jax.jit(network, static_argnums=3)(weights, layer, xs[0], False)[0])
        trained = to_torch(layer | {k: weights[k] for k in ("scale", "bias")}, "1")

    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    assert losses[-1] < 0.5 * losses[0]
    close(losses, their_losses)
    close(y, their_y)
    their_state = theirs.state_dict()
    for key, v in trained.items():
        close(v, their_state[key], err_msg=key)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in trained.items()}, strict=False)
    close(theirs(torch.from_numpy(xs[0]).movedim(-1, 1)).detach().numpy(), y)


def torch_network(torch, momentum):
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    )


def train_in_torch(torch, network, xs, targets):
    """The losses of a step of SGD with momentum for each batch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for x, target in zip(map(torch.from_numpy, xs), map(torch.from_numpy, targets), strict=True):
        optimizer.zero_grad()
        loss = ((network(x.movedim(-1, 1)) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_network(apply, weights, layer, x, train):
    kernel, dense = weights["kernel"], weights["dense"]
    x = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = layer | {k: weights[k] for k in ("scale", "bias")}
    y, flat = apply(flat, x, train)
    return jax.nn.relu(y).mean((1, 2)) @ dense, {k: flat[k] for k in layer}


def train_in_jax(network, weights, layer, xs, targets):
    """The same; also the weights and the layer's averages."""

    def step(carry, batch):
        weights, layer, traces = carry

        def loss(weights):
            y, updated = network(weights, layer, batch[0], True)
            return jnp.mean((y - batch[1]) ** 2), updated

        (value, layer), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        traces = jax.tree.map(lambda t, g: 0.9 * t + g, traces, grads)
        weights = jax.tree.map(lambda w, t: w - 0.02 * t, weights, traces)
        return (weights, layer, traces), value

    start = weights, layer, jax.tree.map(jnp.zeros_like, weights)
    (weights, layer, _), losses = jax.jit(partial(lax.scan, step))(start, (xs, targets))
    return weights, layer, losses


@pytest.fixture
def example():
    return importlib.import_module("from_torch")  # of examples/


def test_the_example_goes_on_where_pytorch_stops(torch, example, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as for users
        example.main(["--steps-before=5", "--steps=10"])
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["loss", "at", "step", "PyTorch", "jax_bn"]
    both = np.array([row.split()[1:] for row in rows[5:-1]], float)
    assert len(both) == 10
    np.testing.assert_allclose(both[:, 0], both[:, 1], atol=1e-4)
    assert both[-1, 1] < 0.7 * float(rows[0].split()[1])  # it had learned, and goes on
    apart = re.fullmatch(r"largest difference of the losses: (\S+)", last)
    assert apart and float(apart[1]) < 1e-4


def test_the_example_says_how_to_install_pytorch(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not there
    with pytest.raises(SystemExit, match=r"needs PyTorch .*pip install torch --index-url"):
        example.main([])


@pytest.mark.parametrize("option", ["--steps", "--steps-before", "--learning-rate", "--seed"])
def test_the_example_refuses_bad_options(example, capsys, option):
    with pytest.raises(SystemExit):
        example.main([f"{option}=-1"])
    assert f"argument {option}: '-1'; expected" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("after", gpu_programs.AFTER)
def test_what_the_gpu_benchmark_times_is_the_same(torch, after, dtype):
    """Forward, backward and both together, each beside ours."""
    del torch  # it is here
    after = gpu_programs.AFTER[after]
    data = gpu_programs.inputs((8, 3, 3, 16), dtype, after, rotated=1)
    (xs, dy), *_ = data.pairs

    def results(name, what):
        program = gpu_programs.program(name, what, after, data)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.tree.leaves(program.call(*program.arguments[0]))

    def as_ours(t):
        t = t.detach().movedim(1, -1) if t.ndim > 2 else t.detach()
        return jnp.asarray(t.float().cpu().numpy(), dtype if t.ndim > 2 else "float32")

    ours = gpu_programs.peer(gpu_programs.OURS, after)
    apply, state = ours.make(xs)
    y, _, gradients = in_float64(
        measure.functions(ours, apply)["step"], xs, dy, data.scale, data.bias, state
    )
    oracle = [y, *jax.tree.leaves(gradients)]
    definition = results(gpu_programs.FLAX, "step")
    del definition[1:3]  # the averages
    timed = gpu_programs.TORCH
    apart = [*results(timed, "forward"), *results(timed, "backward")]
    for tensors in (results(timed, "step"), apart):
        assert_as_accurate([as_ours(t) for t in tensors], definition, oracle, 72)
