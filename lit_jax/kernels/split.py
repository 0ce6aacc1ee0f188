"""The one place where kernels and models meet the mesh: what GSPMD cannot work out by itself, and has to be told.

The mesh is that of jax.sharding.use_abstract_mesh around the trace (`sharding.on_mesh` sets it). Without one, nothing is done.
"""
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def split_rows(kernel: Callable, rows: tuple[Any, ...], whole: tuple[Any, ...] = ()) -> jax.Array:
    """kernel(*rows, *whole), with the leading axis of `rows` and of the result split over all axes of the context's mesh.

    The mesh is that of jax.sharding.use_abstract_mesh around the trace (`sharding.on_mesh` sets it); without one, or on one
    device, the kernel is simply called.

    Args: rows: arrays (B, ...). whole: arrays, or None, that every device needs in full.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return kernel(*rows, *whole)
    split, full = PartitionSpec(mesh.axis_names), PartitionSpec()
    in_specs = (split,) * len(rows) + (full,) * len(whole)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=split, check_vma=False)(*rows, *whole)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps the leading axis split over the whole mesh: each device works on its own rows of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def gather_weights(params: Any, dtype: Any) -> Any:
    """One layer's parameters whole on every device; matrices in `dtype`, in which they are used, to halve the traffic.

    Left to itself the partitioner may keep the weights split and gather the activations, which are many times larger.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(lambda p: _gather(p.astype(dtype) if p.ndim == 2 else p), params)


@jax.custom_vjp
def _gather(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


# The constraint's own transpose would make the gradient whole on every device too: summed over all of them, then sliced.
_gather.defvjp(lambda x: (_gather(x), None), lambda _, gradient: (gradient,))
