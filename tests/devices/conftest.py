"""Eight devices: those of the accelerator if there are as many, else of the CPU."""

import jax
import pytest

DEVICES = 8
jax.config.update("jax_num_cpu_devices", DEVICES)


@pytest.fixture(scope="session")
def devices():
    here = jax.devices() if jax.device_count() >= DEVICES else jax.devices("cpu")
    if len(here) < DEVICES:
        pytest.fail(
            f"{len(here)} devices, {DEVICES} needed: JAX had started before they could be "
            "asked for. Run `pytest tests/devices` in a process of its own"
        )
    with jax.default_device(here[0]):
        yield here[:DEVICES]
