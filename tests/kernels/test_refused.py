"""What the kernels do not run is refused, by name and with the way out; nothing runs instead."""

from types import SimpleNamespace
from typing import Any

from flax.nnx import Rngs
import jax
import jax.numpy as jnp
import pytest

from jax_bn import _implementation, batch_norm
import jax_bn.linen
import jax_bn.nnx

X = jnp.ones((64, 256))
OPTIONS: Any = dict(implementation="mosaic_gpu")
OLD = jax.__version_info__ < _implementation.OLDEST_JAX


def test_unknown_names():
    with pytest.raises(ValueError, match="implementation='cuda'; expected None or one of"):
        batch_norm(X, implementation="cuda")


def test_the_default_is_xla():
    def program(name):
        return str(jax.make_jaxpr(lambda x: batch_norm(x, implementation=name))(X))

    assert program(None) == program("xla")


@pytest.mark.skipif(not OLD, reason="this jax has what the kernels need")
def test_an_old_jax_is_refused():
    with pytest.raises(NotImplementedError, match=f"jax is {jax.__version__}; expected 0.11"):
        batch_norm(X, **OPTIONS)


@pytest.mark.skipif(OLD, reason=f"jax is {jax.__version__}: refused for that")
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(NotImplementedError, match="the device is a cpu; expected an NVIDIA GPU"):
        batch_norm(X, **OPTIONS)


@pytest.mark.skipif(OLD, reason=f"jax is {jax.__version__}: refused for that")
@pytest.mark.parametrize(
    "device, found",
    [
        (SimpleNamespace(compute_capability="8.0"), "8.0"),
        (SimpleNamespace(compute_capability="gfx942"), "gfx942"),
        (SimpleNamespace(), "none"),
    ],
    ids=["Ampere", "AMD", "unknown"],
)
def test_another_gpu(device, found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(NotImplementedError, match=f"capability {found}; expected 9.0 .Hopper"):
        batch_norm(X, **OPTIONS)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (X, dict(mask=jnp.ones(64, bool)), "mask is given; expected None"),
        (X, dict(axis=0), r"are \(1,\); expected all but the last"),
        (X, dict(dtype=jnp.bfloat16), "dtypes .*'float32', 'bfloat16'"),
        (X, dict(residual=X.astype(jnp.float16)), "'float16'.*expected one of"),
        (X, dict(activation=jax.nn.gelu), "expected jax.nn.relu"),
        (X.astype(complex), {}, "complex64"),
        (jnp.ones((2, 8193)), {}, "2 examples of 8193 features; expected at most 8192 features"),
        (jnp.ones((63, 3)), {}, "63 examples of 3 features; .* elements divisible by 4: 16 bytes"),
        (jnp.ones((9, 4), jnp.bfloat16), {}, "a number of elements divisible by 8: 16 bytes"),
    ],
)
def test_refused(x, options, message, hopper):
    with hopper(), pytest.raises(NotImplementedError, match=message):
        batch_norm(x, **OPTIONS, **options)


def test_layers_pass_it_on(hopper):
    masked: Any = dict(mask=jnp.ones(64, bool))
    linen = jax_bn.linen.BatchNorm(use_running_average=False, **OPTIONS)
    variables = linen.init(jax.random.key(0), X)
    nnx = jax_bn.nnx.BatchNorm(256, rngs=Rngs(0), **OPTIONS)
    with hopper():
        with pytest.raises(NotImplementedError, match="mask is given"):
            linen.apply(variables, X, mutable="batch_stats", **masked)
        with pytest.raises(NotImplementedError, match="mask is given"):
            nnx(X, **masked)


def test_a_program_for_several_devices(hopper):
    """The compiler cannot partition a kernel; lowered for two devices, abstract ones."""
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=spread)
    with hopper(), pytest.raises(NotImplementedError, match=r"over 2 devices\. Call .* shard_map"):
        f = jax.jit(lambda x: batch_norm(x, **OPTIONS)[0])
        f.trace(x).lower(lowering_platforms=("cpu",))
