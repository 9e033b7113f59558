"""Types of command-line options, for `argparse`: what is refused, and with which words."""

import argparse
import math
from pathlib import Path


def whole(text: str, least: int) -> int:
    """A whole number, at least `least`."""
    if not (text.isdecimal() and least <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a whole number >= {least}, below 2**31"
        )
    return int(text)


def rate(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a finite number > 0")
    return value


def writable(text: str) -> Path:
    """A file that can be written; its folder is made."""
    path = Path(text)
    try:  # now, not after the training
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {e.strerror}") from e
    return path
