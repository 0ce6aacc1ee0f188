"""What the vendors say of their chips, one table, by JAX's `device_kind`.

A device of JAX is one chip. Where a TPU chip has two cores (v4, v5p), they are one device, and all
figures here are of both together. What a running chip can be asked is not in the table: the number
of its cores (`jax.Device.num_cores`) and the VMEM of a core (`pltpu.get_tpu_info`).
"""

import dataclasses

GB = 1e9
GiB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of any vendor."""

    peak_flops: float  # FLOP/s, bfloat16 operands, dense
    bandwidth: float  # bytes/s of HBM


@dataclasses.dataclass(frozen=True)
class TPU(Chip):
    """One TPU chip, with what an estimate ahead of time needs besides."""

    memory: float  # bytes of HBM that the compiler lets a program use, a little less than there are
    clock: float  # Hz; a core issues one bundle of instructions a cycle
    ici: float  # bytes/s that the chip sends over all its links inside a slice
    dcn: float  # bytes/s between slices: the chip's share of its host's network card


V4 = TPU(
    peak_flops=275e12,
    bandwidth=1228 * GB,
    memory=30.75 * GiB,
    clock=1.05e9,
    ici=300 * GB,
    dcn=6.25 * GB,
)
V5E = TPU(
    peak_flops=197e12,
    bandwidth=819 * GB,
    memory=15.75 * GiB,
    clock=1.5e9,
    ici=200 * GB,
    dcn=3.125 * GB,
)
V5P = TPU(
    peak_flops=459e12,
    bandwidth=2765 * GB,
    memory=95.73 * GiB,
    clock=1.75e9,
    ici=600 * GB,
    dcn=6.25 * GB,
)
V6E = TPU(
    peak_flops=918e12,
    bandwidth=1640 * GB,
    memory=31.24 * GiB,
    clock=1.75e9,
    ici=400 * GB,
    dcn=6.25 * GB,
)

# libtpu says "TPU v5 lite" where the cloud says v5e, so both names are here.
TPUS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
}

GPUS = {
    "NVIDIA A100-SXM4-40GB": Chip(peak_flops=312e12, bandwidth=1555 * GB),
    "NVIDIA A100-SXM4-80GB": Chip(peak_flops=312e12, bandwidth=2039 * GB),
    "NVIDIA A100 80GB PCIe": Chip(peak_flops=312e12, bandwidth=1935 * GB),
    "NVIDIA H100 80GB HBM3": Chip(peak_flops=989e12, bandwidth=3350 * GB),
    "NVIDIA H100 PCIe": Chip(peak_flops=756e12, bandwidth=2000 * GB),
    "NVIDIA H200": Chip(peak_flops=989e12, bandwidth=4800 * GB),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one chip; None for a chip that the table does not know, or a CPU."""
    chip = TPUS.get(device_kind) or GPUS.get(device_kind)
    return chip.peak_flops if chip else None
