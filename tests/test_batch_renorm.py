"""`batch_renorm` and its layers, judged by the paper's algorithm as it is written."""

from functools import partial
import math
from typing import Any

import chex
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from benchmarks.compiled import residual_bytes
import jax_bn
import jax_bn.linen
import jax_bn.nnx

EPSILON = 1e-3


def algorithm(x, mean, var, scale, bias, *, r_max, d_max, mask=None):
    """Algorithm 1 of Ioffe 2017 for x [N, C], by plain autodiff. -> y, the batch's mean and var"""
    valid = jnp.ones(x.shape, bool) if mask is None else mask
    n = jnp.sum(valid, 0, keepdims=True).astype(x.dtype)
    mean_b = jnp.sum(jnp.where(valid, x, 0), 0, keepdims=True) / n
    var_b = jnp.sum(jnp.where(valid, (x - mean_b) ** 2, 0), 0, keepdims=True) / n
    std_b, std = jnp.sqrt(var_b + EPSILON), jnp.sqrt(var[None] + EPSILON)
    r = lax.stop_gradient(jnp.clip(std_b / std, 1 / r_max, r_max))
    d = lax.stop_gradient(jnp.clip((mean_b - mean[None]) / std, -d_max, d_max))
    y = scale[None] * ((x - mean_b) / std_b * r + d) + bias[None]
    return jnp.where(valid, y, lax.stop_gradient(y)), (mean_b[0], var_b[0])


def renorm(*args, **options):
    y, stats = jax_bn.batch_renorm(*args, epsilon=EPSILON, **options)
    return y, (stats.mean, stats.var)


def results(f, x, dy, *args):
    """y, the statistics, the gradients of all arrays, and of a slope in x that of x."""

    def loss(x, args):
        y, stats = f(x, *args)
        return jnp.sum(jnp.sin(y) * dy), (y, stats)

    def slope(x):
        return jnp.sum(jax.grad(loss, has_aux=True)(x, args)[0] * dy)

    return jax.grad(loss, (0, 1), has_aux=True)(x, args), jax.grad(slope)(x)


@pytest.fixture
def args():
    """x, dy, mean, var, scale, bias: each bound is reached in some feature, none in the first."""
    rng = np.random.default_rng(0)
    x, dy = 3 + 2 * rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
    mean = np.array([2.5, -9, 30, 3, 3])  # d about 0, far above, far below
    var = np.array([3, 4, 4, 0.1, 90])  # r about 1, far above, far below
    scale, bias = rng.normal(size=(2, 5))
    return tuple(np.float32(v) for v in (x, dy, mean, var, scale, bias))


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_the_algorithms(args, masked):
    mask = np.indices(args[0].shape).sum(0) % 3 != 0 if masked else None
    options = dict(r_max=2.0, d_max=1.5, mask=mask)
    ours, expected = (jax.jit(partial(results, partial(f, **options))) for f in (renorm, algorithm))
    oracle = in_float64(expected, *args)
    assert_as_accurate(ours(*args), expected(*args), oracle, args[0].size)
    (_, (mean, var, scale, bias)), _ = oracle[0]
    assert not mean.any() and not var.any()
    assert scale.all() and bias.all()


def test_within_bounds_it_is_evaluation_with_gradients_of_training(args):
    x, dy, mean, var, scale, bias = args
    fused: dict[str, Any] = dict(activation=jax.nn.relu, residual=dy)
    no_bounds: dict[str, Any] = dict(r_max=math.inf, d_max=math.inf)

    @jax.jit
    def ours(x):
        def f(x):
            return jax_bn.batch_renorm(x, mean, var, scale, bias, **fused, **no_bounds)[0]

        y, pullback = jax.vjp(f, x)
        return y, pullback(dy)

    @jax.jit
    def parts(x):
        y = jax_bn.normalize(x, mean, var, scale, bias, **fused)
        r = jnp.sqrt((jax_bn.batch_norm(x)[1].var + 1e-5) / (var + 1e-5))
        _, pullback = jax.vjp(lambda x: jax_bn.batch_norm(x, scale * r)[0], x)
        return y, pullback(jnp.where(y > 0, dy, 0))

    chex.assert_trees_all_close(ours(x), parts(x), rtol=1e-4, atol=1e-5)


def test_with_bounds_of_1_and_0_it_is_batch_norm(args):
    x, dy, mean, var, scale, bias = args

    def ours(x, scale, bias):
        return jax_bn.batch_renorm(x, mean, var, scale, bias, r_max=1, d_max=0)

    def step(f):
        y, pullback, stats = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, stats.mean, stats.var, pullback(dy)

    results = (jax.jit(partial(step, f))() for f in (ours, jax_bn.batch_norm))
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-6)


