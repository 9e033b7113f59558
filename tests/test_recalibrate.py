"""Population statistics: those of all examples at once, however they are cut into batches."""

from functools import partial
from typing import Any

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn.linen
import jax_bn.nnx
from jax_bn.recalibrate import recalibrate_linen, recalibrate_nnx

RNG = np.random.default_rng(0)
SIZES = 4, 4, 4, 4, 2  # the last one ragged; far means, or an average of variances would do too
BATCHES = [np.float32(RNG.normal(size=(n, 3)) + 2 * i) for i, n in enumerate(SIZES)]
MASKED = [
    {"x": np.where(m, x, np.nan), "mask": m}
    for x, m in ((x, RNG.uniform(size=x.shape) < 0.6) for x in BATCHES)
]
LINEN, NNX = (jax_bn.linen.BatchNorm, nn.BatchNorm), (jax_bn.nnx.BatchNorm, nnx.BatchNorm)
VARIABLES = {  # of a single layer
    "params": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)},
    "batch_stats": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)},
}
both = partial(pytest.mark.parametrize, ids=["ours", "flax"])


def assert_statistics(actual, examples, masks=None):
    """Asserts that they are the mean and the variance of all examples, in float64."""
    x = np.concatenate(examples).astype(np.float64)
    where = np.full(x.shape, True) if masks is None else np.concatenate(masks)
    expected = {"mean": x.mean(0, where=where), "var": x.var(0, where=where)}
    chex.assert_trees_all_close(dict(actual), expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """A layer of the data, a shared layer called twice, one whose statistics are frozen."""

    norm: type

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        norm = partial(self.norm, use_fast_variance=False)  # Flax's other formula, which is stable
        x = norm(not train, name="first")(x, mask=mask)
        shared = norm(not train, name="shared")
        a, b = shared(x), shared(3 * x[:1] + 7)
        return norm(True, name="frozen")(a), b


class NNXNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, norm):
        self.first, self.shared, self.frozen = (
            norm(3, use_fast_variance=False, rngs=nnx.Rngs(0)) for _ in range(3)
        )
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x, mask=None):
        x = self.first(x, mask=mask)
        a, b = self.shared(x), self.shared(3 * x[:1] + 7)
        return self.dropout(self.frozen(a, use_running_average=True)), b


