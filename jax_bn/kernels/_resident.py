"""One kernel that keeps a slab of x, all its examples, in shared memory, and sweeps over it there.

Knows slabs, and no batch normalization: which sweeps, and what they compute, is a `program`.

The way of a slab. Batch normalization sums over the examples of a feature, and wants the sums at
each of them. Where all examples of a few features fit into the shared memory of one thread block,
nothing has to leave the chip in between: x is read once and the result written once, one launch
does what takes several where blocks have to add up their sums, and no other kernel packs vectors
before it or adds partial sums after it. It is the form for few examples, where launches decide.

x is seen as (groups, together, features): so many examples stand together as 32 lanes read at once,
8 bytes each. A grid of a block for each slab of columns, and in it WARPGROUPS:

    memory --TMA--> shared memory --> registers, float32 --> sums --> vectors, in every thread
                    shared memory --> registers, vectors --> shared memory --TMA--> memory

A warpgroup copies boxes of its slab on its own: box w, w + WARPGROUPS, ... for warpgroup w. They
all have a place, so all copies run from the start, and none waits for a place to be free. A barrier
for each says that it has arrived, and the first sweep waits for it. What is written goes into the
place that was read, and leaves from there.

A run is what a warpgroup has in registers: a group for each of its four warps, of which a thread
has 8 bytes of one example. So a warp sums over its examples in registers, by shuffles. The sums of
all warps of the block stand in shared memory, and every warp adds them up: its lanes read a row
each, and sum by shuffles again. (If each lane read all rows, it would take longer than all else.)
All do it in one order: every thread of a column gets the same bits, and so do two runs. A vector of
the slab is read straight into this layout, from memory too, and repeated in no memory.

(Two things that Mosaic, as of JAX 0.12, does not do: a sum across the warps of a warpgroup has one
place in shared memory for all warpgroups of the block; and part of a matrix, at a row known only
when the kernel runs, may be swizzled otherwise than all of it. So a warpgroup has a whole one.)

The last box may reach beyond x. TMA fills with zeros what it reads there, and drops what it writes
there; in sums these groups are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from jax_bn.kernels._slabs import WARPGROUPS, WARPS, Cut, fitting, layouts

load: Any = plgpu.load  # whose index older versions ask for

MOST_SUMS = 3  # of a program


def resident(
    program: Callable, arrays: Sequence, vectors: Sequence, outputs: int, emitted: int, name: str
) -> list:
    """Runs `program` for each slab, in one kernel.

    :: arrays [N, C], vectors [1, C] -> so many outputs [N, C], in x's dtype, and emitted [C]

    program :: `Slab`, a vector of the slab for each given -> so many to emit
    """
    x = arrays[0]
    features, dtype = x.shape[-1], x.dtype
    cut = fitting(x.size // features, features, dtype.itemsize, len(arrays))
    assert cut is not None
    grouped = (cut.groups, cut.together, features)
    out_type = [jax.ShapeDtypeStruct(grouped, dtype)] * outputs
    out_type += [jax.ShapeDtypeStruct((features,), jnp.float32)] * emitted

    boxes = (WARPGROUPS, cut.share)
    slot = plgpu.SMEM((*boxes, cut.box, cut.together, cut.columns), dtype)
    arrived = plgpu.Barrier(num_arrivals=1, num_barriers=boxes)
    scratch: list = [slot] * len(arrays) + [arrived] * len(arrays)
    scratch += [plgpu.SMEM((cut.columns,), jnp.float32)] * emitted
    scratch.append(plgpu.SMEM((MOST_SUMS, WARPGROUPS, WARPS, cut.columns), jnp.float32))
    scratch.append(plgpu.Barrier(num_arrivals=WARPGROUPS))

    def body(*refs):
        of, k = iter(refs), len(arrays)
        sources, given, results, places, slots, barriers, vectors_out = (
            [next(of) for _ in range(n)] for n in (k, len(vectors), outputs, emitted, k, k, emitted)
        )
        slab = Slab(cut, sources, results, slots, barriers, *of)
        slab.fetch()
        emits = program(slab, *map(slab.vector, given))
        slab.emit(emits, vectors_out, places)

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(cut.slabs,),
        grid_names=("slab",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=tuple(scratch),
    )
    results = kernel(*(a.reshape(grouped) for a in arrays), *(v.reshape(-1) for v in vectors))
    return [*(v.reshape(x.shape) for v in results[:outputs]), *results[outputs:]]


class Slab:
    """What one warpgroup does with its share of a slab; in all of them a program runs in step."""

    def __init__(self, cut: Cut, sources, results, slots, arrived, partial_sums, complete):
        self._cut, self._sources, self._results = cut, sources, results
        self._slots, self._arrived = slots, arrived
        self._partial_sums, self._complete = partial_sums, complete
        self._awaited = 0  # arrays whose boxes have arrived, in what is traced so far
        self._summed = 0
        self._warpgroup = lax.axis_index("warpgroup")
        self._columns = pl.ds(lax.axis_index("slab") * cut.columns, cut.columns)
        self._mine = lax.div(cut.boxes - self._warpgroup + WARPGROUPS - 1, WARPGROUPS)

        self._layout, self._of_warps = layouts(cut)
        self._of_vectors = self._layout.reduce((0, 1))

    def vector(self, ref):
        """This slab's part. :: [C] in memory -> [columns]"""
        return load(ref.at[self._columns], layout=self._of_vectors, optimized=False)

    def first_example(self):
        """Of x. :: [columns], float32"""
        here = self._sources[0].at[0, 0, self._columns]
        return load(here, layout=self._of_vectors, optimized=False).astype(jnp.float32)

    def fetch(self):
        """Starts to copy all that is mine."""
        for i in range(self._cut.share):

            @pl.when(i < self._mine)
            def _(i=i):
                for source, slot, barrier in zip(
                    self._sources, self._slots, self._arrived, strict=True
                ):
                    mine = (self._warpgroup, i)
                    plgpu.copy_gmem_to_smem(
                        source.at[self._place(i)], slot.at[mine], barrier.at[mine]
                    )

    def sums(self, terms: Callable, *vectors, sums: int, arrays: int) -> list:
        """The sums of what `terms` makes of so many of the arrays, over all examples.

        terms :: runs of the arrays, of each of the vectors -> so many runs; all in float32
        """
        vectors = tuple(map(self._along_a_run, vectors))
        group = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, self._cut.run, 0), self._layout)

        def one_run(i, j, values, totals):
            values = terms(*values, *vectors)
            if self._cut.groups % self._cut.box:
                inside = group < self._cut.groups - self._first_group(i) - j * WARPS
                values = [jnp.where(inside, v, 0) for v in values]
            return tuple(t + v for t, v in zip(totals, values, strict=True))

        nothing = plgpu.layout_cast(jnp.zeros(self._cut.run, jnp.float32), self._layout)
        totals = self._sweep(one_run, (nothing,) * sums, arrays)

        first, self._summed = self._summed, self._summed + sums  # where no other one still reads
        assert self._summed <= MOST_SUMS
        places = [self._partial_sums.at[first + k] for k in range(sums)]
        for place, total in zip(places, totals, strict=True):
            place[self._warpgroup] = jnp.sum(total, axis=1)
        plgpu.barrier_arrive(self._complete)
        plgpu.barrier_wait(self._complete)

        def of_all(place):
            of_warps = [place.at[w] for w in range(WARPGROUPS)]
            one, *others = (load(v, layout=self._of_warps, optimized=False) for v in of_warps)
            return plgpu.layout_cast(jnp.sum(sum(others, one), axis=0), self._of_vectors)

        return [of_all(place) for place in places]

    def write(self, terms: Callable, *vectors):
        """Writes what `terms` makes of the arrays: the results, in place of the first of them."""
        vectors = tuple(map(self._along_a_run, vectors))

        def one_run(i, j, values, _):
            for slot, v in zip(self._slots, terms(*values, *vectors), strict=False):
                slot[self._place_of_run(i, j)] = v.astype(slot.dtype)
            return ()

        def one_box(i):
            plgpu.commit_smem()  # before a store reads the box
            for slot, result in zip(self._slots, self._results, strict=False):
                plgpu.copy_smem_to_gmem(slot.at[self._warpgroup, i], result.at[self._place(i)])

        self._sweep(one_run, (), len(self._slots), one_box)

    def emit(self, vectors, slots, places):
        """Writes vectors of the slab, which all warpgroups have, and waits for all that is written.

        By TMA as well: a store out of this layout would be one number at a time.
        """

        @pl.when(self._warpgroup == 0)
        def _():
            for slot, v in zip(slots, vectors, strict=True):
                slot[...] = v
            plgpu.commit_smem()
            for slot, place in zip(slots, places, strict=True):
                plgpu.copy_smem_to_gmem(slot, place.at[self._columns])

        plgpu.wait_smem_to_gmem(0)

    def _sweep(self, one_run: Callable, carry, arrays: int, after_box: Callable | None = None):
        new = self._arrived[self._awaited : arrays]
        self._awaited = max(self._awaited, arrays)

        def one_box(i, carry):
            for barrier in new:
                plgpu.barrier_wait(barrier.at[self._warpgroup, i])
            for j in range(self._cut.box // WARPS):
                runs = [slot.at[self._place_of_run(i, j)] for slot in self._slots[:arrays]]
                values = [load(run, layout=self._layout, optimized=False) for run in runs]
                carry = one_run(i, j, [v.astype(jnp.float32) for v in values], carry)
            if after_box is not None:
                after_box(i)
            return carry

        return lax.fori_loop(0, self._mine, one_box, carry)

    def _along_a_run(self, v):
        """:: [columns] -> a run"""
        return plgpu.layout_cast(lax.broadcast_in_dim(v, self._cut.run, (2,)), self._layout)

    def _first_group(self, i):
        """Of the i-th of my boxes."""
        return (self._warpgroup + i * WARPGROUPS) * self._cut.box

    def _place(self, i):
        """Of that box in memory."""
        return pl.ds(self._first_group(i), self._cut.box), slice(None), self._columns

    def _place_of_run(self, i, j):
        """In shared memory."""
        return self._warpgroup, i, pl.ds(j * WARPS, WARPS)