def test_mapped_axes_and_virtual_batches(args):
    """Over an axis r and d are those of all; in virtual batches each has its own."""
    x, _, *others = args
    f = partial(jax_bn.batch_renorm, r_max=2.0, d_max=1.5)
    pairs = x.reshape(4, 2, 5)

    @jax.jit
    def run():
        mapped = jax.vmap(lambda x: f(x, *others, axis_name="i")[0], axis_name="i")(pairs)
        whole = f(x, *others)
        ghosts = f(x, *others, virtual_batch_size=2)
        alone = jax.vmap(lambda x: f(x, *others)[0])(pairs)
        return (mapped, ghosts), (whole[0].reshape(pairs.shape), (alone.reshape(x.shape), whole[1]))

    actual, expected = run()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(actual[0].reshape(x.shape) - actual[1][0]).max() > 0.1


def test_it_keeps_and_computes_no_more_than_batch_norm():
    x, v = jax.ShapeDtypeStruct((4096, 8), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.float32)

    def ours(x, mean, var, scale, bias):
        return jax_bn.batch_renorm(x, mean, var, scale, bias)[0]

    def plain(x, mean, var, scale, bias):
        return jax_bn.batch_norm(x, scale, bias)[0]

    assert residual_bytes(ours, x, v, v, v, v) <= 1.01 * x.size * x.dtype.itemsize

    def per_entry(f, wrap):
        f = wrap(f)

        def loss(*args):
            return jnp.sum(jnp.sin(f(*args).astype(jnp.float32)))

        cost = jax.jit(jax.grad(loss, (0, 3, 4))).lower(x, v, v, v, v).compile().cost_analysis()
        assert cost is not None
        return round(cost["flops"] / x.size, 1), round(cost["bytes accessed"] / x.size)

    remat = partial(jax.checkpoint, policy=jax_bn.remat_policy)
    for wrap in (lambda f: f, remat):
        assert per_entry(ours, wrap) == per_entry(plain, wrap)


def test_forward_mode(args):
    x, dx, mean, var, scale, bias = args
    primals, tangents = (x, mean, var, scale, bias), (dx, mean, var, bias, scale)
    options = dict(r_max=2.0, d_max=1.5)
    actual, expected = (
        jax.jit(lambda *args, f=f: jax.jvp(lambda *args: f(*args)[0], *args))
        for f in (partial(renorm, forward_mode=True, **options), partial(algorithm, **options))
    )
    oracle = in_float64(expected, primals, tangents)
    assert_as_accurate(actual(primals, tangents), expected(primals, tangents), oracle, len(x))


def test_extremes():
    """One example; a feature without any; complex x, whose d is bounded in magnitude."""
    mean, var = jnp.array([2.0, 2.0]), jnp.array([4.0, 4.0])
    f = partial(jax_bn.batch_renorm, mean=mean, var=var, epsilon=0.0)
    x, bias = jnp.array([[6.0, 7.0]]), jnp.array([0.5, 0.5])

    def loss(x):
        y, stats = f(x, bias=bias, mask=jnp.array([[True, False]]), r_max=2, epsilon=1.0)
        return jnp.sum(y), (y, stats.count)

    dx, (y, count) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert not dx.any() and count.tolist() == [1, 0]
    chex.assert_trees_all_close(y[0], jnp.array([4 / np.sqrt(5) + 0.5, 0.5]), rtol=1e-6)

    z = jnp.array([[8 + 8j, 2], [8 + 10j, 4]])  # d = 3 + 4.5j and 0.5, r = 0.5
    y, _ = jax.jit(partial(f, r_max=math.inf, d_max=1.0))(z)
    d = (3 + 4.5j) / abs(3 + 4.5j)
    chex.assert_trees_all_close(y, jnp.array([[d - 0.5j, 0], [d + 0.5j, 1]]), atol=1e-6)


def test_dtypes_are_those_of_batch_norm():
    def dtypes(x, v):
        y, stats = jax_bn.batch_renorm(x, v, v, r_max=v[0], d_max=2)
        return y.dtype, stats.mean.dtype, stats.var.dtype

    x, v = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.float32)
    assert jax.tree.leaves(dtypes_of(dtypes, x, v)) == [jnp.bfloat16, jnp.float32, jnp.float32]
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct((3,), jnp.float64)
        assert dtypes_of(dtypes, x, wide) == [jnp.bfloat16, jnp.float64, jnp.float64]