def normalized(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


SHARED = [v for x in BATCHES for v in (normalized(x), 3 * normalized(x)[:1] + 7)]


@both("norm", LINEN)
def test_linen(norm):
    net = Net(norm)
    variables = jax.jit(net.init)(jax.random.key(0), BATCHES[0])
    before = jax.tree.map(np.array, variables)
    traced = []

    def call(model, x):
        traced.append(x.shape)
        return model(x, train=True)

    new = recalibrate_linen(net, variables, iter(BATCHES), call=call)
    assert traced == [(4, 3), (2, 3)]
    chex.assert_trees_all_equal(variables, before)
    assert_statistics(new["batch_stats"]["first"], BATCHES)
    assert_statistics(new["batch_stats"]["shared"], SHARED)
    chex.assert_trees_all_equal(new["batch_stats"]["frozen"], before["batch_stats"]["frozen"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, before)
    chex.assert_trees_all_equal(new["params"], before["params"])


@both("norm", NNX)
def test_nnx(norm):
    net = NNXNet(norm)
    net.eval()
    before = nnx.to_pure_dict(nnx.state(nnx.clone(net)))
    recalibrate_nnx(net, iter(BATCHES))
    after = nnx.to_pure_dict(nnx.state(net))
    for name, examples in (("first", BATCHES), ("shared", SHARED)):
        assert_statistics({k: after[name].pop(k) for k in ("mean", "var")}, examples)
        del before[name]["mean"], before[name]["var"]
    chex.assert_trees_all_equal(after, before)
    assert net.first.use_running_average and net.dropout.deterministic
    assert type(net.first) is norm and set(vars(net.first)) == set(vars(norm(3, rngs=nnx.Rngs(0))))


def test_masks_count_and_hide():
    """What a mask hides is NaN here. A feature that it hides throughout keeps its statistics."""
    batches = [b | {"mask": b["mask"] & [True, True, False]} for b in MASKED]
    layer = jax_bn.linen.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    new = recalibrate_linen(
        layer, VARIABLES, batches, call=lambda model, b: model(b["x"], mask=b["mask"])
    )["batch_stats"]
    seen, masks = ([b[name][:, :2] for b in batches] for name in ("x", "mask"))
    assert_statistics({k: v[:2] for k, v in new.items()}, seen, masks)
    assert (new["mean"][2], new["var"][2]) == (0, 1)


class Block(nn.Module):
    """A layer of a stack; one step of a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        return jax_bn.linen.BatchNorm(use_running_average=False)(x) * 2 + 1, None


SECOND = [2 * normalized(x) + 1 for x in BATCHES]  # the second input


def test_stacked_layers_of_linen():
    """Layers that a scan runs through have statistics each."""
    lifted = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=2,
    )()
    variables = jax.tree.map(
        lambda v: np.stack([v, v]), {kind: {"BatchNorm_0": v} for kind, v in VARIABLES.items()}
    )
    new = recalibrate_linen(lifted, variables, BATCHES)["batch_stats"]["BatchNorm_0"]
    for i, examples in enumerate((BATCHES, SECOND)):
        assert_statistics({k: v[i] for k, v in new.items()}, examples)


def test_a_layer_that_a_scan_of_linen_carries():
    """It is one layer, called again: its statistics are those of all its inputs."""
    lifted = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
        length=2,
    )()
    variables = {kind: {"BatchNorm_0": v} for kind, v in VARIABLES.items()}
    new = recalibrate_linen(lifted, variables, BATCHES)["batch_stats"]["BatchNorm_0"]
    assert_statistics(new, [*BATCHES, *SECOND])


def test_scanned_layers_of_nnx():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(key))

    model = nnx.Sequential(stack(jax.random.split(jax.random.key(0), 2)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return nnx.remat(lambda layer, x: layer(x))(layer, x) * 2 + 1

    recalibrate_nnx(model, BATCHES, call=lambda model, x: run(model.layers[0], x))
    new = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["layers"][0]
    for i, examples in enumerate((BATCHES, SECOND)):
        assert_statistics({k: v[i] for k, v in new.items()}, examples)


def test_a_subclass_is_seen_where_it_calls_the_layer():
    class Doubled(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, *args, **kwargs):
            return super().__call__(2 * x, *args, **kwargs)

    class NNXDoubled(nnx.BatchNorm):
        def __call__(self, x, *args, **kwargs):
            return super().__call__(2 * x, *args, **kwargs)

    layer, model = Doubled(use_running_average=False), NNXDoubled(3, rngs=nnx.Rngs(0))
    new = recalibrate_linen(layer, VARIABLES, BATCHES)
    recalibrate_nnx(model, BATCHES)
    doubled = [2 * x for x in BATCHES]
    assert_statistics(new["batch_stats"], doubled)
    assert_statistics({"mean": model.mean[...], "var": model.var[...]}, doubled)


def test_frozen_statistics_stay():
    """The second layer sees what the first makes of its running averages, 0 and 1: x itself."""
    first, last = (jax_bn.nnx.BatchNorm(3, epsilon=0, rngs=nnx.Rngs(0)) for _ in range(2))
    first.freeze_statistics = True
    recalibrate_nnx(nnx.Sequential(first, last), BATCHES)
    frozen, new = ({"mean": m.mean[...], "var": m.var[...]} for m in (first, last))
    chex.assert_trees_all_equal(frozen, VARIABLES["batch_stats"])
    assert_statistics(new, BATCHES)


@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_batch_renorm_takes_the_batch_too(flax):
    """It leads to the averages that are replaced: the second layer would see something else."""
    if flax == "linen":
        layers = [jax_bn.linen.BatchRenorm(False, epsilon=0.0, warmup_steps=0) for _ in range(2)]
        model = nn.Sequential(layers)
        variables = model.init(jax.random.key(0), BATCHES[0])
        new = recalibrate_linen(model, variables, BATCHES[:1])["batch_stats"]
        first, second = new["layers_0"], new["layers_1"]
        assert second["steps"] == 0
    else:
        made = partial(jax_bn.nnx.BatchRenorm, 3, epsilon=0.0, warmup_steps=0, rngs=nnx.Rngs(0))
        layers = made(), made()
        recalibrate_nnx(nnx.Sequential(*layers), BATCHES[:1])
        first, second = ({"mean": m.mean[...], "var": m.var[...]} for m in layers)
        assert layers[1].steps[...] == 0
    x = BATCHES[0]
    assert_statistics({k: first[k] for k in ("mean", "var")}, [x])
    x_hat = (x - x.mean(0)) / x.std(0)
    assert_statistics({k: second[k] for k in ("mean", "var")}, [x_hat])


def test_a_jitted_submodule_is_seen_again():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(jax_bn.linen.BatchNorm)(False, name="bn")(x)

    variables = {k: {"bn": v} for k, v in VARIABLES.items()}
    for x in BATCHES[:2]:
        new = recalibrate_linen(Jitted(), variables, [x])["batch_stats"]["bn"]
        assert_statistics(new, [x])


def test_refused_within_replace_batch_norm():
    with jax_bn.linen.replace_batch_norm():
        with pytest.raises(RuntimeError, match="within replace_batch_norm; expected outside"):
            recalibrate_linen(nn.BatchNorm(False), VARIABLES, BATCHES)


def test_each_batch_has_keys_of_its_own():
    """The layers' input is one drawn example a batch: the same keys would give a variance of 0."""

    class Drawing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + jax.random.uniform(self.make_rng("noise"))
            return jax_bn.linen.BatchNorm(use_running_average=False, name="norm")(x)

    class NNXDrawing(nnx.Module):
        def __init__(self):
            self.rngs, self.norm = nnx.Rngs(noise=0), nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x + jax.random.uniform(self.rngs.noise()))

    batches = [np.zeros((1, 3), np.float32)] * 2
    variables = {kind: {"norm": v} for kind, v in VARIABLES.items()}
    keys = {"noise": jax.random.key(1)}
    new: Any = recalibrate_linen(Drawing(), variables, batches, rngs=keys)
    model = NNXDrawing()
    recalibrate_nnx(model, batches)
    for var in (new["batch_stats"]["norm"]["var"], model.norm.var[...]):
        assert (var > 0).all()
    assert model.rngs.noise.count[...] == 0


def test_as_many_batches_as_asked_for_and_a_bar():
    """Seven: runs of four, two and one."""
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    examples = [BATCHES[0] + i for i in range(9)]
    source = iter(examples)
    recalibrate_nnx(layer, source, num_batches=7, progress=progress)
    assert len(seen) == 7 and len(list(source)) == 2
    assert_statistics({"mean": layer.mean[...], "var": layer.var[...]}, examples[:7])


@pytest.mark.parametrize(
    "batches, fields, error, message",
    [
        ([], {}, ValueError, "gave 0 batches; expected at least 1"),
        (BATCHES[:2], {"num_batches": 3}, ValueError, "gave 2 batches; expected num_batches=3"),
        (BATCHES, {"num_batches": 0}, ValueError, "num_batches=0; expected at least 1"),
        (BATCHES, {"num_batches": 1.5}, TypeError, "num_batches=1.5; expected an int"),
        (BATCHES[0], {}, TypeError, "batches is one ndarray; expected an iterable"),
        (MASKED[0], {}, TypeError, "batches is one dict; expected an iterable"),
        (BATCHES, {"call": lambda model, x: x}, ValueError, "ran no batch norm layer"),
        ([BATCHES[0], "text"], {}, TypeError, "as an abstract array"),
    ],
)
def test_refused_and_left_as_it_was(batches, fields, error, message):
    with pytest.raises(error, match=message):
        recalibrate_linen(
            jax_bn.linen.BatchNorm(use_running_average=False), VARIABLES, batches, **fields
        )
    model = jax_bn.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=message):
        recalibrate_nnx(model, batches, **fields)
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), VARIABLES["batch_stats"]
    )
    assert model.use_running_average and type(model) is jax_bn.nnx.BatchNorm


def test_linen_needs_the_variables_of_the_module():
    layer = jax_bn.linen.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="layer '' has no running statistics"):
        recalibrate_linen(layer, {"params": VARIABLES["params"]}, BATCHES)
