"""What the tests of both Flax layers share: the contract, judged against Flax and the textbook.

A layer is taken as a pure function, `apply(variables, x, mask, train) -> y, batch_stats`, of
variables as Linen has them: `{"params": {...}, "batch_stats": {"mean": ..., "var": ...}}`.
"""

from collections.abc import Mapping
from functools import partial
import itertools
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_as_accurate, in_float64

from jax_bn import batch_norm, reference

BF16 = jnp.bfloat16


class Case(NamedTuple):
    """A call: what x is, the layer's fields, the mask's shape."""

    shape: tuple[int, ...] = (6, 4)
    dtype: Any = jnp.float32
    fields: Mapping[str, Any] = MappingProxyType({})
    mask: tuple[int, ...] | None = None


class Arrays(NamedTuple):
    """The arguments of `run`: dy is the cotangent of y, the mask an array or None."""

    variables: dict[str, Any]
    x: np.ndarray
    dy: np.ndarray
    mask: Any


# NNX variables keep their dtype: a complex mean loses its imaginary part on the way into a float32
# average, in Flax's layer as in ours, and JAX warns of it.
complex_mean = [
    pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real discards the imaginary"),
]
CASES = {
    "plain": Case(),
    "last axis of four": Case((2, 3, 3, 4), fields=dict(momentum=0.9, epsilon=1e-3)),
    "first axis, no scale": Case((4, 6), fields=dict(axis=-2, use_scale=False)),
    "bfloat16 x": Case(dtype=BF16),
    "bfloat16 y": Case(fields=dict(dtype=BF16)),
    "bfloat16 x, y, params": Case(dtype=BF16, fields=dict(dtype=BF16, param_dtype=BF16)),
    "float16 x, no params": Case(dtype=jnp.float16, fields=dict(use_bias=False, use_scale=False)),
    "integer x": Case(dtype=jnp.int32),
    "complex x": Case(dtype=jnp.complex64),
    "mask over examples": Case(mask=(6, 1)),
    "mask of x's shape, middle axis": Case((3, 4, 5), mask=(3, 4, 5), fields=dict(axis=1)),
    # It would fit the batch axes too, but broadcasts to x as every mask of Flax does.
    "mask over the last axes": Case((4, 4, 4), mask=(4, 4)),
    "single examples under vmap": Case((6, 4), fields=dict(axis_name="i")),
}


