"""The mesh ("data", "fsdp"), the FSDP rule, and the batch's sharding.

Shardings are read off shapes, so nothing here knows parameters by name.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


# ---- The mesh ----------------------------------------------------------------


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices; one of the two sizes may be -1 and takes what is left.

    Devices of several TPU slices: `data` is split over the slices first. So only the
    sum of the gradients crosses the network between them, and a copy of the
    parameters never does.

    Raises: ValueError when the sizes do not multiply to the number of devices, or the
      slices do not divide `data`.
    """
    devices = list(devices or jax.devices())
    count = len(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})

    shape = [data, fsdp]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = count // known if known else 0
    if min(shape) < 1 or int(np.prod(shape)) != count:
        raise ValueError(
            f"data = {data} and fsdp = {fsdp} do not make a mesh of the {count} devices"
        )
    data, fsdp = shape
    if data % slices:
        raise ValueError(
            f"data = {data} is not a multiple of the {slices} slices that the "
            f"{count} devices are in"
        )

    # On a TPU torus, a size that is no product of whole axes of the slice takes a
    # part of one. Without the flag make_mesh would refuse it.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            (data, fsdp),
            devices=devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp),
            (slices, 1),
            devices=devices,
            allow_split_physical_axes=True,
        )
    # Auto: GSPMD decides what no constraint names. JAX's own default is Explicit.
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def on_mesh(fn: Callable, mesh: Mesh) -> Callable:
    """`fn` traced with `mesh` in its context, which partitioning.py reads."""

    @functools.wraps(fn)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """XLA's options for a program that takes gradients, by the platform of the mesh.

    A TPU's compiler would rather multiply a weight's gradient part by
    part, and send one part while it computes the next. Every part reads
    the activations again, copied into an order of its own: a third of the
    bytes of LiT-XL/2's step at 512 pixels. So the threshold, in MiB, from
    which it does that is set out of reach.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


# ---- Parameters --------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_sharding(shapes: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """Shards the largest axis of each leaf that `fsdp` divides.

    Works on parameters, EMA and optimizer state alike: it sees shapes only.

    Args:
      shapes: a tree of arrays or ShapeDtypeStructs.
      min_size: leaves of fewer elements are replicated: a gather of theirs would
        cost more than it saves.
    Returns: a tree of NamedSharding.
    """
    fsdp = mesh.shape["fsdp"]

    def shard(leaf):
        # The first axis of a leaf with more than two axes is left whole: of the
        # scanned blocks it is the layer axis, which the scan slices one by one.
        axes = range(1 if leaf.ndim > 2 else 0, leaf.ndim)
        dividable = [axis for axis in axes if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or leaf.size < min_size or not dividable:
            return NamedSharding(mesh, PartitionSpec())
        # The largest: its parts are the least likely to be smaller than a tile.
        axis = max(dividable, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(shard, shapes)


# ---- The batch ---------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over both mesh axes."""
    return NamedSharding(mesh, BATCH_SPEC)


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that are on this process's devices, ascending."""
    indices = sharding.addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in indices.values()]))


def map_rows(function: Callable, mesh: Mesh) -> Callable:
    """Jits function(params, rows), each device working on its own rows alone.

    The parameters are on every device. A loop over rows inside, which bounds memory,
    is a loop of each device.
    """
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), BATCH_SPEC),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )
    return jax.jit(mapped)


def check_batch(batch_size: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Checks that there is a batch, and that the devices of the mesh divide it.

    Args: field: what the error calls the batch's size.
    Raises: ValueError.
    """
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{field} = {batch_size} is not a multiple of the {mesh.size} devices of "
            f"the mesh {dict(mesh.shape)}"
        )
