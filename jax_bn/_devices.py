"""Several devices: the only collectives, and how arrays are spread, by their types.

Under `shard_map(check_vma=True)` JAX keeps track of that; in all other modes nothing is known to
vary, and each device is on its own.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P


def psum(spec, tree):
    """The sum over the devices that share statistics; the tree itself without an `axis_name`."""
    if not spec.axis_name:
        return tree
    try:
        return lax.psum(tree, spec.axis_name, axis_index_groups=spec.axis_index_groups)
    except NotImplementedError as e:
        if spec.axis_index_groups is None:
            raise
        raise NotImplementedError(
            "axis_index_groups: JAX has no groups under vmap and shard_map(check_vma=True). Use "
            "shard_map(check_vma=False) or pmap, or two mesh axes, one of which is axis_name"
        ) from e


def cotangent_of(primal, here, everywhere=None, axis_name=()):
    """The cotangent `here`, summed over the axes along which it varies and `primal` does not.

    Under `shard_map(check_vma=True)` a cotangent must vary as its primal does: for a scale that all
    devices share that is the sum over them, which is `everywhere` if it was taken over just these
    axes. In all other modes nothing is known to vary, and each device returns its own.
    """
    missing = _varying(here) - _varying(primal)
    if not missing:
        return here
    if everywhere is not None and missing == set(axis_name):
        return everywhere
    return lax.psum(here, tuple(sorted(missing)))


def varying_as(v, *others):
    """v, varying along the device axes of the others too; transposed, a sum over these."""
    axes = frozenset().union(*(_varying(a) for a in others if a is not None))
    missing = axes - _varying(v)
    return lax.pcast(v, tuple(sorted(missing)), to="varying") if missing else v


def placed_as(v, x) -> Any:
    """v spread over explicit mesh axes as x is, along all axes that they share; transposed, back.

    Under a mesh of automatic axes, or none, types say nothing of it, and nothing is done.
    """
    if v is None:
        return None
    here, there = jax.typeof(v).sharding, jax.typeof(x).sharding
    axes = zip(there.spec, v.shape, x.shape, strict=True)
    spec = P(*(axis if n == of_x else None for axis, n, of_x in axes))
    if here.spec == spec:
        return v
    mesh = here.mesh if there.mesh.empty else there.mesh
    return jax.sharding.reshard(v, NamedSharding(mesh, spec))


def _varying(a) -> frozenset[str]:
    """The device axes along which `a` is known to differ."""
    return frozenset(jax.typeof(a).manual_axis_type.varying)