class LayerContract:
    """The tests that both layers have to pass. A subclass says what the layers are."""

    ours: type
    flax: type

    def init(self, cls, x, **fields):
        """The variables of a new layer for x."""
        raise NotImplementedError

    def applied(self, cls, **fields):
        """The layer as a pure function."""
        raise NotImplementedError

    @pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=complex_mean if name == "complex x" else ())
            for name, case in CASES.items()
        ],
    )
    def test_numbers_and_gradients_are_those_of_flax(self, case):
        self.assert_same_numbers(case)

    def assert_same_numbers(self, case):
        args = self.arrays(case)
        on_axis = over_vmap if "axis_name" in case.fields else lambda apply: apply
        ours, flax = (
            run(on_axis(self.applied(cls, **case.fields)), *args) for cls in (self.ours, self.flax)
        )
        oracle = in_float64(partial(run, textbook(**case.fields)), *args)
        assert_as_accurate(ours, flax, oracle, examples(args))

    @pytest.mark.parametrize(
        "x_dtype",
        [
            jnp.float32,
            BF16,
            jnp.float16,
            jnp.int32,
            pytest.param(jnp.complex64, marks=complex_mean),
        ],
    )
    def test_dtypes_are_those_of_flax(self, x_dtype):
        def dtypes(cls, train, fields):
            def f(x):
                variables = self.init(cls, x, **fields)
                return variables, self.applied(cls, **fields)(variables, x, None, train)

            with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
                return jax.eval_shape(f, jax.ShapeDtypeStruct((6, 4), x_dtype))

        real = jnp.float32, BF16, jnp.float16
        for dtype, param_dtype, affine, train in itertools.product(
            (None, *([x_dtype] if x_dtype == jnp.complex64 else real)),
            (jnp.float32, BF16),
            (True, False),
            (True, False),
        ):
            fields = dict(dtype=dtype, param_dtype=param_dtype, use_scale=affine, use_bias=affine)
            ours, flax = (dtypes(cls, train, fields) for cls in (self.ours, self.flax))
            assert ours == flax, (fields, train)

    @pytest.mark.parametrize("train", [True, False])
    def test_a_dtype_is_enough_for_strict_promotion(self, train):
        def f(x):
            return self.applied(self.ours, dtype=BF16)(self.init(self.ours, x), x, None, train)

        y, stats = jax.eval_shape(f, jax.ShapeDtypeStruct((6, 4), BF16))
        assert (y.dtype, stats["var"].dtype) == (BF16, jnp.float32)

    def test_a_mask_may_have_any_dtype(self):
        variables, x, _, mask = self.arrays(Case(mask=(6, 1)))
        apply = jax.jit(partial(self.applied(self.ours), train=True))
        for dtype in (np.int32, np.float32):
            chex.assert_trees_all_equal(
                apply(variables, x, mask.astype(dtype)), apply(variables, x, mask)
            )

    def test_a_mask_that_flax_refuses_may_be_over_the_batch_axes(self):
        variables, x, _, mask = self.arrays(Case(mask=(6, 1)))
        apply = jax.jit(partial(self.applied(self.ours), train=True))
        chex.assert_trees_all_equal(apply(variables, x, mask[:, 0]), apply(variables, x, mask))
        with pytest.raises((TypeError, ValueError), match="broadcast"):
            self.applied(self.flax)(variables, x, mask[:, 0], train=True)
        with pytest.raises(ValueError, match=r"mask has shape \(5,\); expected"):
            self.applied(self.ours)(variables, x, mask[:5, 0], train=True)

    def test_virtual_batches(self):
        """Each pair of examples has its own statistics; the averages see the whole batch."""
        variables, x, _, _ = self.arrays(Case())
        scale, bias = variables["params"]["scale"], variables["params"]["bias"]
        apply = jax.jit(partial(self.applied(self.ours, virtual_batch_size=2), train=True))
        y, stats = apply(variables, x, None)
        expected, _ = jax.jit(partial(batch_norm, virtual_batch_size=2))(x, scale, bias)
        chex.assert_trees_all_equal(y, expected)
        _, whole = jax.jit(partial(self.applied(self.ours), train=True))(variables, x, None)
        chex.assert_trees_all_close(stats, whole, rtol=1e-5)
        with pytest.raises(ValueError, match="virtual_batch_size=4 does not divide"):
            self.applied(self.ours, virtual_batch_size=4)(variables, x, None, train=True)

    def test_activation_and_residual(self):
        """Those of the function; evaluated with the running averages too."""
        variables, x, dy, _ = self.arrays(Case())
        params = variables["params"]["scale"], variables["params"]["bias"]
        fused = partial(self.applied(self.ours, activation=jax.nn.relu), residual=dy)
        y, _ = jax.jit(partial(fused, train=True))(variables, x, None)
        expected, _ = jax.jit(partial(batch_norm, residual=dy, activation=jax.nn.relu))(x, *params)
        chex.assert_trees_all_close(y, expected, rtol=1e-6)
        plain = self.applied(self.ours)
        y, _ = jax.jit(partial(fused, train=False))(variables, x, None)
        expected = jax.nn.relu(plain(variables, x, None, train=False)[0] + dy)
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)

    def test_forward_mode(self):
        variables, x, dx, _ = self.arrays(Case())

        def along(**fields):
            apply = self.applied(self.ours, **fields)
            return jax.jvp(lambda x: apply(variables, x, None, train=True), (x,), (dx,))

        (y, _), (dy, dstats) = jax.jit(partial(along, forward_mode=True))()
        assert np.abs(dy).max() > 0 and jax.tree.structure(dstats)

        def textbook(x):
            params = variables["params"]
            return reference.batch_norm(x, params["scale"], params["bias"])[0]

        expected = jax.jit(lambda: jax.jvp(textbook, (x,), (dx,)))()
        chex.assert_trees_all_close((y, dy), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(TypeError, match="forward-mode"):
            along()

    def test_nan_under_a_mask_reaches_nothing_else(self):
        args = self.arrays(Case(mask=(6, 4)))
        args = args._replace(dy=self.arrays(Case()).dy)  # not 0 where masked
        clean, nan = (
            run(self.applied(self.ours), *args._replace(x=np.where(args.mask, args.x, hidden)))
            for hidden in (np.float32(0), np.float32(np.nan))
        )
        for result in (clean, nan):
            result["training"]["y"] = np.where(args.mask, result["training"]["y"], 0)
        chex.assert_tree_all_finite(nan["training"])
        chex.assert_trees_all_equal(nan["training"], clean["training"])

    def test_a_feature_that_is_all_masked_keeps_its_averages(self):
        args = self.arrays(Case(mask=(6, 4)))
        args.mask[:, 0] = False
        old = args.variables["batch_stats"]
        ours, flax = (run(self.applied(cls), *args)["training"] for cls in (self.ours, self.flax))
        chex.assert_tree_all_finite(ours)
        for name, new in ours["batch_stats"].items():
            assert new[0] == old[name][0] and (new[1:] != old[name][1:]).all()
            assert np.isnan(flax["batch_stats"][name][0])

    def test_devices_are_weighed_by_their_valid_examples(self):
        args = self.arrays(Case((3, 2, 4), mask=(3, 2, 1)))
        assert len(set(args.mask.sum((1, 2)))) > 1
        ours, flax = (
            run(over_vmap(self.applied(cls, axis_name="i")), *args)
            for cls in (self.ours, self.flax)
        )
        assert_better(ours, flax, *judges(args), examples(args))

    def test_variance_is_stable_far_from_zero(self):
        args = self.arrays(Case((256, 4)))
        args = args._replace(x=np.float32(1e4) + args.x)
        fast, slow = (
            run(self.applied(self.ours, momentum=0.0, use_fast_variance=fast), *args)
            for fast in (True, False)
        )
        chex.assert_trees_all_equal(fast, slow)
        flax = run(self.applied(self.flax, momentum=0.0), *args)
        assert_better(fast, flax, *judges(args, momentum=0.0), examples(args))

    def arrays(self, case) -> Arrays:
        """The arrays of `case`.

        dy is exact in bfloat16, so that no cast of it counts as an error, and 0 where masked: there
        our y is a constant to differentiation, and Flax's is not.
        """
        rng = np.random.default_rng(0)
        x, dy = 3 + 2 * rng.normal(size=case.shape), rng.normal(size=case.shape)
        dy = dy.astype(BF16).astype(np.float32)
        if np.issubdtype(case.dtype, np.complexfloating):
            x, dy = x + 1j * rng.normal(size=case.shape), (dy + 1j * dy[::-1]).astype(np.complex64)
        mask = None if case.mask is None else np.indices(case.mask).sum(0) % 3 != 0
        dy = dy if mask is None else dy * mask
        x = np.asarray(x, case.dtype)
        fields = {k: v for k, v in case.fields.items() if k != "axis_name"}
        variables = jax.tree.map(
            lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype),
            jax.eval_shape(lambda x: self.init(self.ours, x, **fields), x),
        )
        return Arrays(variables, x, dy, mask)


