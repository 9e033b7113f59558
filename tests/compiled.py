"""What a compiled program does, counted in its text: collectives and the size of their data."""

from collections import Counter
import math
import re

import jax

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
INSTRUCTION = re.compile(rf"= (?P<result>.*?) (?P<kind>{COLLECTIVES})(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(f, *args) -> tuple[Counter, int]:
    """How many of each kind, and the most elements that one of them yields."""
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    found = [m for m in map(INSTRUCTION.search, text.splitlines()) if m]
    moved = [
        sum(
            math.prod(int(n) for n in shape.split(",") if n) for shape in SHAPE.findall(m["result"])
        )
        for m in found
    ]
    return Counter(m["kind"] for m in found), max(moved, default=0)
