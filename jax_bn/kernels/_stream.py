"""One kernel that streams arrays of x's size through a Hopper GPU and sums or writes what it makes.

Knows tiles, and no batch normalization: what it computes of each number is handed in as `terms`.

The way of a tile. x is seen as a matrix of rows that are COLUMNS wide: up to 256 features several
examples stand side by side in a row, beyond that the features are cut into slabs of COLUMNS. A grid
of BLOCKS thread blocks, two for each SM, is spread over the slabs, and each of the WARPGROUPS in a
block streams tiles of its slab on its own: tile w, w + workers, w + 2*workers, ... for worker w.

    memory --TMA--> slot in shared memory --> registers, float32 --> sums, which stay there, or
                                                                 --> the slot --TMA--> memory

A worker has SLOTS slots in a ring, so that the copies of the next tiles run while one is computed.
A barrier for each slot says that its tile has arrived. What a kernel writes it writes into the slot
that it read, and the store leaves from there; the slot is filled again once the store before the
last has read it. No slot is shared between warpgroups, so nothing waits for another warpgroup until
the sums are complete: then those of one block are added in shared memory, in a fixed order, and
written out, and XLA adds the blocks'. Without atomics two runs give the same bits.

In registers a warpgroup holds RUN*COLUMNS numbers at a time: 16 bytes of x for each of its 128
threads. A number for each feature stands beside them repeated in that pattern, see `_pattern`.

A kernel that writes walks its tiles backwards: it is the second sweep over arrays of which the
first left the end in the L2 cache.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

load: Any = plgpu.load  # whose index older versions ask for

COLUMNS = 256  # of a tile: no TMA box is wider
BLOCKS = 264  # thread blocks: two on each of the 132 SMs of an H100 or H200
WARPGROUPS = 2  # in a block
SLOTS = 3  # of a warpgroup
TILE_BYTES = 16 * 1024  # of the tiles in one slot, all inputs together


class Tiling(NamedTuple):
    """How x, of M examples and C features, is cut."""

    side_by_side: int  # examples in a row
    rows: int
    slabs: int
    run: int  # rows that a warpgroup computes at a time: 16 bytes a thread
    tile: int  # rows of a tile
    blocks: int  # for each slab

    @property
    def workers(self) -> int:
        """Warpgroups for each slab."""
        return self.blocks * WARPGROUPS

    @property
    def tiles(self) -> int:
        """Of each slab."""
        return self.rows // self.tile


def tiling(examples: int, features: int, itemsize: int, inputs: int) -> Tiling:
    """The cut of x for a kernel that reads so many arrays; raises where there is none."""
    run = 128 * 16 // (COLUMNS * itemsize)
    side_by_side = max(1, COLUMNS // features)
    step = run * side_by_side
    fits = COLUMNS % features == 0 or features % COLUMNS == 0
    if not fits or features > 8192 or examples % step:
        divisor = step if fits else "..."
        raise NotImplementedError(
            f"x has {examples} examples of {features} features; expected a number of features that "
            f"divides {COLUMNS} or is a multiple of it up to 8192, and a number of examples "
            f"divisible by {divisor}"
        )
    rows, slabs = examples // side_by_side, max(1, features // COLUMNS)
    most = max(run, 1 << int(math.log2(TILE_BYTES // (inputs * COLUMNS * itemsize))))
    # Few rows: smaller tiles, as long as they make work for more warpgroups.
    while most > run and rows * slabs < most * BLOCKS * WARPGROUPS:
        most //= 2
    tile = math.gcd(rows, most)
    blocks = min(max(1, BLOCKS // slabs), -(-rows // (tile * WARPGROUPS)))
    return Tiling(side_by_side, rows, slabs, run, tile, blocks)


def _pattern(v, like, cut: Tiling):
    """v as it stands in the registers beside a run of x. :: [1, C] -> (slabs, run, COLUMNS)"""
    v = jnp.zeros(like.shape, jnp.float32) if v is None else v
    v = jnp.tile(v.reshape(-1), cut.side_by_side).reshape(cut.slabs, 1, COLUMNS)
    return jnp.broadcast_to(v, (cut.slabs, cut.run, COLUMNS))


def stream(terms: Callable, arrays, vectors, sums: int, outputs: int, name: str):
    """Runs `terms` on all of the arrays, in float32, in one kernel: what is summed or written."""
    x = arrays[0]
    dtype, columns = x.dtype, x.shape[-1]
    cut = tiling(x.size // columns, columns, dtype.itemsize, len(arrays))
    as_rows = (cut.rows, cut.slabs * COLUMNS)
    if sums:
        out_type = [jax.ShapeDtypeStruct((cut.slabs, cut.blocks, sums, COLUMNS), jnp.float32)]
    else:
        out_type = [jax.ShapeDtypeStruct(as_rows, dtype)] * outputs

    slots = plgpu.SMEM((WARPGROUPS, SLOTS, cut.tile, COLUMNS), dtype)
    arrived = plgpu.Barrier(num_arrivals=1, num_barriers=(WARPGROUPS, SLOTS))
    scratch: list = [slots] * len(arrays) + [arrived] * len(arrays)
    if sums:
        scratch.append(plgpu.SMEM((WARPGROUPS, sums, cut.run, COLUMNS), jnp.float32))
        scratch.append(plgpu.Barrier(num_arrivals=WARPGROUPS))

    def body(*refs):
        _body(cut, terms, len(arrays), len(vectors), sums, outputs, refs)

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(cut.blocks * cut.slabs,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=tuple(scratch),
    )
    patterns = (_pattern(v, vectors[0], cut) for v in vectors)
    return kernel(*(a.reshape(as_rows) for a in arrays), *patterns), cut


def _body(cut: Tiling, terms, n_arrays: int, n_vectors: int, sums: int, outputs: int, refs):
    """What one warpgroup does. `refs`: arrays, vectors, results, slots, barriers."""
    of = iter(refs)
    sources, vectors, results, slots, arrived = (
        [next(of) for _ in range(k)]
        for k in (n_arrays, n_vectors, outputs or 1, n_arrays, n_arrays)
    )
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    slab, block = lax.rem(block, cut.slabs), lax.div(block, cut.slabs)
    worker = warpgroup * cut.blocks + block
    mine = lax.div(cut.tiles - worker + cut.workers - 1, cut.workers)  # how many tiles

    itemsize = jnp.dtype(slots[0].dtype).itemsize
    layout = plgpu.Layout.WG_STRIDED((cut.run, COLUMNS), vec_size=16 // itemsize)

    def read(ref):
        return load(ref, layout=layout)

    def place(i):
        """Of the i-th of my tiles in memory."""
        tile = worker + (mine - 1 - i if outputs else i) * cut.workers
        return pl.ds(tile * cut.tile, cut.tile), pl.ds(slab * COLUMNS, COLUMNS)

    def fetch(i, wanted):
        @pl.when(wanted)
        def _():
            mine_now = (warpgroup, lax.rem(i, SLOTS))
            for source, slot, barrier in zip(sources, slots, arrived, strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at[place(i)], slot.at[mine_now], barrier.at[mine_now]
                )

    for i in range(SLOTS):
        fetch(jnp.int32(i), i < mine)
    patterns = [read(v.at[slab]) for v in vectors]

    def one_tile(i, totals):
        here = (warpgroup, lax.rem(i, SLOTS))
        for barrier in arrived:
            plgpu.barrier_wait(barrier.at[here])

        def one_run(j, totals):
            rows = (*here, pl.ds(j * cut.run, cut.run), slice(None))
            values = terms(*[read(s.at[rows]).astype(jnp.float32) for s in slots], *patterns)
            if sums:
                return tuple(t + v for t, v in zip(totals, values, strict=True))
            for slot, v in zip(slots, values, strict=False):  # x's slot, then dy's
                slot[rows] = v.astype(slot.dtype)
            return totals

        runs = cut.tile // cut.run
        totals = lax.fori_loop(0, runs, one_run, totals, unroll=math.gcd(runs, 4))
        plgpu.commit_smem()  # before a copy of the next tile, or a store, touches the slot
        if sums:
            fetch(i + SLOTS, i + SLOTS < mine)
            return totals
        for slot, result in zip(slots, results, strict=False):
            plgpu.copy_smem_to_gmem(slot.at[here], result.at[place(i)])
        plgpu.wait_smem_to_gmem(outputs, wait_read_only=True)  # tile i - 1 has left its slot
        fetch(i + SLOTS - 1, (i > 0) & (i + SLOTS - 1 < mine))
        return totals

    nothing = plgpu.layout_cast(jnp.zeros((cut.run, COLUMNS), jnp.float32), layout)
    totals = lax.fori_loop(0, mine, one_tile, (nothing,) * sums)
    if outputs:
        plgpu.wait_smem_to_gmem(0)
        return

    mine_and_others, complete = of
    for k, total in enumerate(totals):
        mine_and_others[warpgroup, k] = total
    plgpu.barrier_arrive(complete)
    plgpu.barrier_wait(complete)

    @pl.when(warpgroup == 0)
    def _():
        each = [(w, r) for w in range(WARPGROUPS) for r in range(cut.run)]
        in_order = plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=2)
        for k in range(sums):
            rows = [load(mine_and_others.at[w, k, r], layout=in_order) for w, r in each]
            results[0][slab, block, k] = sum(rows[1:], rows[0])
