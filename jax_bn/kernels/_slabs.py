"""How an x that stays on the chip is cut into slabs, and how they lie in registers.

Knows numbers and layouts; the kernel is in `_resident`, which says what the words mean.
"""

from functools import partial
from typing import NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCKS = 132  # at most: one on each SM of an H100 or H200, all at once
ROW_BYTES = (32, 64, 128)  # of a slab; a sector of memory is 32, and 128 lets two lanes sum
SHARED_BYTES = 208 * 1024  # for slabs, of the 227 KB that a block can have
WARPGROUPS = 4
WARPS = 4  # in a warpgroup
LANES = 32
OWN = 8  # bytes of an example that a thread has
RUNS = 2  # in a box, 1 KB each, or more where there would be more boxes than
BOXES = 32  # in a block: a group has no more barriers


class Cut(NamedTuple):
    """How x, of M examples and C features, is cut."""

    columns: int  # of a slab
    slabs: int
    together: int  # examples in a group
    groups: int
    box: int  # groups of a box

    @property
    def run(self) -> tuple[int, int, int]:
        """What a warpgroup has in registers."""
        return WARPS, self.together, self.columns

    @property
    def boxes(self) -> int:
        """Of each slab."""
        return -(-self.groups // self.box)

    @property
    def share(self) -> int:
        """Boxes that a warpgroup has at most."""
        return -(-self.boxes // WARPGROUPS)

    def bytes_of(self, arrays: int, itemsize: int) -> int:
        """Shared memory for the slabs of so many arrays."""
        examples = WARPGROUPS * self.share * self.box * self.together
        return arrays * examples * self.columns * itemsize


def fitting(examples: int, features: int, itemsize: int, arrays: int) -> Cut | None:
    """The cut of x for kernels that hold so many arrays; None where x does not fit on the chip.

    The narrowest slabs of which there are no more than SMs: as many SMs as can be share the work,
    and all of x is on the chip at once. More slabs would come in waves, which read memory no faster
    than streaming does. However few slabs there are, what fits into one is swept in a few
    microseconds, less than the launches take that are saved: by arithmetic, it is not measured.
    """
    for row_bytes in ROW_BYTES:
        columns, together = row_bytes // itemsize, LANES * OWN // row_bytes
        slabs, groups = features // columns, examples // together
        if features % columns or examples % together or slabs > BLOCKS or groups < WARPS:
            continue
        box = WARPS * min(RUNS, groups // WARPS)
        while groups > box * BOXES:
            box *= 2
        found = Cut(columns, slabs, together, groups, box)
        return found if found.bytes_of(arrays, itemsize) <= SHARED_BYTES else None
    return None


def layouts(cut: Cut):
    """In registers: of a run; and of the sums of a warpgroup's warps, [WARPS, columns].

    Lanes of the same columns have different examples, or different warps' sums. Where there are
    more of them than warps, some have the same sums: then the lanes of a run are split in two
    dimensions, so that without the examples both are laid out alike.
    """
    own = cut.together * cut.columns // LANES  # numbers that a thread has of a run
    run, all_warps = cut.run, (plgpu.Replicated(WARPS),)
    tiled, tiling = partial(plgpu.Layout.TILED, vector_dim=-1), plgpu.Tiling
    if cut.together <= WARPS:
        rows = (cut.together, cut.columns)
        return (
            tiled(tiling((run, (own,))), warp_dims=(-4,), lane_dims=(-3, -2)),
            tiled(tiling((rows, (own,))), warp_dims=all_warps, lane_dims=(-3, -2)),
        )
    rows, alike = (WARPS, cut.columns), plgpu.Replicated(cut.together // WARPS)
    return (
        tiled(tiling((run, rows, (own,))), warp_dims=(-6,), lane_dims=(-5, -3, -2)),
        tiled(tiling((rows, (own,))), warp_dims=all_warps, lane_dims=(alike, -3, -2)),
    )
