"""The derivation, one test a statement: each row D1 to D15 and D17 against autodiff, in float64.

For one feature x, dy and w are columns of length N; capital letters are N x D. The rows are those
of the comment in `jax_bn/_vjp.py`. What autodiff is asked here never passes through jax_bn's rules,
except where a test says that it checks them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn

N, D, EPS = 7, 3, 1e-2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def X(random):
    return jnp.asarray(3 + 2 * random.normal(size=(N, D)))


@pytest.fixture
def x(X):
    return X[:, 0]


@pytest.fixture
def dy(random):
    return jnp.asarray(random.normal(size=N))


def x_hat(x):
    """The definition, for one column or for each of several."""
    t = x - x.mean(0, keepdims=True)
    return t / jnp.sqrt((t**2).mean(0, keepdims=True) + EPS)


def rstd(x):
    return 1 / jnp.sqrt(x.var() + EPS)


def centring():
    return jnp.eye(N) - jnp.ones((N, N)) / N


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_d1_statistics(X):
    _, stats = jax_bn.batch_norm(X)
    mean = sum(X) / N
    close(stats.mean, mean)
    close(stats.var, sum((row - mean) ** 2 for row in X) / N)


def test_d2_normalized_input(X):
    y, stats = jax_bn.batch_norm(X, epsilon=EPS)
    close(y, (X - stats.mean[None]) / np.sqrt(stats.var[None] + EPS))


def test_d3_scale_and_bias(X, random):
    scale, bias = random.normal(size=(2, D))
    y, _ = jax_bn.batch_norm(X, scale, bias, epsilon=EPS)
    close(y, scale * np.asarray(x_hat(X)) + bias)


def test_d4_gradient_of_the_bias(x, dy):
    close(jax.grad(lambda beta: dy @ (2.0 * x_hat(x) + beta))(0.5), dy.sum())


def test_d5_gradient_of_the_scale(x, dy):
    close(jax.grad(lambda gamma: dy @ (gamma * x_hat(x) + 0.5))(2.0), dy @ x_hat(x))


def test_d6_gradient_of_the_normalized_input(x, dy):
    close(jax.grad(lambda h: dy @ (2.0 * h + 0.5))(x_hat(x)), 2.0 * dy)


def test_d7_product_rule_for_a_scalar_times_a_vector(x, dy):
    def g(t):
        return jnp.sin(t).sum() + t @ t  # any scalar function

    rule = (jnp.outer(jax.grad(g)(x), x) + g(x) * jnp.eye(N)) @ dy
    close(jax.grad(lambda t: dy @ (g(t) * t))(x), rule)


def test_d8_gradient_of_the_scalar(x):
    t = centring() @ x

    def g(t):
        return (t @ t / N + EPS) ** -0.5

    close(g(t) * t, x_hat(x))
    close(jax.grad(g)(t), -(1 / N) * (t @ t / N + EPS) ** -1.5 * t)
    close(jax.grad(g)(t), -(1 / N) * rstd(x) ** 2 * x_hat(x))


def test_d9_centring_is_a_symmetric_projection(x, dy):
    C = centring()
    close(C @ x, x - x.mean())
    close(C, C.T)
    close(C @ C, C)
    close(jax.grad(lambda x: dy @ (x - x.mean()))(x), C @ dy)


def test_d10_two_projections(x, dy):
    h = x_hat(x)
    dx = rstd(x) * centring() @ (jnp.eye(N) - jnp.outer(h, h) / N) @ dy
    close(jax.grad(lambda x: dy @ x_hat(x))(x), dx)


def test_d11_the_projections_add_up(x, dy):
    h, ones = x_hat(x), jnp.ones(N)
    close(ones @ h, 0)
    matrix = N * jnp.eye(N) - jnp.outer(ones, ones) - jnp.outer(h, h)
    close(jax.grad(lambda x: dy @ x_hat(x))(x), rstd(x) / N * matrix @ dy)
    gamma = 1.5
    close(
        jax.grad(lambda x: dy @ (gamma * x_hat(x)))(x),
        gamma * rstd(x) / N * (N * dy - ones * dy.sum() - h * (dy @ h)),
    )


def test_d12_all_features_at_once_and_the_rule(X, random):
    scale, bias = random.normal(size=(2, D))
    dY = random.normal(size=(N, D))
    H = np.asarray(x_hat(X))
    dbias, dscale = dY.sum(0), (dY * H).sum(0)
    dX = (scale / np.sqrt(np.var(X, 0) + EPS) / N) * (N * dY - dbias - H * dscale)

    def plain(X, scale, bias):
        return x_hat(X) * scale[None] + bias[None]

    def ours(X, scale, bias):
        return jax_bn.batch_norm(X, scale, bias, epsilon=EPS)[0]

    for f in (plain, ours):
        _, vjp = jax.vjp(f, X, jnp.asarray(scale), jnp.asarray(bias))
        for actual, expected in zip(vjp(jnp.asarray(dY)), (dX, dscale, dbias), strict=True):
            close(actual, expected)


def test_d13_statistics_in_the_loss(X, random):
    dmean, dvar = random.normal(size=(2, D))

    def plain(X):
        return (dmean * X.mean(0) + dvar * X.var(0)).sum()

    def ours(X):
        _, stats = jax_bn.batch_norm(X)
        return (dmean * stats.mean + dvar * stats.var).sum()

    expected = dmean / N + 2 * dvar * np.asarray(X - X.mean(0, keepdims=True)) / N
    close(jax.grad(plain)(X), expected)
    close(jax.grad(ours)(X), expected)


def test_d14_the_tangent_map_is_the_cotangent_map(x, dy):
    J = jax.jacfwd(x_hat)(x)
    close(J, J.T)
    _, tangent = jax.jvp(x_hat, (x,), (dy,))
    close(tangent, rstd(x) / N * (N * dy - dy.sum() - x_hat(x) * (dy @ x_hat(x))))
    # and the rule's Jacobian is that same symmetric matrix
    close(jax.jacrev(lambda x: jax_bn.batch_norm(x[:, None], epsilon=EPS)[0][:, 0])(x), J)


def test_d15_a_mask_counts_and_sums_over_the_valid(X, random):
    dY = jnp.asarray(random.normal(size=(N, D)))
    valid = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    _, vjp = jax.vjp(x_hat, X[valid])
    (expected,) = vjp(dY[valid])
    _, vjp = jax.vjp(lambda X: jax_bn.batch_norm(X, epsilon=EPS, mask=valid)[0], X)
    (dX,) = vjp(dY)
    close(dX[valid], expected)
    close(dX[~valid], 0)


def test_d17_dx_is_orthogonal_to_constants_and_to_x_hat(x, dy):
    def dx(epsilon):
        def y(x):
            return jax_bn.batch_norm(x[:, None], epsilon=epsilon)[0][:, 0]

        _, vjp = jax.vjp(y, x)
        return vjp(dy)[0], y(x)

    along = []
    for epsilon in (1e-2, 1e-4, 0.0):
        gradient, h = dx(epsilon)
        close(gradient.sum(), 0)
        along.append(abs(float(h @ gradient)))
    # O(eps): a hundredth of eps, a hundredth of the component along x_hat; none without eps
    assert along[0] > 0
    assert along[1] / along[0] == pytest.approx(1e-2, rel=1e-2)
    assert along[2] < 1e-12


def test_d17_shifting_and_scaling_x_changes_nothing(x):
    y, _ = jax_bn.batch_norm(x[:, None], epsilon=0.0)
    for moved in (x + 5, 3 * x):
        close(jax_bn.batch_norm(moved[:, None], epsilon=0.0)[0], y)
