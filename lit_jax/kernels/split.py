"""The one place where a kernel meets the mesh: GSPMD cannot split a Pallas call, so each device runs it on its own rows."""
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
