"""Names, shapes and axes: how the tensors of the PyTorch world correspond to our parameter trees.

Linear         weight (out, in)      <-> kernel (in, out)
convolution    weight (O, I, h, w)   <-> kernel (h, w, I, O)
blocks.i.*                           <-> blocks/*, stacked on a leading layer axis
"""

import re
from collections.abc import Iterator

from lit_jax.models.dit import FREQUENCIES

# Our module, its name in an official checkpoint, and the kind of its weight.
DIT_MODULES = (
    ("x_embedder/proj", "x_embedder.proj", "conv"),
    ("t_embedder/mlp_0", "t_embedder.mlp.0", "linear"),
    ("t_embedder/mlp_2", "t_embedder.mlp.2", "linear"),
    ("y_embedder/embedding_table", "y_embedder.embedding_table", "embedding"),
    ("blocks/attn/qkv", "blocks.{}.attn.qkv", "linear"),
    ("blocks/attn/q", "blocks.{}.attn.q", "linear"),
    ("blocks/attn/kv", "blocks.{}.attn.kv", "linear"),
    ("blocks/attn/proj", "blocks.{}.attn.proj", "linear"),
    ("blocks/attn/dwc", "blocks.{}.attn.dwc", "conv"),
    ("blocks/mlp/fc1", "blocks.{}.mlp.fc1", "linear"),
    ("blocks/mlp/fc2", "blocks.{}.mlp.fc2", "linear"),
    ("blocks/adaLN_modulation", "blocks.{}.adaLN_modulation.1", "linear"),
    ("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1", "linear"),
    ("final_layer/linear", "final_layer.linear", "linear"),
)
# The official module and its name in diffusers' DiTTransformer2DModel.
DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
DIFFUSERS_EMBEDDERS = {  # stored again in every block
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
DIFFUSERS_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
WEIGHT_NAME = {"conv": "kernel", "linear": "kernel", "embedding": "embedding", "norm": "scale"}
# From torch's axis order to ours, and back.
TO_FLAX = {"conv": (2, 3, 1, 0), "linear": (1, 0), "embedding": (0, 1), "norm": (0,), "bias": (0,)}
TO_TORCH = {"conv": (3, 2, 0, 1), "linear": (1, 0), "embedding": (0, 1), "norm": (0,), "bias": (0,)}


# Rules: (path in the tree, key of each layer, kind, torch shape of one layer) for every leaf of an architecture.

Rule = tuple[str, list[str], str, tuple[int, ...]]


def dit_rules(architecture: dict) -> Iterator[Rule]:
    """The rules of DiT and LiT; keys are those of the official checkpoints."""
    D, L, p = architecture["width"], architecture["depth"], architecture["patch_size"]
    C, K = architecture["in_channels"], architecture["conv_size"]
    linear = architecture["attention"] == "linear"
    shapes = {
        "x_embedder/proj": (D, C, p, p),
        "t_embedder/mlp_0": (D, FREQUENCIES),
        "t_embedder/mlp_2": (D, D),
        "y_embedder/embedding_table": (architecture["num_classes"] + 1, D),
        "blocks/attn/proj": (D, D),
        "blocks/mlp/fc1": (4 * D, D),
        "blocks/mlp/fc2": (D, 4 * D),
        "blocks/adaLN_modulation": (6 * D, D),
        "final_layer/adaLN_modulation": (2 * D, D),
        "final_layer/linear": (p * p * C * (2 if architecture["learn_sigma"] else 1), D),
    }
    if linear:
        shapes |= {"blocks/attn/q": (D, D), "blocks/attn/kv": (2 * D, D)}
    else:
        shapes["blocks/attn/qkv"] = (3 * D, D)
    if linear and K:
        shapes["blocks/attn/dwc"] = (D // architecture["num_heads"], 1, K, K)
    unbiased = (
        () if architecture["qkv_bias"] else ("blocks/attn/qkv", "blocks/attn/q", "blocks/attn/kv")
    )
    for module, official, kind in DIT_MODULES:
        if module not in shapes:
            continue
        names = [official.format(layer) for layer in range(L)] if "{}" in official else [official]
        yield (
            f"{module}/{WEIGHT_NAME[kind]}",
            [f"{name}.weight" for name in names],
            kind,
            shapes[module],
        )
        if kind != "embedding" and module not in unbiased:
            yield f"{module}/bias", [f"{name}.bias" for name in names], "bias", shapes[module][:1]


def autoencoder_rules(architecture: dict) -> Iterator[Rule]:
    """The rules of AutoencoderKL; keys are those of today's diffusers."""
    widths, layers = architecture["block_out_channels"], architecture["layers_per_block"]
    Z = architecture["latent_channels"]

    def module(name, kind, shape):
        path = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
        yield f"{path}/{WEIGHT_NAME[kind]}", [f"{name}.weight"], kind, shape
        yield f"{path}/bias", [f"{name}.bias"], "bias", shape[:1]

    def resnet(name, width_in, width):
        yield from module(f"{name}.norm1", "norm", (width_in,))
        yield from module(f"{name}.conv1", "conv", (width, width_in, 3, 3))
        yield from module(f"{name}.norm2", "norm", (width,))
        yield from module(f"{name}.conv2", "conv", (width, width, 3, 3))
        if width_in != width:
            yield from module(f"{name}.conv_shortcut", "conv", (width, width_in, 1, 1))

    def mid(name, width):
        yield from resnet(f"{name}.resnets.0", width, width)
        if architecture["mid_block_add_attention"]:
            yield from module(f"{name}.attentions.0.group_norm", "norm", (width,))
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from module(f"{name}.attentions.0.{part}", "linear", (width, width))
        yield from resnet(f"{name}.resnets.1", width, width)

    yield from module("encoder.conv_in", "conv", (widths[0], architecture["in_channels"], 3, 3))
    width_in = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            yield from resnet(f"encoder.down_blocks.{i}.resnets.{j}", width_in, width)
            width_in = width
        if i < len(widths) - 1:
            yield from module(
                f"encoder.down_blocks.{i}.downsamplers.0.conv", "conv", (width, width, 3, 3)
            )
    yield from mid("encoder.mid_block", widths[-1])
    yield from module("encoder.conv_norm_out", "norm", (widths[-1],))
    yield from module("encoder.conv_out", "conv", (2 * Z, widths[-1], 3, 3))
    if architecture["use_quant_conv"]:
        yield from module("quant_conv", "conv", (2 * Z, 2 * Z, 1, 1))
    if architecture["use_post_quant_conv"]:
        yield from module("post_quant_conv", "conv", (Z, Z, 1, 1))
    yield from module("decoder.conv_in", "conv", (widths[-1], Z, 3, 3))
    yield from mid("decoder.mid_block", widths[-1])
    width_in = widths[-1]
    for i, width in enumerate(widths[::-1]):
        for j in range(layers + 1):
            yield from resnet(f"decoder.up_blocks.{i}.resnets.{j}", width_in, width)
            width_in = width
        if i < len(widths) - 1:
            yield from module(
                f"decoder.up_blocks.{i}.upsamplers.0.conv", "conv", (width, width, 3, 3)
            )
    yield from module("decoder.conv_norm_out", "norm", (widths[0],))
    yield from module("decoder.conv_out", "conv", (architecture["out_channels"], widths[0], 3, 3))


def tree_shapes(rules: Iterator[Rule]) -> dict[str, tuple[int, ...]]:
    """Path -> shape in our layout."""
    shapes = {}
    for path, keys, kind, shape in rules:
        ours = tuple(shape[axis] for axis in TO_FLAX[kind])
        shapes[path] = (len(keys), *ours) if path.startswith("blocks/") else ours
    return shapes
