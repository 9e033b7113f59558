"""Runs of the examples: interrupted, damaged, taken by another; never half a file is read."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resumable

STEPS, EVERY = 8, 2
SETTINGS = dict(rate=0.5, seed=0)
COLUMNS = ("loss", "test")


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


def start():
    """Leaves of each kind that optimizers and networks have."""
    return dict(
        w=np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        half=jnp.ones((3,), jnp.bfloat16),
        counts=(np.int32(0), jnp.zeros((), jnp.uint32)),
    )


def advance(state, step):
    w = np.sin(np.asarray(state["w"]) * 3 + step, dtype=np.float32)
    half = state["half"] * jnp.bfloat16(0.75)
    state = dict(w=w, half=half, counts=(np.int32(step), jnp.uint32(step)))
    return state, dict(loss=w.sum()) | (dict(test=w.max()) if step % 3 == 2 else {})


def train(folder, advance=advance, steps=STEPS, settings=SETTINGS):
    with resumable.Run(folder, settings, COLUMNS) as run:
        return resumable.train(run, start(), advance, steps=steps, every=EVERY)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run left alone: its last state and the bytes of its CSV."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(folder), (folder / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, steps=4)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def refused(folder, **options):
    with pytest.raises(resumable.RunError) as error:
        train(folder, **options)
    return str(error.value)


def test_csv_has_a_row_for_each_step(whole_run):
    header, *rows = whole_run[1].decode().splitlines()
    assert header == "step,loss,test"
    state = start()
    for step, row in enumerate(rows):
        state, expected = advance(state, step)
        number, loss, test = row.split(",")
        assert (int(number), float(loss)) == (step + 1, float(expected["loss"]))
        assert test == (repr(float(expected["test"])) if "test" in expected else "")
    assert len(rows) == STEPS


def test_interrupted_run_ends_as_one_left_alone(whole_run, tmp_path, capsys):
    folder = tmp_path / "run"

    def killed_at(end):
        def until_then(state, step):
            if step == end:
                raise Killed
            return advance(state, step)

        return until_then

    for end, checkpoint in (1, 0), (5, 0), (6, 4):
        with pytest.raises(Killed):
            train(folder, killed_at(end))
        said = capsys.readouterr().out
        assert said == (f"goes on from step {checkpoint}\n" if checkpoint else "")
        with (folder / "metrics.csv").open("ab") as csv:
            csv.write(b"7,0.123")  # half a row
    # Half a checkpoint, and half an old one: Orbax was about to delete it.
    shutil.copytree(folder / "checkpoints/6", folder / "checkpoints/8.orbax-checkpoint-tmp")
    (folder / "checkpoints/8.orbax-checkpoint-tmp/state/_METADATA").unlink()
    (folder / "checkpoints/4/_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(folder / "checkpoints/4/state")
    state, csv = whole_run
    assert_same(train(folder), state)
    assert capsys.readouterr().out == "goes on from step 6\n"
    assert (folder / "metrics.csv").read_bytes() == csv
    assert sorted(os.listdir(folder / "checkpoints")) == ["6", "8"]
    assert_same(train(folder), state)  # there is nothing left to do
    assert (folder / "metrics.csv").read_bytes() == csv


# A read that fails ends Orbax's event loop before TensorStore's other reads have reported to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint_is_named_or_harmless(folder, damage):
    checkpoint = folder / "checkpoints/4"
    expected = train(folder, steps=4)
    noticed = set()
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 0xFF]) if content else b"x"
        rest = flipped + content[middle + 1 :] if damage == "flipped" else b""
        file.write_bytes(content[:middle] + rest)
        try:
            assert_same(train(folder, steps=4), expected)  # a file that no number depends on
        except resumable.RunError as error:
            assert f"{checkpoint} is damaged" in str(error)
            assert "delete that folder to go on from step 2" in str(error)
            noticed.add(file.relative_to(checkpoint).parts[0])
        file.write_bytes(content)
    assert noticed >= {"about", "state"}
    shutil.rmtree(checkpoint / "state")
    assert "is damaged" in refused(folder, steps=4)
    shutil.rmtree(checkpoint)  # the way out
    assert_same(train(folder, steps=4), expected)


def test_wrong_numbers_in_a_readable_checkpoint_are_noticed(folder):
    about = folder / "checkpoints/4/about/metadata"
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content | dict(crc=content["crc"] ^ 1)))
    assert "its checksum is not that of its arrays" in refused(folder)


@pytest.mark.parametrize("damage", [b"", b"step,loss,test\n1,9.0,\n2,9.0,\n3,9.0,\n4,9.0,\n" * 9])
def test_csv_that_is_not_the_checkpoint_s_is_refused(folder, damage):
    (folder / "metrics.csv").write_bytes(damage)
    error = refused(folder)
    assert f"{folder / 'metrics.csv'} is not as it was" in error
    assert f"delete {folder} to start again" in error
    assert (folder / "metrics.csv").read_bytes() == damage  # nothing was cut off


@pytest.mark.parametrize("settings", ["", "{", "[]", '{"rate": 0.'])
def test_damaged_settings_are_named(folder, settings):
    (folder / "settings.json").write_text(settings)
    error = refused(folder)
    assert f"{folder / 'settings.json'} is damaged" in error
    assert f"delete {folder}" in error


def test_other_settings_are_refused_by_name(folder):
    error = refused(folder, settings=SETTINGS | dict(rate=0.25))
    assert "a run with rate 0.5, not 0.25" in error
    assert "name another folder" in error


def test_folder_that_is_no_run_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "'thesis.tex' but no settings.json" in refused(tmp_path)
    assert not (tmp_path / "settings.json").exists()


def test_path_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path / 'file'}" in refused(tmp_path / "file")
    assert f"cannot write {tmp_path / 'file'}" in refused(tmp_path / "file" / "run")


def test_two_processes_do_not_train_one_run(folder):
    with resumable.Run(folder, SETTINGS, COLUMNS):
        assert "another process trains this run" in refused(folder)
    train(folder)


def test_number_that_is_not_finite_is_not_kept(folder):
    def diverge(state, step):
        return advance(state, step)[0], dict(loss=np.nan)

    csv = (folder / "metrics.csv").read_bytes()
    with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
        train(folder, diverge)
    assert (folder / "metrics.csv").read_bytes() == csv


def test_batches_follow_from_the_number_of_the_step():
    epochs = [[resumable.shuffled_batch(3, e * 4 + i, 9, 2) for i in range(4)] for e in range(2)]
    for batches in epochs:
        chosen = np.concatenate(batches)
        assert len(set(chosen)) == 8 and set(chosen) <= set(range(9))
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
