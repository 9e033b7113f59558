"""`examples/data_parallel.py` on several processes: what it computes, and how it ends.

The loss curve of several processes is judged as any other array: against the same training in
float64, by what one device in float32 makes of it, step by step.
"""

import contextlib
import importlib
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import pytest
from tolerance import assert_as_accurate, in_float64

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BATCH, STEPS, ENDLESS = 30, 6, 2**31 - 1
# The rate is small: where rounding decides the side of a relu, the next losses hardly show it.
NETWORK = [f"--batch-size={BATCH}", "--width=2", "--learning-rate=0.001"]
SOON = 30  # seconds; much, for a machine that has other work


@pytest.fixture(scope="module")
def data_parallel():
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("data_parallel")


@contextlib.contextmanager
def ended_at_last():
    """A list for processes: those that a test leaves running are killed."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the example as a user does, with none of this process's settings of JAX."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",  # of each process
        "PYTHONWARNINGS": "error",
        # Most of the time goes into compiling, and some of that is for all tests the same.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(*options):
        command = [sys.executable, str(EXAMPLES / "data_parallel.py"), *options]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    with ended_at_last() as started:
        yield start


@pytest.fixture(scope="module")
def expected(data_parallel, devices):
    """The loss of every step on one device, in float32 and in float64."""
    _, args = data_parallel.options([*NETWORK, f"--steps={STEPS}"])
    images, _ = data_parallel.digits.load_split(args.seed)
    mesh = jax.make_mesh((1,), (data_parallel.DATA,), (AxisType.Auto,), devices=devices[:1])

    def curve(state, data):
        _, losses = data_parallel.train(trainer, state, data, args, mesh)
        return [jnp.asarray(loss) for loss in losses]

    # As for users: optax relies on it.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trainer, state = data_parallel.create(args)
        return curve(state, images), in_float64(curve, state, images)


EVEN = pytest.param([], id="even", marks=pytest.mark.long)
UNEVEN = pytest.param(["--uneven"], id="uneven")


@pytest.mark.parametrize("shares", [EVEN, UNEVEN])
def test_two_processes_train_as_one(start, expected, tmp_path, shares):
    path = tmp_path / "losses.json"
    options = ["--processes=2", *NETWORK, f"--steps={STEPS}", *shares, f"--losses={path}"]
    process = start(*options)
    shown, progress = process.communicate()
    assert process.returncode == 0, progress
    assert "2 processes, 4 devices" in shown
    assert progress.count("?step/s]") == 1, "one progress bar, not one a process"
    losses = [jnp.asarray(loss) for loss in json.loads(path.read_text())]
    assert_as_accurate(losses, *expected, examples=BATCH * 8 * 8)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds a process in /proc")
def test_a_process_that_is_killed_ends_the_others(start, tmp_path):
    name = f"--losses={tmp_path / 'losses.json'}"
    launcher = start("--processes=2", *NETWORK, f"--steps={ENDLESS}", name)
    shown = ""
    while not re.search(rf" [1-9]\d*/{ENDLESS} ", shown):  # in the midst of training
        assert launcher.poll() is None, shown
        shown += launcher.stderr.read(1)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # some other process may have ended meanwhile
            if {name, "--process-id=1"} <= set(path.read_text().split("\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)
    _, shown = launcher.communicate(timeout=SOON)  # returns when none of them is left
    assert launcher.returncode == 128 + signal.SIGKILL
    assert shown.endswith("\nprocess 1 ended with signal SIGKILL; the others were stopped\n")


def test_a_peer_that_never_comes(start):
    """Started by hand, one of two: no launcher is there to end it."""
    process = start(
        "--coordinator=127.0.0.1:1", "--num-processes=2", "--process-id=1", "--timeout=2"
    )
    _, shown = process.communicate(timeout=SOON)
    assert process.returncode != 0
    assert "DEADLINE_EXCEEDED" in shown


@pytest.fixture
def launch_script(tmp_path):
    """Launches as two processes a script that waits, but process 1 first does as is said."""

    def launch_script(does):
        script = tmp_path / "script.py"
        script.write_text(
            f"import sys, time\nif '--process-id=1' in sys.argv: {does}\ntime.sleep({ENDLESS})\n"
        )
        launcher = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import local_processes as l; l.launch({str(script)!r}, [], 2)",
            ],
            cwd=EXAMPLES,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(launcher)
        return launcher

    with ended_at_last() as started:
        yield launch_script


def test_launcher_passes_on_an_exit_code(launch_script):
    launcher = launch_script("sys.exit(3)")
    _, shown = launcher.communicate(timeout=SOON)
    assert launcher.returncode == 3
    assert shown == "\nprocess 1 ended with exit code 3; the others were stopped\n"


def test_launcher_that_is_terminated_ends_its_processes(launch_script):
    launcher = launch_script("print('here', file=sys.stderr, flush=True)")
    assert launcher.stderr.readline() == "here\n"
    launcher.terminate()
    launcher.communicate(timeout=SOON)
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("given", "option", "expected"),
    [
        (["--processes=0"], "--processes", "a whole number >= 1"),
        (["--processes=two"], "--processes", "a whole number >= 1"),
        (["--coordinator=host0"], "--coordinator", "HOST:PORT"),
        (["--coordinator=:8476"], "--coordinator", "HOST:PORT"),
        (["--coordinator=host0:65536"], "--coordinator", "HOST:PORT"),
        (["--coordinator=host0:8476"], "--coordinator", "needs --num-processes, --process-id too"),
        (["--process-id=0"], "--process-id", "needs --coordinator, --num-processes too"),
        (["--processes=2", "--process-id=0"], "--process-id", "needs --coordinator too"),
        (
            ["--coordinator=host0:8476", "--num-processes=2", "--process-id=2"],
            "--process-id",
            "less than 2",
        ),
        (["--cluster", "--processes=2"], "--cluster", "finds --num-processes by itself"),
        (["--timeout=0"], "--timeout", "a whole number >= 1"),
        (["--steps=0"], "--steps", "a whole number >= 1"),
        (["--batch-size=0"], "--batch-size", "a whole number >= 1"),
        (["--learning-rate=0"], "--learning-rate", "a finite number > 0"),
        (["--losses=."], "--losses", "cannot write"),
    ],
)
def test_bad_option_is_refused_by_name(data_parallel, capsys, given, option, expected):
    with pytest.raises(SystemExit) as refused:
        data_parallel.main(given)
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"argument {option}\b", error)
    assert expected in error
