"""What the vendors say of their chips, one table, by JAX's `device_kind`.

All figures are of one device of JAX, which is one chip, but for TPU7x: there each of the chip's two
cores is a device, with half of the memory and of the links. The two cores of a v4 or v5p chip are
one device, and the figures are of both together. What a running chip can be asked is not in the
table: the number of a device's cores (`jax.Device.num_cores`) and the VMEM of a core
(`pltpu.get_tpu_info`).
"""

import dataclasses

GB = 1e9
GiB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of any vendor."""

    peak_flops: float  # FLOP/s, bfloat16 operands, dense
    bandwidth: float  # bytes/s of HBM


@dataclasses.dataclass(frozen=True)
class TPU(Chip):
    """One device of a TPU, with what an estimate ahead of time needs besides."""

    memory: float  # bytes of HBM that the compiler lets a program use, a little less than there are
    clock: float  # Hz; a core issues one bundle of instructions a cycle
    ici: float  # bytes/s that the device sends over all its links inside a slice
    dcn: float  # bytes/s between slices: the device's share of its host's network card
    per_chip: int = 1  # devices


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
    dcn=12.5 * GB,
)
# In fp8 it multiplies twice as fast. Google does not tell the clock: this one is that at which
# matrix units like v6e's reach the peak.
TPU7X = TPU(
    peak_flops=2307e12 / 2,
    bandwidth=7380 * GB / 2,
    memory=94.74 * GiB,
    clock=2.2e9,
    ici=600 * GB / 2,
    dcn=12.5 * GB / 2,
    per_chip=2,
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
    "TPU7x": TPU7X,
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
    """Dense bfloat16 FLOP/s of one device; None for one that the table does not know, or a CPU."""
    chip = TPUS.get(device_kind) or GPUS.get(device_kind)
    return chip.peak_flops if chip else None
