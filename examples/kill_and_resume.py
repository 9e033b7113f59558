"""Kills an example again and again while it trains, and shows that nothing is lost by it.

    python examples/kill_and_resume.py --kills 20

One run is left alone. Another gets SIGKILL at moments drawn by `--seed`: while it starts, restores,
takes a step, or writes a checkpoint; and is started again each time. Checked each time: it goes on
from the newest complete checkpoint, which is at most `EVERY` steps behind the CSV, and never behind
an earlier one. Checked at the end: both runs have the same CSV and the same state, bit for bit.
"""

import argparse
from collections.abc import Sequence
from functools import partial
import math
import os
from pathlib import Path
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from digits_options import whole

EVERY = 2  # steps from one checkpoint to the next: about as long as writing one takes
EXAMPLES = {  # small networks: most of the time goes into checkpoints
    "gan_r1": ("--width=2", "--latent=2", "--batch-size=16"),
    "train_resnet": ("--width=2", "--batch-size=16", "--epochs=2"),
}
STARTS = 0.25  # the share of kills before the first step of a process


class Lost(Exception):
    """A killed run did not go on as it should."""


class Victim:
    """One folder, and the processes that train in it one after the other."""

    def __init__(self, example: str, steps: int, folder: Path, cache: Path):
        self.folder, self.csv, self.steps = folder, folder / "metrics.csv", steps
        self.startup = math.inf  # seconds from a start to the first row, the least seen
        script = Path(__file__).with_name(f"{example}.py")
        options = [f"--steps={steps}", f"--checkpoint-every={EVERY}", f"--out={folder}"]
        self.command = [sys.executable, "-W", "error", script, *EXAMPLES[example], *options]
        # Compiled once, not in each process.
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        }

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def checkpoint(self) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        folder = self.folder / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def drafts(self) -> set[tuple[str, int]]:
        """Checkpoints half written, each with the time when; the next process removes them."""
        found = self.folder.glob("checkpoints/*tmp*")
        return {(path.name, path.stat().st_mtime_ns) for path in found}

    def rows(self) -> int:
        """Whole rows in the CSV, without the header."""
        return max(0, self.csv.read_bytes().count(b"\n") - 1) if self.csv.exists() else 0

    def finish(self) -> tuple[float, float]:
        """Trains to the end: seconds to the first row, and from there to the last."""
        before, began = self.checkpoint(), time.monotonic()
        process = self.start()
        first = self.wait_for_row(process, before, math.inf)
        last = self.wait_for_row(process, self.steps - 1, math.inf)
        shown, errors = process.communicate()
        if process.returncode != 0:
            raise Lost(f"the run ended with exit code {process.returncode}:\n{errors}")
        self.check_resumed(shown, before)
        return first - began, last - first

    def wait_for_row(self, process: subprocess.Popen, after: int, seconds: float) -> float:
        """Returns when this process has written a row after that one, or after so many seconds."""
        until = time.monotonic() + seconds
        # What an earlier process wrote after its checkpoint is cut off first: wait for that too.
        stale = self.rows() > after
        while process.poll() is None and time.monotonic() < until:
            rows = self.rows()
            if stale and rows <= after:
                stale = False
            elif not stale and rows > after:
                break
            time.sleep(0.001)
        return time.monotonic()

    def kill(self, moments: random.Random, startup: float, training: float) -> str | None:
        """Starts the run and kills it at some moment; says what is left. None: it was done before.

        Args:
            moments: draws the moment.
            startup: seconds from a start to the first row, at most; killed within, or then.
            training: seconds after the first row, at most; killed within.
        """
        before, drafts, began = self.checkpoint(), self.drafts(), time.monotonic()
        process = self.start()
        if moments.random() < STARTS:
            self.wait_for_row(process, before, moments.uniform(0, startup))
        else:
            first = self.wait_for_row(process, before, math.inf)
            self.startup = min(self.startup, first - began)
            time.sleep(moments.uniform(0, training))
        process.kill()
        shown, errors = process.communicate()
        self.check_resumed(shown, before)
        if process.returncode == 0:
            return None
        if process.returncode != -signal.SIGKILL:
            raise Lost(f"the run ended with exit code {process.returncode}:\n{errors}")
        after, rows = self.checkpoint(), self.rows()
        if after < before or rows > after + EVERY:
            raise Lost(f"checkpoint {before} before, {after} after, {rows} rows in the CSV")
        new = [name for name, _ in self.drafts() - drafts]
        within = f", while it wrote {', '.join(new)}" if new else ""
        return f"began at {before}, left {rows} rows and checkpoint {after}{within}"

    def check_resumed(self, shown: str, checkpoint: int) -> None:
        """A process says where it goes on; one killed early has said nothing."""
        said = re.search(r"goes on from step (\d+)", shown)
        if said and int(said[1]) != checkpoint:
            raise Lost(f"went on from step {said[1]}, not from checkpoint {checkpoint}")


def state_of(folder: Path) -> bytes:
    """The last checkpoint's steps and checksums, of its arrays and of the CSV."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return f"{last.name} ".encode() + (last / "about" / "metadata").read_bytes()


def check_same(left_alone: Victim, killed: Victim) -> None:
    """Both runs are done, with the same CSV and the same state."""
    if killed.rows() != killed.steps:
        raise Lost(f"{killed.csv} has {killed.rows()} rows, not {killed.steps}")
    if left_alone.csv.read_bytes() != killed.csv.read_bytes():
        raise Lost(f"{left_alone.csv} and {killed.csv} differ")
    if state_of(left_alone.folder) != state_of(killed.folder):
        raise Lost(f"the last checkpoints of {left_alone.folder} and {killed.folder} differ")


def compare(example: str, kills: int, steps: int, seed: int, folder: Path) -> list[str]:
    """Trains both runs; returns one line for each kill. Raises: Lost."""
    left_alone = Victim(example, steps, folder / "alone", folder / "cache")
    startup, training = left_alone.finish()  # it compiles: the startup of the others is shorter
    moments = random.Random(seed)
    lines: list[str] = []
    killed = Victim(example, steps, folder / "killed", folder / "cache")
    while len(lines) < kills:
        line = killed.kill(moments, min(startup, killed.startup), training / (2 / 3 * kills + 1))
        if line is None:  # no kill: another run, for those that are still to come
            check_same(left_alone, killed)
            shutil.rmtree(killed.folder)
            continue
        lines.append(line)
        print(f"kill {len(lines)}: {line}", flush=True)
    killed.finish()
    check_same(left_alone, killed)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Kills, compares, and says so."""
    parser = argparse.ArgumentParser(
        description="Kills an example at random moments and starts it again; compares the result "
        "with that of a run which was left alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = partial(parser.add_argument, metavar="N")
    number("--kills", type=partial(whole, least=1), default=20, help="how many")
    number("--steps", type=partial(whole, least=1), default=80, help="of the whole run")
    number("--seed", type=partial(whole, least=0), default=0, help="of the moments")
    add = parser.add_argument
    add("--example", choices=EXAMPLES, default="gan_r1", help="which one to kill")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            lines = compare(args.example, args.kills, args.steps, args.seed, Path(folder))
        except Lost as e:
            sys.exit(f"{args.example}: {e}")
    writing = sum("while it wrote" in line for line in lines)
    print(
        f"{args.example}: killed {len(lines)} times, {writing} of them while it wrote a "
        f"checkpoint; the CSV of {args.steps} steps and the last state are those of a run left "
        "alone"
    )


if __name__ == "__main__":
    main()
