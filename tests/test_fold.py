"""Folded models: the same outputs to rounding, by fewer operations."""

import re

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bn.fold import Folded, fold_linen, fold_nnx
import jax_bn.linen
import jax_bn.nnx

RNG = np.random.default_rng(0)
OURS, FLAX = jax_bn.linen.BatchNorm, nn.BatchNorm


def randomized(tree):
    """Arrays of the same shapes and dtypes, none of them at a neutral value."""
    return jax.tree.map(lambda v: jnp.asarray(RNG.uniform(0.5, 2, v.shape), v.dtype), tree)


def operations(f, *args):
    """How many the compiled text has."""
    text = jax.jit(f).lower(*args).compile().as_text() or ""
    return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", text, re.M))


def assert_folded(before, after, args, rtol=1e-5):
    """`before` and `after` are pairs of a function and its variables."""
    expected, actual = (jax.jit(f)(v, *args) for f, v in (before, after))
    chex.assert_trees_all_equal_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)
    counts = [operations(f, v, *args) for f, v in (after, before)]
    assert counts[0] < counts[1], counts


class Pair(nn.Module):
    """An affine layer and a normalization."""

    affine: nn.Module
    norm: nn.Module

    @nn.compact
    def __call__(self, x, residual=None):
        x = self.affine(x)
        return self.norm(x) if residual is None else self.norm(x, residual=residual)


LINEN = {
    "dense": (nn.Dense(6), OURS(True), (2, 4)),
    "conv of rank 1, groups, no bias": (
        nn.Conv(6, (3,), use_bias=False, feature_group_count=2),
        FLAX(True, axis=2),
        (2, 5, 4),
    ),
    "conv of rank 2, mask, no scale": (
        nn.Conv(6, (2, 3), padding="CIRCULAR", mask=np.float32(RNG.integers(0, 2, (2, 3, 4, 6)))),
        FLAX(True, use_scale=False, epsilon=1e-2),
        (2, 5, 5, 4),
    ),
    "conv of rank 3, no bias of either": (
        nn.Conv(6, (2, 2, 2), use_bias=False),
        OURS(True, use_bias=False),
        (1, 3, 3, 3, 4),
    ),
    "transpose": (nn.ConvTranspose(6, (3,), strides=(2,)), FLAX(True), (2, 5, 4)),
    "transposed kernel": (
        nn.ConvTranspose(6, (3, 2), transpose_kernel=True, use_bias=False),
        OURS(True),
        (2, 3, 3, 4),
    ),
    "frozen statistics": (nn.Dense(6), OURS(False, freeze_statistics=True), (2, 4)),
    "bfloat16 layer, float32 result": (
        nn.Dense(6, dtype=jnp.bfloat16, use_bias=False),
        OURS(True, dtype=jnp.float32),
        (2, 4),
    ),
}


@pytest.mark.parametrize("affine, norm, shape", LINEN.values(), ids=LINEN)
def test_linen(affine, norm, shape):
    model, x = Pair(affine, norm), np.float32(RNG.normal(size=shape))
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), x))
    before = jax.tree.map(np.array, variables)
    apply, folded = fold_linen(model, variables, jax.ShapeDtypeStruct(shape, np.float32))
    chex.assert_trees_all_equal(variables, before)
    rtol = 3e-2 if affine.dtype == jnp.bfloat16 else 1e-5
    assert_folded((model.apply, variables), (apply, folded), (x,), rtol)
    # They are the variables of the model that one would write without the normalization.
    plain = affine.clone(use_bias=True, parent=None)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        {"params": folded["params"]["affine"]}, jax.eval_shape(plain.init, jax.random.key(0), x)
    )


def test_linen_keeps_what_it_cannot_fold():
    """The first has nothing before it, the last a relu."""
    model = nn.Sequential([OURS(True), nn.Dense(4), OURS(True), nn.relu, FLAX(True)])
    x = RNG.normal(size=(2, 4)).astype(np.float32)
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), x))
    apply, folded = fold_linen(model, variables, x)
    assert folded["batch_stats"].keys() == {"layers_0", "layers_4"}
    assert_folded((model.apply, variables), (apply, folded), (x,))


def test_activation_and_residual_stay():
    """Those of ours; in Linen and in NNX."""
    x, residual = RNG.normal(size=(2, 2, 4)).astype(np.float32)
    model = Pair(nn.Dense(4), OURS(True, activation=jax.nn.relu))
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), x))
    apply, folded = fold_linen(model, variables, x, residual, pairs={"affine": "norm"})
    assert_folded((model.apply, variables), (apply, folded), (x, residual))
    assert not apply(folded, x, residual).min() < 0


