"""Training that survives being killed: a folder with settings, checkpoints and a CSV of metrics.

    DIR/settings.json        the options that the result depends on
    DIR/metrics.csv          a header, then one row for each step
    DIR/checkpoints/STEP/    the state after that many steps, written by Orbax

The same command starts a run and goes on with it. A checkpoint appears under its name by one
rename, when all of it is written, so what is there is whole; and it says how long the CSV was, so
that the rows of steps that are taken again are cut off. What a step does must follow from the state
and the number of the step alone (see `shuffled_batch`). Then a run that was killed, however often,
ends with the same CSV and the same state, bit for bit, as one that was not: on the same device,
with the same versions. It is for one process, killed; whether the files outlive a loss of power is
up to the disk. It knows nothing of networks, and nothing of what is trained.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import fcntl
from functools import partial
import json
import math
import os
from pathlib import Path
from typing import Any, Self
import zlib

from digits_options import whole
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

KEPT = 2  # checkpoints; the older one is the way out when a disk has spoilt the newer


class RunError(Exception):
    """A folder that cannot be gone on with: which file, why, and the way out."""


def add_run(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of a run that do not change its result."""
    where = parser.add_argument_group(
        "the run", "The same command again goes on from the last checkpoint."
    )
    where.add_argument("--out", metavar="DIR", type=Path, default=out, help="the run's folder")
    number = partial(where.add_argument, metavar="N", type=partial(whole, least=1))
    number("--checkpoint-every", default=50, help="steps from one checkpoint to the next")
    number("--steps", help="stop after so many steps in all; the next run goes on")


def settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What the result depends on: all options but those of `add_run`, and `more`."""
    return {
        k: v for k, v in vars(args).items() if k not in ("out", "checkpoint_every", "steps")
    } | more


def checksum(*arrays: Any) -> int:
    """The CRC-32 of types, shapes and contents."""
    crc = 0
    for a in map(np.asarray, arrays):
        crc = zlib.crc32(f"{a.dtype}{a.shape}".encode(), crc)
        crc = zlib.crc32(a.tobytes(), crc)
    return crc


def shuffled_batch(seed: int, step: int, images: int, batch_size: int) -> np.ndarray:
    """The images of step 0, 1, ... by their numbers, [batch_size]: each at most once an epoch."""
    epoch, batch = divmod(step, images // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(images)
    return order[batch * batch_size : (batch + 1) * batch_size]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, then renames it: under its own it is never half a file."""
    draft = path.with_name(f".{path.name}.draft")
    write(draft)
    os.replace(draft, path)


