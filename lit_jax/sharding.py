"""The mesh ("data", "fsdp"), the FSDP rule that reads shardings off shapes, and the batch's sharding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one of the two sizes may be -1 and takes what is left.

    Devices of several TPU slices: `data` is split over them first, so that only the sum of the gradients crosses the
    network between them, and a copy of the parameters never does.
    Raises: ValueError when the sizes do not multiply to the number of devices, or the slices do not divide `data`.
    """
    devices = list(devices or jax.devices())
    count, slices = len(devices), len({getattr(device, "slice_index", 0) for device in devices})
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = count // known if known else 0
    if min(shape) < 1 or int(np.prod(shape)) != count:
        raise ValueError(
            f"mesh.data = {data} and mesh.fsdp = {fsdp} do not make a mesh of the {count} devices"
        )
    data, fsdp = shape
    if data % slices:
        raise ValueError(
            f"mesh.data = {data} is not a multiple of the {slices} slices that the {count} devices are in"
        )
    # On a TPU torus a size that is no product of whole axes of the slice takes a part of one.
    how = dict(devices=devices, allow_split_physical_axes=True)
    grid = (
        mesh_utils.create_device_mesh((data, fsdp), **how)
        if slices == 1
        else mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), **how)
    )
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over both mesh axes."""
    return NamedSharding(mesh, BATCH_SPEC)


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in ascending order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fsdp_sharding(shapes: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """Shards each leaf's largest dividable axis over `fsdp`; leaves under `min_size` elements are replicated.

    Works on parameters, EMA and optimizer state alike: it sees shapes only. The first axis of a leaf with more than two
    axes is left whole: for the scanned blocks it is the layer axis, which the scan slices one by one.
    """
    fsdp = mesh.shape["fsdp"]

    def spec(leaf):
        axes = range(1 if leaf.ndim > 2 else 0, leaf.ndim)
        dividable = [axis for axis in axes if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or leaf.size < min_size or not dividable:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(dividable, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(spec, shapes)


def on_mesh(fn: Callable, mesh: Mesh) -> Callable:
    """`fn` traced with `mesh` in its context, for what the partitioner has to be told: partitioning.py."""

    @functools.wraps(fn)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def map_rows(function: Callable, mesh: Mesh) -> Callable:
    """Jits function(params, rows) with the parameters on every device; each device works on its own rows alone.

    So a loop over rows inside, which bounds memory, is a loop of each device.
    """
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), BATCH_SPEC),
            out_specs=BATCH_SPEC,
            check_vma=False,
        )
    )


def check_batch(batch_size: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises ValueError unless the devices of the mesh divide the batch, and there is one."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{field} = {batch_size} is not a multiple of the {mesh.size} devices of the mesh "
            f"{dict(mesh.shape)}"
        )