def run(apply, variables, x, dy, mask):
    """y, the updated statistics and all gradients, in training and in evaluation."""

    def one(train, variables, x, dy, mask):
        def loss(variables, x):
            y, stats = apply(variables, x, mask, train)
            return jnp.real(jnp.sum(y.astype(dy.dtype) * dy)), (y, stats)

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
        grads, (y, stats) = jax.grad(loss, argnums, has_aux=True)(variables, x)
        return {"y": y, "batch_stats": stats, "grads": grads}

    def both(*args):
        return {"training": one(True, *args), "evaluation": one(False, *args)}

    with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes
        return jax.jit(both)(variables, x, dy, mask)


def over_vmap(apply):
    """`apply` with the leading axis of x as the mapped axis "i"."""

    def mapped(variables, x, mask, train):
        in_axes = None, 0, None if mask is None else 0
        f = jax.vmap(partial(apply, train=train), in_axes, out_axes=(0, None), axis_name="i")
        return f(variables, x, mask)

    return mapped


def textbook(axis=-1, momentum=0.99, epsilon=1e-5, **_):
    """The layer by its definition; the axis that `over_vmap` maps is one more batch axis."""

    def apply(variables, x, mask, train):
        params, old = variables.get("params", {}), variables["batch_stats"]
        scale, bias = params.get("scale"), params.get("bias")
        x = x.astype(jnp.promote_types(x.dtype, old["var"].dtype))
        if train:
            mask = None if mask is None else jnp.broadcast_to(mask, x.shape)
            y, (mean, var, _) = reference.batch_norm(
                x, scale, bias, axis=axis, epsilon=epsilon, mask=mask
            )
            batch = {"mean": mean, "var": var}
            return y, {k: momentum * old[k] + (1 - momentum) * batch[k] for k in old}
        features = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
        reduced = tuple(a for a in range(x.ndim) if a not in features)
        wide = partial(jnp.expand_dims, axis=reduced)
        y = (x - wide(old["mean"])) / jnp.sqrt(wide(old["var"]) + epsilon)
        y = y if scale is None else y * wide(scale)
        return y if bias is None else y + wide(bias), old

    return apply


def examples(args: Arrays) -> int:
    """How many examples of each feature x holds."""
    return args.x.size // args.variables["batch_stats"]["mean"].size


def judges(args: Arrays, **fields):
    """The results of `run` for the definition, in the working precision and in float64."""
    definition = partial(run, textbook(**fields))
    return definition(*args), in_float64(definition, *args)


def assert_better(ours, flax, definition, oracle, examples):
    """Asserts that `ours` is as accurate as the definition, and that `flax` is not."""
    assert_as_accurate(ours, definition, oracle, examples)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_as_accurate(flax, definition, oracle, examples)


def assert_agree(f, ours, flax, *args):
    """Asserts that f(ours, *args) is as accurate as f(flax, *args), beside Flax in float64.

    The last argument is x, with the features last.
    """
    result = jax.jit(f, static_argnums=0)
    with jax.numpy_dtype_promotion("standard"):  # statistics stay float32 in float64 NNX
        oracle = in_float64(partial(result, flax), *args)
    x = args[-1]
    assert_as_accurate(result(ours, *args), result(flax, *args), oracle, x.size // x.shape[-1])