def names_of(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The leaves of a tree, each with its path for a name, and how to put them together again."""
    leaves, treedef = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return names, [leaf for _, leaf in leaves], treedef


class Run:
    """A run's folder, open for training; use it in `with`.

    Args:
        folder: made if it is not there.
        settings: JSON values; if the folder has a run, they must be that run's.
        columns: of the CSV, after the number of the step.

    Raises:
        RunError: the folder holds something else, a run with other settings, a file that is
            damaged, or a run that another process trains at this time.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], columns: Sequence[str]):
        self.folder = folder.absolute()  # Orbax asks for that
        self.csv = self.folder / "metrics.csv"
        self.columns = tuple(columns)
        self.open_files = contextlib.ExitStack()
        self.csv_bytes = self.csv_crc = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._settle(dict(settings))
            self.rows = self.open_files.enter_context(self.csv.open("ab", buffering=0))
            self.manager = self._checkpoints()
        except (OSError, RunError) as e:
            self.open_files.close()
            if isinstance(e, RunError):
                raise
            raise RunError(f"cannot write {e.filename or folder}: {e.strerror}") from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()
        self.open_files.close()

    def _lock(self) -> None:
        """Lasts as long as the process, however that ends."""
        lock = self.open_files.enter_context((self.folder / ".lock").open("ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RunError(f"{self.folder}: another process trains this run; wait for it") from e

    def _settle(self, now: dict[str, Any]) -> None:
        """Compares the settings with those of the run; a new run gets them."""
        file = self.folder / "settings.json"
        now = json.loads(json.dumps(now))  # as they will be read
        if not file.exists():
            if strange := [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]:
                raise RunError(
                    f"{self.folder} holds {strange[0]!r} but no settings.json, so it is no run; "
                    "name a folder that is new or empty"
                )
            write_whole(file, lambda draft: draft.write_text(json.dumps(now, indent=2) + "\n"))
        try:
            then = json.loads(file.read_text())
            if not isinstance(then, dict):
                raise ValueError("expected an object")
        except ValueError as e:
            raise RunError(
                f"{file} is damaged ({e}); delete {self.folder} to start again, or name another"
            ) from e
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise RunError(
                    f"{self.folder} holds a run with {name} {then.get(name)!r}, not "
                    f"{now.get(name)!r}; give the same options to go on with it, or name another "
                    "folder to start anew"
                )

    def _checkpoints(self) -> Any:
        """Orbax's manager. What a killed process has left half written, it removes."""
        import orbax.checkpoint as ocp  # here, for it takes a second, and `--help` needs none

        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.args = ocp.args
        try:
            return ocp.CheckpointManager(self.folder / "checkpoints", options=options)
        except Exception as e:  # Orbax has no class of its own for a damaged folder
            raise RunError(
                f"{self.folder / 'checkpoints'} cannot be read ({describe(e)}); delete "
                f"{self.folder} to start again, or name another"
            ) from e

    def restore(self, state: Any) -> tuple[Any, int]:
        """The state of the last checkpoint and its step; without one, the state given, and 0.

        Args:
            state: a pytree of arrays, as at the start.

        Raises:
            RunError: the checkpoint or the CSV is not what was written.
        """
        step = self.manager.latest_step()
        if step is None:
            os.truncate(self.csv, 0)
            self._append(",".join(("step", *self.columns)))
            return state, 0
        file = self.folder / "checkpoints" / str(step)
        names, fresh, treedef = names_of(state)
        shapes = {
            name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
            for name, leaf in zip(names, fresh, strict=True)
        }
        try:
            args = self.args
            found = self.manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(shapes), about=args.JsonRestore()),
            )
            leaves = [np.asarray(found.state[name]) for name in names]
            about = {name: int(found.about[name]) for name in ("crc", "csv_bytes", "csv_crc")}
            if checksum(*leaves) != about["crc"]:
                raise ValueError("its checksum is not that of its arrays")
        except Exception as e:  # whatever Orbax, TensorStore or JSON make of a damaged file
            earlier = [s for s in self.manager.all_steps() if s < step]
            out = f"go on from step {max(earlier)}" if earlier else "start again"
            raise RunError(
                f"checkpoint {file} is damaged ({describe(e)}); delete that folder to {out}"
            ) from e
        self._cut(about["csv_bytes"], about["csv_crc"], file)
        return jax.tree.unflatten(treedef, map(jnp.asarray, leaves)), step

    def _cut(self, size: int, crc: int, checkpoint: Path) -> None:
        """Cuts off the rows that were written after the checkpoint."""
        with self.csv.open("rb") as file:
            found = file.read(size)
        if len(found) < size or zlib.crc32(found) != crc:
            raise RunError(
                f"{self.csv} is not as it was at checkpoint {checkpoint}: its first {size} bytes "
                f"are missing or changed; put them back, or delete {self.folder} to start again"
            )
        os.truncate(self.csv, size)
        self.csv_bytes, self.csv_crc = size, crc

    def _append(self, line: str) -> None:
        text = f"{line}\n".encode()
        self.rows.write(text)  # unbuffered: the row outlives the process
        self.csv_bytes, self.csv_crc = self.csv_bytes + len(text), zlib.crc32(text, self.csv_crc)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the row of a step; a column that the row has not stays empty."""
        if unknown := row.keys() - set(self.columns):
            raise KeyError(f"no columns of the CSV: {sorted(unknown)}")
        cells = (repr(float(row[c])) if c in row else "" for c in self.columns)  # every digit
        self._append(",".join((str(step), *cells)))

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint; returns when it is whole."""
        names, leaves, _ = names_of(state)
        arrays = [np.asarray(leaf) for leaf in leaves]
        about = dict(crc=checksum(*arrays), csv_bytes=self.csv_bytes, csv_crc=self.csv_crc)
        tree = dict(zip(names, arrays, strict=True))
        args = self.args
        items = args.Composite(state=args.StandardSave(tree), about=args.JsonSave(about))
        try:
            self.manager.save(step, args=items, force=True)
        except OSError as e:
            raise RunError(
                f"cannot write the checkpoint of step {step} in {self.folder} ({describe(e)}); "
                "make room or name another folder"
            ) from e


def describe(error: Exception) -> str:
    """The first line of an error, and its type."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def train(
    run: Run,
    state: Any,
    advance: Callable[[Any, int], tuple[Any, Mapping[str, float]]],
    *,
    steps: int,
    every: int,
) -> Any:
    """Trains from the last checkpoint to step `steps`, and returns the state there.

    Args:
        run: the folder.
        state: as at the start.
        advance: from the state and the number of the step, from 0, to the next state and the step's
            row of the CSV.
        steps: in all, with those of earlier processes.
        every: steps from one checkpoint to the next; there is one at the end too.

    Raises:
        FloatingPointError: a number in the row is not finite; the checkpoint before it stays.
    """
    state, start = run.restore(state)
    if start:
        tqdm.write(f"goes on from step {start}")
    progress = tqdm(total=max(steps, start), initial=start, desc="training", unit="step")
    with progress:
        for step in range(start, steps):
            state, row = advance(state, step)
            for name, value in row.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {step + 1}")
            run.log(step + 1, row)
            progress.update()
            progress.set_postfix({name: f"{value:.4f}" for name, value in row.items()})
            if (step + 1) % every == 0 or step + 1 == steps:
                run.save(step + 1, state)
    return state
