"""Flags for the CPU's compiler in tests, whose programs are small and mostly run once."""

import importlib.metadata

# A program's machine code is made in one piece: 32 pieces side by side, as usual, take more work.
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
# The fusion emitters take two thirds of the time that a training step's compilation takes without
# optimisations. Only JAX 0.10 can go without them. No libtpu knows these flags: they end the
# process.
if importlib.metadata.version("jax").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
