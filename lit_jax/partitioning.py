"""The one place where kernels and models meet the mesh.

Here is what GSPMD cannot work out by itself, and has to be told. The mesh is that of
jax.sharding.use_abstract_mesh around the trace; `sharding.on_mesh` sets it. Without
one, nothing is done.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def _free_axes() -> tuple[str, ...]:
    """The axes of the mesh in context that no jax.shard_map around has taken."""
    mesh = jax.sharding.get_abstract_mesh()  # empty where there is none
    return tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)


def split_rows(
    kernel: Callable,
    rows: tuple[Any, ...],
    whole: tuple[Any, ...] = (),
) -> jax.Array:
    """kernel(*rows, *whole), each device working on its own rows of the batch.

    GSPMD cannot look into a kernel, and would give each device the whole batch.
    Without a mesh, on one device, or where a jax.shard_map around has split the rows
    already, the kernel is simply called.

    Args:
      kernel: returns an array (B, ...).
      rows: arrays (B, ...), split over the mesh in context.
      whole: arrays, or None, that every device needs in full.
    Raises: ValueError where the devices do not divide B.
    """
    axes = _free_axes()
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in axes)
    if devices == 1:
        return kernel(*rows, *whole)
    if rows[0].shape[0] % devices:
        raise ValueError(
            f"a fused kernel splits the batch over the mesh: "
            f"{rows[0].shape[0]} rows are no multiple of its {devices} devices"
        )

    # Only the free axes: those that a caller's shard_map took are split already.
    split = PartitionSpec(axes)
    full = PartitionSpec()
    mapped = jax.shard_map(
        kernel,
        in_specs=(split,) * len(rows) + (full,) * len(whole),
        out_specs=split,
        axis_names=set(axes),
        # A kernel's outputs do not say over which axes they vary.
        check_vma=False,
    )
    return mapped(*rows, *whole)


def constrain_rows(x: jax.Array) -> jax.Array:
    """x (B, ...) with the rows split over the whole mesh.

    Left to itself the partitioner may split activations another way between layers.
    """
    axes = _free_axes()
    if not axes:  # inside a shard_map the rows are those of this device
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def gather_weights(params: Any, dtype: Any) -> Any:
    """One layer's parameters whole on every device.

    Left to itself the partitioner may keep the weights split and gather the
    activations, which are many times larger. Matrices are cast to `dtype`, in which
    they are used, before they travel: that halves the traffic.
    """
    if not _free_axes():
        return params

    def gather(path, p):
        # A table that is added stays float32; a matrix is multiplied in `dtype`. One in int8 has
        # its parts below its name.
        is_kernel = getattr(path[-1], "key", "") == "kernel"
        return _gather(p.astype(dtype) if is_kernel and p.ndim == 2 else p)

    return jax.tree_util.tree_map_with_path(gather, params)


@jax.custom_vjp
def _gather(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _gather_fwd(x):
    return _gather(x), None


def _gather_bwd(_, gradient):
    # The constraint's own transpose would make the gradient whole on every device
    # too: summed over all of them, and only then sliced.
    return (gradient,)


_gather.defvjp(_gather_fwd, _gather_bwd)