def dtypes_of(f, *shapes):
    found = []
    jax.eval_shape(lambda *args: found.extend(f(*args)), *shapes)
    return found


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(r_max=0.5), ValueError, r"r_max=0.5; expected a number >= 1"),
        (dict(r_max=math.nan), ValueError, r"r_max=nan; expected"),
        (dict(d_max=-1), ValueError, r"d_max=-1; expected a number >= 0"),
        (dict(d_max=np.ones(4)), TypeError, r"d_max=array.*; expected one real number"),
        (dict(r_max="3"), TypeError, r"r_max='3'; expected one real number"),
        (dict(r_max=2j), TypeError, r"r_max=2j; expected one real number"),
        (dict(mean=np.zeros(3)), ValueError, r"mean has shape \(3,\); expected \(4,\)"),
        (dict(var=None), TypeError, r"mean or var is None"),
        (dict(var=np.ones(4, complex)), TypeError, r"a variance is real"),
        (dict(epsilon=-1), ValueError, r"epsilon=-1; expected"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    good = dict(x=np.ones((2, 4)), mean=np.zeros(4), var=np.ones(4))
    with pytest.raises(error, match=message):
        jax_bn.batch_renorm(**(good | wrong))


# ---- the layers ----------------------------------------------------------------------------------


def linen(**fields):
    """The state of a new layer, and a function :: state, x, train -> y, state."""
    layer = jax_bn.linen.BatchRenorm(momentum=0.5, **fields)

    def apply(state, x, train):
        y, updated = layer.apply(state, x, use_running_average=not train, mutable="batch_stats")
        return y, {**state, **updated}

    # As models are: initialized in evaluation.
    return layer.init(jax.random.key(0), jnp.ones((2, 5)), use_running_average=True), apply


def in_nnx(**fields):
    layer = jax_bn.nnx.BatchRenorm(5, momentum=0.5, rngs=nnx.Rngs(0), **fields)
    graphdef, state = nnx.split(layer)

    def apply(state, x, train):
        layer = nnx.merge(graphdef, state)
        y = layer(x, use_running_average=not train)
        return y, nnx.state(layer)

    return state, apply


def stats_of(state):
    stats = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state["batch_stats"]
    return stats["mean"], stats["var"], stats["steps"]


@pytest.mark.parametrize("new", [linen, in_nnx])
def test_layers_warm_up_and_then_follow_their_schedules(new, args):
    x = args[0]

    def r_max(steps):
        return 1 + 0.1 * steps.astype(jnp.float32)

    state, apply = new(warmup_steps=2, r_max=r_max, d_max=0.25)
    step = jax.jit(chex.assert_max_traces(apply, n=1), static_argnums=2)
    mean, var = jnp.zeros(5), jnp.ones(5)
    for i in range(4):
        batch = x * (i + 1)
        bounds = dict(r_max=1, d_max=0) if i < 2 else dict(r_max=1 + 0.1 * i, d_max=0.25)
        expected, stats = jax.jit(jax_bn.batch_renorm)(batch, mean, var, **bounds)
        y, state = step(state, batch, True)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)
        mean, var = jax_bn.update_running_stats(mean, var, stats, momentum=0.5)
        chex.assert_trees_all_close(stats_of(state), (mean, var, jnp.int32(i + 1)), rtol=1e-6)

    y, after = jax.jit(apply, static_argnums=2)(state, x, False)
    chex.assert_trees_all_equal(stats_of(after), stats_of(state))
    chex.assert_trees_all_close(y, jax_bn.normalize(x, mean, var), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [linen, in_nnx])
def test_layers_refuse(new):
    for wrong, message in (
        (dict(r_max=0.5), "r_max=0.5"),
        (dict(warmup_steps=-1), "warmup_steps=-1; expected an int from 0"),
        (dict(warmup_steps=2**31), r"warmup_steps=2147483648; expected .* to 2\*\*31 - 1"),
    ):
        state, apply = new(**wrong)
        with pytest.raises(ValueError, match=message):
            apply(state, jnp.ones((2, 5)), True)
    state, apply = new(warmup_steps=1.5)
    with pytest.raises(TypeError, match=r"warmup_steps=1.5; expected an int"):
        apply(state, jnp.ones((2, 5)), True)


def test_variables_of_batch_norm_are_taken_as_not_warmed_up(args):
    """In Linen, where they are a tree apart. Steps do not overflow back into the warm-up."""
    x = args[0]
    old = jax_bn.linen.BatchNorm(use_running_average=False)
    new = jax_bn.linen.BatchRenorm(use_running_average=False)
    variables = old.init(jax.random.key(0), x)
    y, _ = old.apply(variables, x, mutable="batch_stats")
    same, updated = new.apply(variables, x, mutable="batch_stats")
    chex.assert_trees_all_close(y, same, rtol=1e-6)
    assert updated["batch_stats"]["steps"] == 1
    evaluated = new.clone(use_running_average=True).apply(variables, x)
    chex.assert_trees_all_close(evaluated, x / np.sqrt(1 + 1e-5), rtol=1e-5)

    most = jnp.iinfo(jnp.int32).max
    variables["batch_stats"]["steps"] = jnp.int32(most)
    _, updated = new.apply(variables, x, mutable="batch_stats")
    assert updated["batch_stats"]["steps"] == most
