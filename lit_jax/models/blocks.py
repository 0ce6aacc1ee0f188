"""The blocks of a transformer as one scan over its layers, for all models here."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_jax.kernels.linear_attention_case import FUSED
from lit_jax.models.attention import PROJECTED, make_attention
from lit_jax.models.dense import PRODUCT
from lit_jax.partitioning import gather_weights

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PROJECTED, PRODUCT, FUSED),
    ),
}


EPSILON = 1e-12  # of a mean square: an attention that gives nothing has no relative error
# The collection in which a block leaves what its attention read and gave, where a
# caller of `apply` asks for it (mutable=[ATTENTION]); and in which it finds what takes
# the place of its attention, where a caller gives that (see `replacing`).
ATTENTION = "attention"


def scan_blocks(
    model: nn.Module,
    block: type[nn.Module],
    depth: int,
    *,
    dtype: Any,
    remat: str = "none",
    shared_inputs: int = 0,
    group: int = 0,
) -> Any:
    """A class of modules that applies `depth` blocks one after the other.

    Every leaf gets a leading layer axis. Weights are gathered from the mesh layer by layer.

    Args:
      model: the module in whose method the blocks are made.
      block: (carry, *inputs) -> (carry, None).
      dtype: in which the blocks use their matrices.
      remat: a name of REMAT_POLICIES.
      shared_inputs: how many inputs all layers read; 0: None is their one input.
      group: of a pattern of so many different layers, `layer_0` and so on, over which it scans
        as a whole; 0: all layers are alike. The block's config then answers `layer`.
    """
    gathered = block
    if not model.is_initializing():
        # Inside remat: the backward pass gathers a layer's weights again, and does not keep all.
        gather = functools.partial(gather_weights, dtype=dtype)
        gathered = nn.map_variables(block, "params", gather)
    if remat != "none":
        gathered = nn.remat(gathered, policy=REMAT_POLICIES[remat], prevent_cse=False)
    if group:
        gathered = _group_of(gathered, group)
    return nn.scan(
        gathered,
        variable_axes={"params": 0, ATTENTION: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * shared_inputs or 0,
        # It costs one more trace of the block. Without it other parameters would be drawn: a key
        # counts the traces.
        check_constancy_invariants=model.is_initializing(),
        length=depth // (group or 1),
    )


def _group_of(block, size):
    """A class of modules that applies `size` blocks, each with the config of its layer."""

    class Group(nn.Module):
        config: Any
        grid: tuple[int, int]
        implementation: str | None  # of the attention that is not softmax
        dtype: Any

        @nn.compact
        def __call__(self, carry, *inputs):
            for index in range(size):
                layer = self.config.layer(index)
                is_own = layer.attention == self.config.attention
                implementation = self.implementation if is_own else None
                fields = (layer, self.grid, implementation, self.dtype)
                carry, _ = block(*fields, name=f"layer_{index}")(carry, *inputs)
            return carry, None

    return Group


def attend(block: nn.Module, attn: Any, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """attn(x, grid); what it reads and gives stays in the collection ATTENTION of its block."""
    out = attn(x, grid)
    if block.has_variable(ATTENTION, "instead"):
        instead: Any = block.get_variable(ATTENTION, "instead")
        is_replaced: Any = block.get_variable(ATTENTION, "is_replaced")
        out = jnp.where(is_replaced, instead.astype(out.dtype), out)
    block.sow(ATTENTION, "read", x)
    block.sow(ATTENTION, "gave", out)
    return out


def replacing(layer: jax.Array, instead: jax.Array) -> dict[str, Any]:
    """The variables with which a model gives other outputs of the attention of one layer.

    Args:
      layer: its number, of a model whose layers are all alike.
      instead: (L, B, T, D) of all layers.
    """
    is_replaced = jnp.arange(len(instead)) == layer
    return {ATTENTION: {"blocks": {"instead": instead, "is_replaced": is_replaced}}}


def attention_outputs(model: Any, params: Any, read: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """What each attention of a model gives for an input of that layer.

    Args:
      model, params: of any pattern of layers.
      read: (L, B, T, D), of all layers in their order.
      grid: (h, w) in tokens.
    Returns: (L, B, T, D) in the model's dtype.
    """
    every = model.config.softmax_every
    blocks = params["blocks"]
    layers = [blocks[f"layer_{i}"] for i in range(every)] if every else [blocks]
    outputs = []
    for i, layer in enumerate(layers):
        config = model.config.layer(i)
        is_own = config.attention == model.config.attention
        implementation = model.implementation if is_own else None
        attn = make_attention(config, implementation, model.dtype, parent=None)

        def one(_, rows, attn=attn):
            params = gather_weights(rows[0], dtype=model.dtype)
            return None, attn.apply({"params": params}, rows[1].astype(model.dtype), grid)

        _, out = jax.lax.scan(one, None, (layer["attn"], read[i :: len(layers)]))
        outputs.append(out)
    return _in_order(outputs)


def attention_error(model: Any, params: Any, seen: Any, grid: tuple[int, int]) -> jax.Array:
    """How far each attention of a model is from that of its teacher on the teacher's own input.

    The layer-wise regression of Grafting (arXiv 2506.05340): no layer sees the errors of those
    before it, and gradients stay in each layer's attention. The squared distance is relative to
    the mean square of the teacher's attention in that layer, so that all layers count alike.

    Args:
      model, params: the student. Its layers that keep softmax do not count.
      seen: the collection ATTENTION of the teacher, of as many blocks and as wide; detached here.
      grid: (h, w) in tokens.
    Returns: (B,) float32, the mean over the layers.
    """
    config = model.config.layer(0)
    attn = make_attention(config, model.implementation, model.dtype, parent=None)
    # A list of one: `sow` appends.
    (read,), (gave,) = (jax.lax.stop_gradient(seen["blocks"][name]) for name in ("read", "gave"))

    @jax.checkpoint
    def layer(params, x, wanted):
        params = gather_weights(params, dtype=model.dtype)
        return _relative_error(attn.apply({"params": params}, x.astype(model.dtype), grid), wanted)

    def add(total, rows):
        return total + layer(*rows), None

    total = jnp.zeros(read.shape[1], jnp.float32)
    blocks = params["blocks"]
    every = model.config.softmax_every
    if not every:
        total, _ = jax.lax.scan(add, total, (blocks["attn"], read, gave))
        return total / len(read)
    # The layers that keep softmax are the teacher's.
    for i in range(every - 1):
        own = blocks[f"layer_{i}"]["attn"]
        total, _ = jax.lax.scan(add, total, (own, read[i::every], gave[i::every]))
    return total / (len(read) * (every - 1) // every)


def feature_error(own: Any, seen: Any) -> jax.Array:
    """How far what each attention of a student gives is from its teacher's, each in its own model.

    The hints of FitNets (arXiv 1412.6550), in every layer: unlike `attention_error`, a layer reads
    what the student's layers before it made, and gradients reach all of them. It costs no pass of
    its own. Relative to the mean square of the teacher's attention in that layer.

    Args:
      own, seen: the collections ATTENTION of the student and of the teacher, of as many blocks and
        as wide; the teacher's is detached here.
    Returns: (B,) float32, the mean over the layers.
    """
    errors = jax.vmap(_relative_error)(_given(own), jax.lax.stop_gradient(_given(seen)))
    return errors.mean(axis=0)


def _given(collection: Any) -> jax.Array:
    """What the attentions gave, (L, B, T, D), of the collection ATTENTION of any pattern."""
    blocks = collection["blocks"]
    layers = [blocks] if "gave" in blocks else [blocks[f"layer_{i}"] for i in range(len(blocks))]
    return _in_order([layer["gave"][0] for layer in layers])


def _in_order(layers: list[jax.Array]) -> jax.Array:
    """(L, ...) of a pattern's layers, (groups, ...) each: of the first group all, then the next."""
    return jnp.stack(layers, axis=1).reshape(-1, *layers[0].shape[1:])


def _relative_error(out: jax.Array, wanted: jax.Array) -> jax.Array:
    """The squared distance of (B, T, D) by image, as a share of the mean square; (B,) float32."""
    wanted = wanted.astype(jnp.float32)
    distance = jnp.square(out.astype(jnp.float32) - wanted).mean(axis=(1, 2))
    return distance / (jnp.square(wanted).mean() + EPSILON)
