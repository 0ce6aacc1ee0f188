"""The blocks of a transformer as one scan over its layers, for all models here."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_jax.models.attention import PROJECTED, make_attention
from lit_jax.partitioning import gather_weights

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED),
    ),
}


EPSILON = 1e-12  # of a mean square: an attention that gives nothing has no relative error
# The collection in which a block leaves what its attention read and gave, where a
# caller of `apply` asks for it (mutable=[ATTENTION]).
ATTENTION = "attention"


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
        variable_axes={"params": 0, ATTENTION: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * shared_inputs or 0,
        length=depth,
    )


def attend(block: nn.Module, attn: Any, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """attn(x, grid); what it reads and gives stays in the collection ATTENTION of its block."""
    out = attn(x, grid)
    block.sow(ATTENTION, "read", x)
    block.sow(ATTENTION, "gave", out)
    return out


def attention_error(model: Any, params: Any, seen: Any, grid: tuple[int, int]) -> jax.Array:
    """How far each attention of a model is from that of its teacher on the teacher's own input.

    The layer-wise regression of Grafting (arXiv 2506.05340): no layer sees the errors of those
    before it, and gradients stay in each layer's attention. The squared distance is relative to
    the mean square of the teacher's attention in that layer, so that all layers count alike.

    Args:
      model, params: the student, whose parameters are `blocks/attn` and more.
      seen: the collection ATTENTION of the teacher, of as many blocks and as wide; detached here.
      grid: (h, w) in tokens.
    Returns: (B,) float32, the mean over the layers.
    """
    attn = make_attention(model.config, model.implementation, model.dtype, parent=None)
    # A list of one: `sow` appends.
    (read,), (gave,) = (jax.lax.stop_gradient(seen["blocks"][name]) for name in ("read", "gave"))

    @jax.checkpoint
    def layer(params, x, wanted):
        params = gather_weights(params, dtype=model.dtype)
        out = attn.apply({"params": params}, x.astype(model.dtype), grid)
        wanted = wanted.astype(jnp.float32)
        distance = jnp.square(out.astype(jnp.float32) - wanted).mean(axis=(1, 2))
        return distance / (jnp.square(wanted).mean() + EPSILON)

    def add(total, rows):
        return total + layer(*rows), None

    start = jnp.zeros(read.shape[1], jnp.float32)
    total, _ = jax.lax.scan(add, start, (params["blocks"]["attn"], read, gave))
    return total / len(read)
