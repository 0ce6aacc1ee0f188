"""Flags for the CPU's compiler in tests, whose programs are small and mostly run once."""

import importlib.metadata

# The fusion emitters take two thirds of the time that a training step's compilation takes without
# optimisations. Only JAX 0.10 can go without them. No libtpu knows the flag: it ends the process.
XLA_FLAGS = ""
if importlib.metadata.version("jax").startswith("0.10."):
    XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false"
