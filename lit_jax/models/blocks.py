"""The blocks of a transformer as one scan over its layers, for all models here."""

import functools
from typing import Any

import flax.linen as nn
import jax

from lit_jax.models.attention import PROJECTED
from lit_jax.partitioning import gather_weights

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED),
    ),
}


def scan_blocks(
    model: nn.Module,
    block: type[nn.Module],
    depth: int,
    *,
    dtype: Any,
    remat: str = "none",
    shared_inputs: int = 0,
) -> Any:
    """A class of modules that applies `depth` blocks one after the other.

    Every leaf gets a leading layer axis. Weights are gathered from the mesh layer by layer.

    Args:
      model: the module in whose method the blocks are made.
      block: (carry, *inputs) -> (carry, None).
      dtype: in which the blocks use their matrices.
      remat: a name of REMAT_POLICIES.
      shared_inputs: how many inputs all layers read; 0: None is their one input.
    """
    # Inside remat: the backward pass gathers a layer's weights again, and does not keep all.
    gathered = nn.map_variables(
        block,
        "params",
        functools.partial(gather_weights, dtype=dtype),
        init=model.is_initializing(),
        mutable=model.is_initializing(),
    )
    if remat != "none":
        gathered = nn.remat(gathered, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        gathered,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * shared_inputs or 0,
        length=depth,
    )
