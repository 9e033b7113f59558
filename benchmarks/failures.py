"""What a failure means: a peer's is a line in the result, and the run goes on; ours ends it.

A peer can fail in as many ways as there are libraries: it is not installed, does not know this JAX,
this dtype or this device, or has not the memory. So whatever it raises is its reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager

OURS, FUSED = "jax_bn", "jax_bn fused"


def reason(error: BaseException) -> str:
    """The first line of what an error says, for a table."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]


@contextmanager
def attempt(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Something that the implementation `name` does; if it cannot, `failed` says why."""
    try:
        yield
    except Exception as e:  # whatever another library raises
        if name in (OURS, FUSED):
            raise
        failed[name] = reason(e)
