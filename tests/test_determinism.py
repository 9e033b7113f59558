"""Two runs give the same bits: forward, gradients, a training; compiled anew, in another process.

On one device. What changes with the number of devices: `devices/test_determinism.py`.
"""

from dataclasses import replace
import hashlib
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bn

pytestmark = pytest.mark.long  # see the Makefile

ROOT = Path(__file__).parents[1]
SHAPE = 32, 32, 32, 8  # large enough for XLA to spread a sum over threads
CASES = {
    "float32": ("float32", False, False),
    "float32, masked, jit": ("float32", True, True),
    "bfloat16, jit": ("bfloat16", False, True),
}


def bits(dtype: str, masked: bool, jit: bool) -> str:
    """A hash of y, the statistics and all gradients, of a function that is traced anew."""
    random = np.random.default_rng(0)
    x, residual = (jnp.asarray(3 + random.normal(size=SHAPE), dtype) for _ in range(2))
    scale, bias = jnp.asarray(random.normal(size=(2, SHAPE[-1])), jnp.float32)
    mask = jnp.asarray(random.uniform(size=SHAPE[:-1]) < 0.7) if masked else None

    def loss(x, scale, bias, residual):
        y, stats = jax_bn.batch_norm(
            x, scale, bias, residual=residual, activation=jax.nn.gelu, mask=mask
        )
        of_statistics = jnp.sum(stats.mean * stats.var)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + of_statistics, (y, stats.mean, stats.var)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    results = (jax.jit(gradient) if jit else gradient)(x, scale, bias, residual)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(results):
        assert jnp.isfinite(leaf).all()
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def in_another_process():
    """All cases of `bits`, by this file run as a program."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case, in_another_process):
    """Twice here, compiled anew each time, and once in a process of its own."""
    first = bits(*CASES[case])
    assert bits(*CASES[case]) == first
    assert in_another_process[case] == first


@jax.numpy_dtype_promotion("standard")  # as Optax needs it
@jax.numpy_rank_promotion("allow")
def test_the_demo_trains_the_same_network_twice(monkeypatch):
    """Losses, parameters, momenta and running averages."""
    import digits
    import optax
    import train_digits

    monkeypatch.setattr(train_digits, "kept_bytes", lambda *_: 0)  # it only traces once more
    _, args = train_digits.options(["--width=2", "--batch-size=64", "--epochs=1"])
    images, _ = digits.load_split(args.seed)
    few = digits.Images(*(a[:512] for a in images))
    batch = digits.Images(*(a[: args.batch_size] for a in few))
    optimizer = optax.sgd(args.learning_rate, momentum=0.9, nesterov=True)
    first = train_digits.create_run(train_digits.LAYERS["jax_bn"], optimizer, batch, args)
    start = first.state
    again = replace(first, losses=[], seconds=[])
    for run in (first, again):  # one after the other, so that each has the machine to itself
        train_digits.train([run], few, args)
    assert len(first.losses) == 8
    assert first.losses[-1] < first.losses[0]
    assert first.losses == again.losses
    for a, b in zip(jax.tree.leaves(first.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    leaves = zip(jax.tree.leaves(start), jax.tree.leaves(first.state), strict=True)
    moved = [np.any(a != b) for a, b in leaves]
    assert np.mean(moved) > 0.9


if __name__ == "__main__":
    print(json.dumps({name: bits(*case) for name, case in CASES.items()}))