class Net(nnx.Module):
    """A block, a layer whose result is used twice, two whose kernel is one, one called twice."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.block = nnx.Sequential(
            nnx.Conv(4, 4, (3,), use_bias=False, rngs=rngs),
            jax_bn.nnx.BatchNorm(4, activation=nnx.relu, rngs=rngs),
            nnx.ConvTranspose(4, 4, (2,), strides=2, transpose_kernel=True, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
        )
        self.seen, self.seen_norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.tied, self.tied_norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.twin = nnx.Linear(4, 4, rngs=rngs)
        self.twin.kernel = self.tied.kernel
        self.again, self.again_norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.traced, self.traced_norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.last, self.last_norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.seen(self.block(x))
        x = x + self.seen_norm(x)
        x = self.twin(self.tied_norm(self.tied(x)))
        for _ in range(2):
            x = self.again_norm(self.again(x))
        x = nnx.jit(lambda norm, x: norm(x))(self.traced_norm, self.traced(x))
        return self.last_norm(self.last(x))


@pytest.fixture(scope="module")
def net():
    graphdef, state = nnx.split(nnx.eval_shape(Net))
    return nnx.merge(graphdef, jax.tree.map(lambda v: v / 2, randomized(state)))


X = np.float32(RNG.normal(size=(2, 3, 4)))


def test_nnx_folds_what_the_trace_proves(net):
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net)))
    folded = fold_nnx(net, X)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(net)), before)
    assert not any(isinstance(m, Folded) for _, m in nnx.iter_modules(net))
    found = [p for p, m in nnx.iter_modules(folded) if isinstance(m, Folded)]
    assert sorted(found) == [("block", "layers", 1), ("block", "layers", 3), ("last_norm",)]

    def pure(model):
        graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
        return lambda state, x: nnx.merge(graphdef, state)(x), state

    assert_folded(pure(net), pure(folded), (X,))
    folded.train()
    with pytest.raises(
        ValueError, match="is folded into the layer before it, and was called in tr"
    ):
        folded(X)


@pytest.mark.parametrize(
    "affine, norm, message",
    [
        ("seen", "seen_norm", "the result of 'seen' goes elsewhere than to 'seen_norm' alone"),
        ("last", "seen_norm", "the result of 'last' goes elsewhere than to 'seen_norm' alone"),
        ("tied", "tied_norm", "the kernel of 'tied' is read elsewhere too"),
        ("again", "again_norm", "'again' is called 2 times; expected once"),
        ("traced", "traced_norm", "'traced_norm' is within a transform"),
        (
            "first",
            "last_norm",
            r"'first' is none of the affine layers that were called: \['again',",
        ),
        ("last", "norm", "'norm' is none of the batch normalizations that were called"),
    ],
)
def test_nnx_refuses_what_it_does_not_prove(net, affine, norm, message):
    with pytest.raises(ValueError, match=message):
        fold_nnx(net, X, pairs={"block/layers/0": "block/layers/1", affine: norm})


class Doubled(jax_bn.nnx.BatchNorm):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_nnx_refuses_code_that_would_be_lost():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), Doubled(4, rngs=rngs))
    with pytest.raises(ValueError, match="'layers/1' is of a subclass with a __call__ of its own"):
        fold_nnx(model, np.ones((2, 4), np.float32))


class Scanned(nn.Module):
    """Dense and normalization, in the form that nn.scan asks for."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.BatchNorm(True, name="norm")(nn.Dense(4, name="affine")(x)), None


class Normed(nn.Module):
    """The layer's kernel is not the variable, but that divided by its norm."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True)(nn.WeightNorm(nn.Dense(4))(x))


@pytest.mark.parametrize(
    "model, message",
    [
        (Pair(nn.Dense(4), OURS(False)), "'norm' runs in training; expected evaluation"),
        (Pair(nn.Dense(3), OURS(True, axis=1)), "'norm' has axis=1; expected the last axis of x"),
        (
            Pair(nn.Dense(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), OURS(True)),
            "'affine' has a dot_general of its own",
        ),
        (nn.Sequential([nn.Dense(4), nn.relu, OURS(True)]), r"none of the normal.* \['layers_2'\]"),
        (
            nn.scan(Scanned, variable_axes={True: 0}, split_rngs={"params": True}, length=2)(),
            "none of the normalizations",
        ),
        (Normed(), "is within a transform"),
    ],
    ids=["training", "axis", "dot_general", "not adjacent", "scan", "weight norm"],
)
def test_linen_refuses(model, message):
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    with pytest.raises(ValueError, match=f"cannot fold: .*{message}"):
        fold_linen(model, variables, X)
