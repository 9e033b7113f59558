"""Types of command-line options, for `argparse`: what is refused, and with which words."""

import argparse
from functools import partial
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


def add_training(where: argparse._ActionsContainer) -> None:
    """The options that every training of the digits has, but for its length."""
    number = partial(where.add_argument, metavar="N")
    number("--batch-size", type=partial(whole, least=1), default=128, help="images in a step")
    number("--learning-rate", type=rate, default=0.05, help="of SGD, at the start")
    number("--width", type=partial(whole, least=1), default=16, help="channels of the first block")
    number("--seed", type=partial(whole, least=0), default=0, help="of split, weights and order")


def writable(text: str) -> Path:
    """A file that can be written; its folder is made."""
    path = Path(text)
    try:  # now, not after the training
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {e.strerror}") from e
    return path
