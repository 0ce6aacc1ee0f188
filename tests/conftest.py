"""The suite runs on a CPU that pretends to be eight devices, with implicit rank promotion forbidden."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
)  # libtpu only compiles here: do not look for a TPU's metadata server
os.environ.setdefault(
    "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
)  # test processes side by side each load the compiler

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
