"""One kernel that streams arrays of x's size through a Hopper GPU and sums or writes what it makes.

Knows tiles, and no batch normalization: what it computes of each number is handed in as `terms`.

The way of a tile. x is seen as a matrix: as many examples stand side by side in a row as make it a
whole number of slabs, each of up to COLUMNS numbers; see `tiling`. A grid of BLOCKS thread blocks,
two for each SM, is spread over the slabs, and each of the WARPGROUPS in a block streams tiles of
its slab on its own: tile w, w + workers, w + 2*workers, ... for worker w.

    memory --TMA--> slot in shared memory --> registers, float32 --> sums, which stay there, or
                                                                 --> the slot --TMA--> memory

A worker has SLOTS slots in a ring, so that the copies of the next tiles run while one is computed.
A barrier for each slot says that its tile has arrived. What a kernel writes it writes into the slot
that it read, and the store leaves from there; the slot is filled again once the store before the
last has read it. No slot is shared between warpgroups, so nothing waits for another warpgroup until
the sums are complete: then those of one block are added in shared memory, in a fixed order, and
written out, and XLA adds the blocks'. Without atomics two runs give the same bits.

In registers a warpgroup holds a run of rows at a time, of which each of its 128 threads has 16
bytes of x. What is one number for each feature stands beside them repeated in that pattern, see
`_patterns`.

The last tile may reach beyond x. TMA fills with zeros what it reads there, and drops what it writes
there; in sums these rows are left out.

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

COLUMNS = 256  # of a tile at most, and of its rows: no TMA box is larger
BLOCKS = 264  # thread blocks: two on each of the 132 SMs of an H100 or H200
WARPGROUPS = 2  # in a block
THREADS = 128  # in a warpgroup
VECTOR = 16  # bytes that a thread reads at once, and the fewest in a row of a TMA box
MOST_FEATURES = 8192
SLOTS = 3  # of a warpgroup
TILE_BYTES = 16 * 1024  # of the tiles in one slot, all inputs together


class Tiling(NamedTuple):
    """How x, of M examples and C features, is cut."""

    columns: int  # of a slab
    side_by_side: int  # examples in a row
    rows: int
    slabs: int
    run: int  # rows that a warpgroup computes at a time
    tile: int  # rows of a tile
    blocks: int  # for each slab

    @property
    def workers(self) -> int:
        """Warpgroups for each slab."""
        return self.blocks * WARPGROUPS

    @property
    def tiles(self) -> int:
        """Of each slab."""
        return -(-self.rows // self.tile)


def tiling(examples: int, features: int, itemsize: int, inputs: int) -> Tiling:
    """The cut of x for a kernel that reads so many arrays; raises where there is none.

    The wider the slabs, the longer the pieces of memory that are read at a time; but the more
    examples may have to stand in one row, and their number has to divide that of the examples. It
    is 1 for 1024 features, 4 for 64 and for 192, 32 for 24, 256 for an odd number.
    """
    narrowest = VECTOR // itemsize
    if features > MOST_FEATURES or examples * features % narrowest:
        raise NotImplementedError(
            f"x has {examples} examples of {features} features; expected at most {MOST_FEATURES} "
            f"features, and a number of elements divisible by {narrowest}: 16 bytes"
        )
    columns = COLUMNS
    while examples % (columns // math.gcd(columns, features)):
        columns //= 2
    side_by_side = columns // math.gcd(columns, features)
    rows, slabs = examples // side_by_side, features * side_by_side // columns
    run = THREADS * VECTOR // (columns * itemsize)
    tile = max(run, 1 << int(math.log2(TILE_BYTES // (inputs * columns * itemsize))))
    tile = min(tile, COLUMNS)
    # Few rows: smaller tiles, as long as they make work for more warpgroups.
    while tile > run and rows * slabs < tile * BLOCKS * WARPGROUPS:
        tile //= 2
    blocks = min(max(1, BLOCKS // slabs), -(-rows // (tile * WARPGROUPS)))
    return Tiling(columns, side_by_side, rows, slabs, run, tile, blocks)


def _patterns(vectors, cut: Tiling):
    """All vectors, in one array, as they stand in the registers beside a run of x.

    :: K times [1, C] -> (slabs, K, run, columns)
    """
    v = jnp.stack([v.reshape(-1) for v in vectors])
    v = jnp.tile(v, (1, cut.side_by_side)).reshape(-1, cut.slabs, 1, cut.columns)
    return jnp.broadcast_to(jnp.swapaxes(v, 0, 1), (cut.slabs, len(vectors), cut.run, cut.columns))


def stream(terms: Callable, arrays, vectors, sums: int, outputs: int, name: str):
    """Runs `terms` on all of the arrays, in float32, in one kernel.

    What it yields is summed over the examples, :: [C] each, or written, as rows.
    """
    x = arrays[0]
    dtype, columns = x.dtype, x.shape[-1]
    cut = tiling(x.size // columns, columns, dtype.itemsize, len(arrays))
    as_rows = (cut.rows, cut.slabs * cut.columns)
    if sums:
        out_type = [jax.ShapeDtypeStruct((cut.slabs, cut.blocks, sums, COLUMNS), jnp.float32)]
    else:
        out_type = [jax.ShapeDtypeStruct(as_rows, dtype)] * outputs

    slots = plgpu.SMEM((WARPGROUPS, SLOTS, cut.tile, cut.columns), dtype)
    arrived = plgpu.Barrier(num_arrivals=1, num_barriers=(WARPGROUPS, SLOTS))
    scratch: list = [slots] * len(arrays) + [arrived] * len(arrays)
    if sums:
        scratch.append(plgpu.SMEM((WARPGROUPS, sums, *_folded(cut)), jnp.float32))
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
    results = kernel(*(a.reshape(as_rows) for a in arrays), _patterns(vectors, cut))
    return _unfolded(results[0], cut) if sums else results


def _folded(cut: Tiling) -> tuple[int, int]:
    """A run of sums as rows of COLUMNS numbers."""
    return cut.run * cut.columns // COLUMNS, COLUMNS


def _unfolded(partial_sums, cut: Tiling):
    """The sums of each feature. :: (slabs, blocks, sums, COLUMNS) -> (sums, C)"""
    slabs, blocks, sums, _ = partial_sums.shape
    s = partial_sums.reshape(slabs, blocks, sums, -1, cut.columns).sum((1, 3))
    return jnp.swapaxes(s, 0, 1).reshape(sums, cut.side_by_side, -1).sum(1)


def _body(cut: Tiling, terms, n_arrays: int, n_vectors: int, sums: int, outputs: int, refs):
    """What one warpgroup does. `refs`: arrays, patterns, results, slots, barriers."""
    of = iter(refs)
    sources, (patterns,), results, slots, arrived = (
        [next(of) for _ in range(k)] for k in (n_arrays, 1, outputs or 1, n_arrays, n_arrays)
    )
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    slab, block = lax.rem(block, cut.slabs), lax.div(block, cut.slabs)
    worker = warpgroup * cut.blocks + block
    mine = lax.div(cut.tiles - worker + cut.workers - 1, cut.workers)  # how many tiles

    shape, itemsize = (cut.run, cut.columns), jnp.dtype(slots[0].dtype).itemsize
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=VECTOR // itemsize)

    def read(ref):
        return load(ref, layout=layout)

    def first_row(i):
        """Of the i-th of my tiles."""
        return (worker + (mine - 1 - i if outputs else i) * cut.workers) * cut.tile

    def place(i):
        return pl.ds(first_row(i), cut.tile), pl.ds(slab * cut.columns, cut.columns)

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
    vectors = [read(patterns.at[slab, k]) for k in range(n_vectors)]
    row_of_run = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), layout)

    def one_tile(i, totals):
        here = (warpgroup, lax.rem(i, SLOTS))
        for barrier in arrived:
            plgpu.barrier_wait(barrier.at[here])

        def one_run(j, totals):
            rows = (*here, pl.ds(j * cut.run, cut.run), slice(None))
            values = terms(*[read(s.at[rows]).astype(jnp.float32) for s in slots], *vectors)
            if sums:
                if cut.rows % cut.tile:
                    inside = row_of_run < cut.rows - first_row(i) - j * cut.run
                    values = [jnp.where(inside, v, 0) for v in values]
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

    nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    totals = lax.fori_loop(0, mine, one_tile, (nothing,) * sums)
    if outputs:
        plgpu.wait_smem_to_gmem(0)
        return

    mine_and_others, complete = of
    for k, total in enumerate(totals):
        mine_and_others[warpgroup, k] = total.reshape(_folded(cut))
    plgpu.barrier_arrive(complete)
    plgpu.barrier_wait(complete)

    @pl.when(warpgroup == 0)
    def _():
        each = [(w, r) for w in range(WARPGROUPS) for r in range(_folded(cut)[0])]
        in_order = plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=2)
        for k in range(sums):
            rows = [load(mine_and_others.at[w, k, r], layout=in_order) for w, r in each]
            results[0][slab, block, k] = sum(rows[1:], rows[0])
