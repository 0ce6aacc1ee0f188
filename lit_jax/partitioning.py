"""The one place where kernels and models meet the mesh: what GSPMD cannot work out by itself, and has to be told.

The mesh is that of jax.sharding.use_abstract_mesh around the trace (`sharding.on_mesh` sets it). Without one, nothing is done.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def _free_axes() -> tuple[str, ...]:
    """The axes of the context's mesh that no jax.shard_map around has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)


def split_rows(kernel: Callable, rows: tuple[Any, ...], whole: tuple[Any, ...] = ()) -> jax.Array:
    """kernel(*rows, *whole), with the leading axis of `rows` and of the result split over the context's mesh.

    Without a mesh, on one device, or where a jax.shard_map around has split them already, the kernel is simply called.

    Args: rows: arrays (B, ...). whole: arrays, or None, that every device needs in full.
    Raises: ValueError where the devices do not divide B.
    """
    axes = _free_axes()
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
    if devices == 1:
        return kernel(*rows, *whole)
    if rows[0].shape[0] % devices:
        raise ValueError(
            f"a fused kernel splits the batch over the mesh: {rows[0].shape[0]} rows are no multiple of its "
            f"{devices} devices"
        )
    split, full = PartitionSpec(axes), PartitionSpec()
    in_specs = (split,) * len(rows) + (full,) * len(whole)
    return jax.shard_map(
        kernel, in_specs=in_specs, out_specs=split, axis_names=set(axes), check_vma=False
    )(*rows, *whole)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps the leading axis split over the whole mesh: each device works on its own rows of the batch."""
    axes = _free_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def gather_weights(params: Any, dtype: Any) -> Any:
    """One layer's parameters whole on every device; matrices in `dtype`, in which they are used, to halve the traffic.

    Left to itself the partitioner may keep the weights split and gather the activations, which are many times larger.
    """
    if not _free_axes():
        return params
    return jax.tree.map(lambda p: _gather(p.astype(dtype) if p.ndim == 2 else p), params)


@jax.custom_vjp
def _gather(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


# The constraint's own transpose would make the gradient whole on every device too: summed over all of them, then sliced.
_gather.defvjp(lambda x: (_gather(x), None), lambda _, gradient: (gradient,))
