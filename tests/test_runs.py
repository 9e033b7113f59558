"""The examples that train in a folder: interrupted, refused, and really killed."""

import csv
from functools import partial
import importlib
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import kill_and_resume
import matplotlib.image
from models.dcgan import Discriminator
from models.resnet import ResNet
import numpy as np
import pytest
from test_cifar10 import NAMES, batch, python2_pickle

TINY = dict(
    train_resnet=["--width=2", "--batch-size=8", "--epochs=2", "--dtype=bfloat16", "--remat"],
    gan_r1=["--width=2", "--latent=2", "--batch-size=8", "--epochs=1"],
)
QUICK = {"xla_backend_optimization_level": 0}  # to compile


@pytest.fixture
def as_for_users():
    """Optax relies on promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def resnet(monkeypatch) -> Any:
    """The example with one block instead of eight, compiled once: its trainer has no state."""
    example: Any = importlib.import_module("train_resnet")
    monkeypatch.setitem(example.NETWORKS, 18, partial(ResNet, (1,), False))
    new, made = example.Trainer, {}
    monkeypatch.setattr(example, "Trainer", lambda *a, **k: made.setdefault(0, new(*a, **k)))
    return example


@pytest.fixture
def cifar(tmp_path):
    """20 images to train with, 4 to test."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(python2_pickle(*batch(seed)))
    return folder


@pytest.mark.long
def test_resnet_on_cifar10_goes_on_as_if_it_had_never_stopped(
    resnet, cifar, tmp_path, capsys, as_for_users
):
    def train(out, *options):
        data = [f"--data={cifar}", f"--out={tmp_path / out}", "--checkpoint-every=1"]
        resnet.main([*TINY["train_resnet"], *data, *options])
        return (tmp_path / out / "metrics.csv").read_text(), capsys.readouterr().out

    whole, _ = train("whole")
    rows = list(csv.DictReader(whole.splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(0 < float(row["loss"]) < 20 for row in rows)
    assert [bool(row["test_accuracy"]) for row in rows] == [False, True, False, True]  # each epoch
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == sorted(rates, reverse=True) and rates[0] == np.float32(0.05)

    first, _ = train("stopped", "--steps=3")
    assert first == "".join(whole.splitlines(keepends=True)[:4])
    again, said = train("stopped")
    assert again == whole
    assert said.startswith("goes on from step 3\n")
    assert f"test accuracy {float(rows[-1]['test_accuracy']):.1%} of 4 images" in said


def test_augmentation_mirrors_and_moves():
    augment = importlib.import_module("train_resnet").augment
    images = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(200, 0)
    moved = augment(images, np.random.default_rng(0))
    padded = np.pad(images[0], ((4, 4), (4, 4), (0, 0)))
    possible = {
        padded[i : i + 8, j : j + 8][:, ::mirror].tobytes()
        for i in range(9)
        for j in range(9)
        for mirror in (1, -1)
    }
    found = {image.tobytes() for image in moved}
    assert found <= possible and len(found) > 100
    assert augment(images, np.random.default_rng(0)).tobytes() == moved.tobytes()


@pytest.mark.long
def test_penalty_is_a_second_order_gradient_that_agrees_with_flax(as_for_users):
    """Through jax_bn's rule and its derivative, and through plain autodiff of Flax's layer."""
    gan = importlib.import_module("gan_r1")
    images = np.random.default_rng(0).random((6, 8, 8, 1))

    def gradient(layer):
        with jax.enable_x64(True):
            layer = partial(layer, dtype=jnp.float64, param_dtype=jnp.float64)
            model = Discriminator(2, batch_norm=layer, rngs=nnx.Rngs(0))
            graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
            params, stats = jax.tree.map(lambda a: a.astype(jnp.float64), (params, stats))

            def penalty(params):
                return gan.penalty(nnx.merge(graphdef, params, stats), jnp.asarray(images))

            value, grads = jax.jit(jax.value_and_grad(penalty), compiler_options=QUICK)(params)
            return jax.tree.map(np.asarray, (value, nnx.to_pure_dict(grads)))

    ours = gradient(gan.Discriminator.__init__.__kwdefaults__["batch_norm"])
    flax = gradient(partial(nnx.BatchNorm, use_fast_variance=False))
    assert ours[0] > 0 and np.abs(ours[1]["bn3"]["scale"]).max() > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, flax)


@pytest.mark.long
def test_killed_run_loses_nothing(tmp_path, monkeypatch):
    """Twice, at moments drawn; `make kill` does it twenty times, to both examples."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # starts sooner
    lines = kill_and_resume.compare("gan_r1", kills=2, steps=10, seed=2, folder=tmp_path)
    assert len(lines) == 2
    picture = matplotlib.image.imread(tmp_path / "killed" / "images.png")
    assert picture.shape[:2] == (540, 540)
    np.testing.assert_array_equal(
        picture, matplotlib.image.imread(tmp_path / "alone" / "images.png")
    )


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("train_resnet", "--data={tmp}/nowhere", "argument --data: cannot read {tmp}/nowhere/data"),
        ("train_resnet", "--layers=34", "argument --layers: "),
        ("train_resnet", "--dtype=float16", "argument --dtype: "),
        ("train_resnet", "--weight-decay=nan", "argument --weight-decay: 'nan'; expected a number"),
        ("train_resnet", "--batch-size=1439", "argument --batch-size: 1439; expected at most 1438"),
        ("train_resnet", "--out={tmp}/file", "argument --out: cannot write {tmp}/file"),
        ("train_resnet", "--checkpoint-every=0", "argument --checkpoint-every: '0'; expected"),
        ("gan_r1", "--batch-size=1798", "argument --batch-size: 1798; expected at most 1797"),
        ("gan_r1", "--gamma=-1", "argument --gamma: '-1'; expected a finite number > 0"),
        ("train_resnet", "--out={tmp}", "argument --out: {tmp} holds 'file' but no settings.json"),
        ("gan_r1", "--steps=0", "argument --steps: '0'; expected a whole number >= 1"),
    ],
)
def test_bad_option_is_refused_by_name(name, options, expected, tmp_path, capsys):
    example: Any = importlib.import_module(name)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as done:
        example.main([*TINY[name], f"--out={tmp_path}/out", options.format(tmp=tmp_path)])
    assert done.value.code == 2
    assert expected.format(tmp=tmp_path) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", [*TINY, "kill_and_resume"])
def test_help_documents_every_option(name, capsys):
    example: Any = importlib.import_module(name)
    with pytest.raises(SystemExit) as done:
        example.main(["--help"])
    assert done.value.code == 0
    usage, _, shown = capsys.readouterr().out.partition("\n\n")
    options = set(re.findall(r"--[a-z-]+", usage))
    assert len(options) > 2
    for option in options:
        pattern = rf"^  {option}( ([A-Z]+|\{{.*\}}))?\s+\S+ \w+"
        assert re.search(pattern, shown, re.MULTILINE), f"{option} has no words"
