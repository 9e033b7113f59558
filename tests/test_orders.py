"""Derivatives of first, second and third order, in every nesting of the two modes, in float64.

Of one number: a loss that uses y and both statistics, along a line through all arguments. Its n-th
derivative on the line takes every n-th derivative of the function, and is one number to compare.
"""

from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn

VALID = np.array([1, 1, 0, 1, 1, 0, 1], bool)
NESTINGS = ["".join(n) for order in (1, 2, 3) for n in product("fr", repeat=order)]
CASES = {
    "plain": {},
    "masked": dict(mask=VALID),
    "relu": dict(activation=jax.nn.relu),
    "residual": dict(residual=True),
    "residual and relu": dict(residual=True, activation=jax.nn.relu),
    "residual, silu and mask": dict(residual=True, activation=jax.nn.silu, mask=VALID),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arguments(residual=False, **_):
    """x, scale, bias, the residual or None; and a direction in which all of them move."""
    random = np.random.default_rng(0)

    def point():
        x, scale, bias = (random.normal(size=s) for s in ((7, 3), 3, 3))
        return 3 + 2 * x, scale, bias, random.normal(size=(7, 3)) if residual else None

    return point(), point()


def loss(batch_norm, args, mask=None, activation=None, **options):
    x, scale, bias, residual = args
    if batch_norm is jax_bn.reference.batch_norm and mask is not None:
        mask = mask[:, None]
    y, stats = batch_norm(
        x, scale, bias, mask=mask, residual=residual, activation=activation, **options
    )
    mean, var, _ = jax.tree.leaves(stats)
    return jnp.sum(jnp.sin(y) * jnp.cos(x)) + jnp.sum(mean**2 * var)


def forward(f):
    return lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


MODE = {"f": forward, "r": jax.grad}


def along_the_line(nesting, batch_norm, case, **options):
    """d/dt, as often as `nesting` has letters, of loss(point + t*direction) at two t, under vmap.

    The derivative that is taken last stands first, as in "forward over reverse".
    """
    point, direction = arguments(**case)
    masked_or_activated = {k: v for k, v in case.items() if k != "residual"}

    def f(t):
        args = jax.tree.map(lambda p, d: p + t * d, point, direction)
        return loss(batch_norm, args, **masked_or_activated, **options)

    for mode in reversed(nesting):
        f = MODE[mode](f)
    return jax.jit(jax.vmap(f))(jnp.array([0.3, -0.2]))


def definition(nesting, case):
    return along_the_line("f" * (len(nesting) - 1) + "r", jax_bn.reference.batch_norm, case)


ALL_AT_ONCE = "residual, silu and mask"
SECOND, THIRD = ["r", "rr", "fr"], ["rrr", "ffr", "rfr", "frr"]


OF_THIRD_ORDER = [pytest.param(*p, marks=pytest.mark.long) for p in product(THIRD, [ALL_AT_ONCE])]


@pytest.mark.parametrize("nesting, case", [*product(SECOND, CASES), *OF_THIRD_ORDER])
def test_every_order_of_the_default_rule(nesting, case):
    """The innermost derivative is reverse, as the default has it."""
    actual = along_the_line(nesting, jax_bn.batch_norm, CASES[case])
    np.testing.assert_allclose(actual, definition(nesting, CASES[case]), rtol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_of_forward_mode(nesting):
    case = CASES[ALL_AT_ONCE]
    actual = along_the_line(nesting, jax_bn.batch_norm, case, forward_mode=True)
    np.testing.assert_allclose(actual, definition(nesting, case), rtol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("case", ["residual and relu", ALL_AT_ONCE])
def test_whole_hessians(case, forward_mode):
    """Every entry, and under vmap, which `jax.hessian` uses; all nestings that the rule allows."""
    options = {k: v for k, v in CASES[case].items() if k != "residual"}
    args, _ = arguments(**CASES[case])

    def of(batch_norm, outer, inner, **more):
        return jax.jit(outer(inner(partial(loss, batch_norm, **options, **more))))(args)

    expected = of(jax_bn.reference.batch_norm, jax.jacfwd, jax.jacrev)
    for inner in (jax.jacrev, jax.jacfwd) if forward_mode else (jax.jacrev,):
        for outer in (jax.jacfwd, jax.jacrev):
            actual = of(jax_bn.batch_norm, outer, inner, forward_mode=forward_mode)
            chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---- whole programs ------------------------------------------------------------------------------


def network(batch_norm, params, x):
    """Two layers, the second normalized with a fused activation. :: [N, 3] -> [N]"""
    first, second, scale, bias = params
    h = jnp.tanh(batch_norm(x @ first)[0])
    h, _ = batch_norm(h @ second, scale, bias, activation=jax.nn.leaky_relu)
    return h.sum(-1)


def weights():
    random = np.random.default_rng(1)
    params = tuple(random.normal(size=s) for s in ((3, 5), (5, 4), 4, 4))
    return params, random.normal(size=(2, 6, 3))


def assert_same_gradient(objective):
    params, data = weights()
    ours, expected = (
        jax.jit(jax.value_and_grad(partial(objective, batch_norm)))(params, *data)
        for batch_norm in (jax_bn.batch_norm, jax_bn.reference.batch_norm)
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert all(np.abs(g).max() > 0 for g in ours[1])


def test_gradient_penalty():
    """R1 on the real data, and WGAN-GP between real and generated data, in one loss."""

    def objective(batch_norm, params, real, generated):
        critic = partial(network, batch_norm, params)

        def slopes(x):
            return jnp.sum(jax.grad(lambda x: critic(x).sum())(x) ** 2, -1)

        between = (real + generated) / 2
        gradient_penalty = jnp.mean((jnp.sqrt(slopes(between) + 1e-12) - 1) ** 2)
        r1 = jnp.mean(slopes(real)) / 2
        return jnp.mean(critic(generated) - critic(real)) + r1 + 10 * gradient_penalty

    assert_same_gradient(objective)


@pytest.mark.long
def test_maml():
    """The gradient of a loss after two inner steps of gradient descent."""

    def objective(batch_norm, params, support, query):
        def task(params, x):
            return jnp.mean((network(batch_norm, params, x) - x[:, 0]) ** 2)

        def inner_step(params, _):
            gradient = jax.grad(task)(params, support)
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), None

        adapted, _ = jax.lax.scan(inner_step, params, length=2)
        return task(adapted, query)

    assert_same_gradient(objective)
