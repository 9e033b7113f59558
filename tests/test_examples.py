"""The examples as a user runs them: what they print, what they write, which options they refuse."""

import importlib
import json
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BATCH = 64


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Three epochs of a small network: the finished process, the path of its plot, its JSON report.

    A process of its own, in the settings of users, with every warning an error.
    """
    folder = tmp_path_factory.mktemp("demo") / "not" / "there" / "yet"
    plot, report = folder / "demo.png", folder / "demo.json"
    options = ["--epochs=3", f"--batch-size={BATCH}", "--width=8", f"--out={plot}"]
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "train_digits.py", *options, f"--json={report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done, plot, json.loads(report.read_text())


def test_table_shows_the_measured_numbers(short_run):
    done, _, report = short_run
    result = report["result"]
    header, line, *rows = done.stdout.splitlines()
    assert header.split() == ["jax_bn", "flax", "jax_bn", "to", "flax"]
    assert set(line) == {"-"}
    cells = {label: rest for label, *rest in (re.split(r"\s{2,}", row.strip()) for row in rows)}

    def memory(key):
        ours, flax = result[key]
        return [f"{ours / 2**20:.2f} MiB", f"{flax / 2**20:.2f} MiB", f"{ours / flax:.2f} x"]

    assert cells == {
        "test accuracy, 359 images": [f"{a:.1%}" for a in result["test_accuracy"]],
        "final loss, mean of the last epoch": [f"{v:.5f}" for v in result["final_loss"]],
        "loss curves, difference at step 1": [f"{result['loss_difference_first_step']:.1e}"],
        "loss curves, largest difference": [f"{result['loss_difference_largest']:.1e}"],
        "flax to flax, use_fast_variance=False": [
            f"{result['loss_difference_largest_flax_to_flax']:.1e}"
        ],
        "time of a step, median of 66 pairs": [f"{result['time_ratio']:.2f} x"],
        "kept by autodiff for the backward pass": memory("kept_bytes"),
        "temporaries of the compiled step": memory("temporary_bytes"),
    }


def test_shows_progress_and_no_other_noise(short_run):
    done, _, _ = short_run
    shown = re.split(r"[\r\n]+", done.stderr.strip())
    assert {line.split(":")[0] for line in shown if line} == {"compiling", "training"}
    assert "66/66" in shown[-1]


def test_both_layers_train_alike(short_run):
    _, _, report = short_run
    result = report["result"]
    assert min(result["test_accuracy"]) > 0.5  # ten classes: a network that learned nothing has 0.1
    # At step 1 the two compute the same function of the same weights, and differ by rounding.
    rounding = np.finfo(np.float32).eps * np.sqrt(BATCH * 8 * 8)
    assert result["loss_difference_first_step"] <= rounding * np.log(10)  # a blind guess's loss
    # Training magnifies rounding, but a wrong gradient parts the curves by the order of the loss. A
    # GPU's convolutions round otherwise in each run.
    apart = 0.05 if jax.default_backend() == "cpu" else 0.1
    assert result["loss_difference_largest"] < apart * min(result["final_loss"])
    assert result["kept_bytes"][0] < result["kept_bytes"][1]


def test_report_says_where_its_numbers_come_from(short_run):
    _, _, report = short_run
    assert report["settings"] == dict(epochs=3, batch_size=64, learning_rate=0.05, width=8, seed=0)
    for name in ("jax", "flax", "jax_bn"):
        assert report[name] == importlib.import_module(name).__version__
    assert report["device"]
    assert report["python"] == sys.version.split()[0]


def test_plot_is_a_picture(short_run):
    _, plot, _ = short_run
    pixels = matplotlib.image.imread(plot)
    height, width, _ = pixels.shape
    assert min(height, width) > 500
    ink = pixels[..., :3].min(-1) < 0.5  # neither white nor the pale grey of the grid
    for half in np.array_split(ink, 2):  # both panels are drawn
        assert 0.005 < half.mean() < 0.5


@pytest.fixture
def train_digits(monkeypatch):
    """The example as a module: refusing an option takes no new process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_digits")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--epochs", "0", "a whole number >= 1"),
        ("--epochs", "two", "a whole number >= 1"),
        ("--batch-size", "0", "a whole number >= 1"),
        ("--batch-size", "1439", "at most 1438"),
        ("--learning-rate", "-0.1", "a finite number > 0"),
        ("--learning-rate", "nan", "a finite number > 0"),
        ("--width", "-1", "a whole number >= 1"),
        ("--seed", "-1", "a whole number >= 0"),
        ("--seed", str(2**31), "below 2**31"),
        ("--out", "{folder}", "Is a directory"),
        ("--out", "{folder}/file/demo.png", "cannot write"),
        ("--json", "{folder}/file/demo.json", "cannot write"),
    ],
)
def test_bad_option_is_refused_by_name(train_digits, tmp_path, capsys, option, value, expected):
    (tmp_path / "file").touch()
    plot = f"--out={tmp_path / 'demo.png'}"
    with pytest.raises(SystemExit) as refused:
        train_digits.main([plot, f"{option}={value.format(folder=tmp_path)}"])
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in error
    assert expected in error


def test_diverging_training_blames_the_learning_rate(train_digits, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(train_digits.LAYERS, "flax with use_fast_variance=False")  # less to compile
    monkeypatch.delitem(train_digits.LAYERS, "flax")
    options = ["--epochs=1", "--batch-size=8", "--width=1", "--learning-rate=1e30"]
    with (
        jax.numpy_dtype_promotion("standard"),  # as for users: optax relies on it
        jax.numpy_rank_promotion("allow"),
        pytest.raises(SystemExit) as refused,
    ):
        train_digits.main([*options, f"--out={tmp_path / 'demo.png'}"])
    assert refused.value.code == 2
    assert "argument --learning-rate: 1e+30; the loss is " in capsys.readouterr().err


def test_help_documents_every_option(train_digits, capsys):
    with pytest.raises(SystemExit) as done:
        train_digits.main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for option in "epochs", "batch-size", "learning-rate", "width", "seed", "out", "json":
        assert re.search(rf"--{option} \w+\s+\w+", shown), f"--{option} has no words"


@pytest.mark.parametrize("name", ["haiku", "equinox"])
def test_layers_for_other_frameworks_train_as_their_own(name, monkeypatch):
    """The same losses, and the same predictions in evaluation."""
    pytest.importorskip(name, reason=f"{name} is not installed: make peers")
    monkeypatch.syspath_prepend(EXAMPLES)
    example: Any = importlib.import_module("other_frameworks")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours, own = example.compare(example.FRAMEWORKS[name][1])
    assert ours.losses[-1] < 0.7 * ours.losses[0]
    for a, b in zip(ours, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_layers_for_other_frameworks_say_what_is_missing(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    example: Any = importlib.import_module("other_frameworks")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="none of the frameworks is here"):
        example.main()
    shown = capsys.readouterr().out
    assert "pip install dm-haiku" in shown and "pip install equinox" in shown
