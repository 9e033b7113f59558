"""The JSON file of a run: where it was made, and reading it back."""

from datetime import datetime
from importlib import metadata
import json
import os
from pathlib import Path
import platform
import subprocess

import jax

import jax_bn

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy")
FIELDS = (
    "date", "commit", "device", "versions", "settings", "missing", "bandwidth", "times",
    "not_measured", "residuals", "h200", "collectives", "scaling", "overhead",
)  # fmt: skip


class BadResult(ValueError):
    """A file that is no result of a run."""


def here() -> dict:
    """Date, commit, device and versions."""
    device = jax.devices()[0]
    return dict(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=_commit(),
        device=dict(
            platform=device.platform,
            kind=device.device_kind,
            count=jax.device_count(),
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            system=f"{platform.system()} {platform.machine()}",
        ),
        versions=dict(python=platform.python_version(), jax_bn=jax_bn.__version__)
        | {name: _version(name) for name in PACKAGES},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with `+changes` if files differ from it; None outside of a git clone."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Files that git does not know, such as results, change nothing.
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def load(path: Path) -> dict:
    """A result, or `BadResult` with what is wrong with the file."""
    try:
        result = json.loads(path.read_text())
    except OSError as e:
        raise BadResult(f"cannot read {str(path)!r}: {e.strerror}") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadResult(f"{str(path)!r} is no JSON, or was cut off: {e}") from e
    missing = [f for f in FIELDS if f not in result] if isinstance(result, dict) else list(FIELDS)
    if missing:
        raise BadResult(f"{str(path)!r} is no result of `python -m benchmarks`: no {missing[0]!r}")
    return result
