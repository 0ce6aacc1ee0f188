"""Compiles XL/2's linear attention, both passes, for an H100, on a machine without a GPU.

    python tests/hopper_compiler.py FOLDER

It needs the CUDA compiler that jax[cuda13] brings, and writes FOLDER/kernels.json: launches, bytes
of temporaries, and what ptxas says of each kernel.
"""

import functools
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def find_ptxas() -> str:
    """The compiler of the wheels, not one that the machine happens to have."""
    for folder in sys.path:
        for path in glob.glob(os.path.join(folder, "nvidia", "*", "bin", "ptxas")):
            return path
    raise FileNotFoundError("ptxas was not found: pip install 'jax[cuda13]'")


def compile_for_h100(function: Callable, *arrays: Any) -> Any:
    """The compiled program. Args: arrays: ShapeDtypeStructs, or trees of them."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
    )
    card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("card",), abstract_device=card)):
        traced = jax.jit(function).trace(*placed)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def compile_both_passes(layers: int = 0, side: int = 32) -> Any:
    """The compiled output and gradients at D = 1152, 4 heads, B T = 32,768, bfloat16.

    Args:
      layers: of a scan with remat "dots", whose layer has q, k and v = its input; 0: the op alone.
      side: tokens along a side of the image.
    """
    import jax
    import jax.numpy as jnp

    from lit_jax.kernels.linear_attention import linear_attention
    from lit_jax.models.blocks import REMAT_POLICIES

    op = functools.partial(
        linear_attention, num_heads=4, grid=(side, side), implementation="pallas_gpu"
    )

    def layer(x, _, conv_kernel, conv_bias):
        kv = jnp.concatenate([x, x], axis=-1)
        return op(x, kv, conv_kernel, conv_bias), None

    def many(x, _, conv_kernel, conv_bias):
        kept = jax.checkpoint(layer, policy=REMAT_POLICIES["dots"], prevent_cse=False)
        step = functools.partial(kept, conv_kernel=conv_kernel, conv_bias=conv_bias)
        return jax.lax.scan(step, x, None, length=layers)[0]

    def both(q, kv, conv_kernel, conv_bias, do):
        out, vjp = jax.vjp(many if layers else op, q, kv, conv_kernel, conv_bias)
        return out, vjp(do)

    tokens = (32768 // side**2, side**2)
    arrays = (
        jax.ShapeDtypeStruct((*tokens, 1152), jnp.bfloat16),
        jax.ShapeDtypeStruct((*tokens, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((5, 5, 288), jnp.float32),
        jax.ShapeDtypeStruct((288,), jnp.float32),
        jax.ShapeDtypeStruct((*tokens, 1152), jnp.bfloat16),
    )
    return compile_for_h100(both, *arrays)


def launches(compiled: Any) -> int:
    """How many kernels of Mosaic stand in a compiled program; a loop's body counts once."""
    return compiled.as_text().count('custom_call_target="mosaic_gpu')


def read_ptxas(ptx: str) -> dict:
    """Threads, registers, spilled bytes and warnings of the kernel in a PTX file."""
    arguments = [find_ptxas(), "-arch=sm_90a", "-v", "-o", ptx + ".cubin", ptx]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    log = ran.stdout + ran.stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", pathlib.Path(ptx).read_text())
    registers = re.search(r"Used (\d+) registers", log)
    assert threads and registers and spilled, log
    return {
        "threads": int(threads[1]),
        "registers": int(registers[1]),
        "spilled_bytes": sum(map(int, spilled)),
        "warnings": re.findall(r"Potential Performance Loss: .*", log),
    }


def cut_swizzles(mlir: str) -> list[str]:
    """Slices of a swizzled tile that start within its pattern of eight rows.

    Mosaic counts the swizzle of a slice from the slice's start, a copy that of the tile from the
    tile's: such a slice is read in the wrong order, which no interpreter shows.
    """
    pattern = r"memref\.subview %\S+?\[([^]]*)\] \[([^]]*)\] .*?(in_transforms = .*?\]\])"
    slices = re.findall(pattern, mlir)
    found = []
    for offsets, sizes, transforms in slices:
        row = offsets.split(", ")[-2]
        # A start that is no number cannot be judged, and counts.
        if "swizzle" in transforms and not (row.isdigit() and int(row) % 8 == 0):
            found.append(f"[{offsets}] of [{sizes}]")
    return found


def main(folder: str) -> None:
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_MLIR_PASSES": "1",
        "PATH": os.path.dirname(find_ptxas()) + os.pathsep + os.environ["PATH"],
    }
    os.environ.pop("XLA_FLAGS", None)
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    compiled = compile_both_passes()
    # Mosaic numbers the kernels in the order in which it meets them.
    kernels = {
        re.sub(r"_\d+$", "", pathlib.Path(ptx).stem): read_ptxas(ptx)
        for ptx in glob.glob(os.path.join(folder, "*.ptx"))
    }
    for mlir in glob.glob(os.path.join(folder, "*.after_layout_inference.txt")):
        name = re.sub(r"_\d+\.after_layout_inference$", "", pathlib.Path(mlir).stem)
        kernels[name]["cut_swizzles"] = cut_swizzles(pathlib.Path(mlir).read_text())
    found = {
        "kernels": kernels,
        "launches": launches(compiled),
        "launches_of_a_layer": launches(compile_both_passes(layers=2)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    pathlib.Path(folder, "kernels.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
