"""Our parameter trees written for the PyTorch world, and as Orbax checkpoints.

Nothing is written that the code of a layout would compute another function with: the model's conventions are compared
with those of the layout first. Tensors are read, converted and written one at a time.
"""

import functools
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lit_jax.models.dit import position_embedding
from lit_jax.porting import layouts, torch_file
from lit_jax.porting.read import Checkpoint, PortingError, check_tree, load_params, plain


def official_tensors(
    params: Any, architecture: dict
) -> list[tuple[str, tuple[int, ...], Callable]]:
    """(key, shape, read) of every tensor of the official layout; `read()` gives the array.

    A LiT has `attn.q`, `attn.kv` and `attn.dwc` (H, 1, K, K) where a DiT has `attn.qkv`.
    """
    flat = flatten_dict(params, sep="/")
    rules = list(layouts.dit_rules(architecture))
    check_tree(flat, layouts.tree_shapes(rules), "the parameters")
    D, grid = architecture["width"], architecture["grid"]
    result = [("pos_embed", (1, grid[0] * grid[1], D), lambda: position_embedding(grid, D)[None])]
    for path, keys, kind, shape in rules:
        for layer, key in enumerate(keys):
            result.append(
                (key, shape, functools.partial(_read_layer, flat[path], path, layer, kind))
            )
    return result


def _read_layer(leaf, path, layer, kind):
    """One layer of a leaf in torch's axis order."""
    return np.asarray(leaf[layer] if path.startswith("blocks/") else leaf).transpose(
        layouts.TO_TORCH[kind]
    )


def _require_for_export(architecture, path, **needed):
    for field in ("num_heads", "grid"):
        if not architecture.get(field):
            raise PortingError(
                f"{path}: the export needs {field}, which the source does not tell; set port."
                f"{'num_heads' if field == 'num_heads' else 'input_size'}"
            )
    for field, value in needed.items():
        if architecture[field] != value:
            raise PortingError(
                f"{path}: the model has {field} = {plain(architecture[field])}, code of that layout "
                f"computes with {plain(value)}; set port.{field}={plain(value)} to accept that"
            )


def export_official(
    params: Any, path: str | pathlib.Path, architecture: dict
) -> list[pathlib.Path]:
    """Writes the official DiT layout as .safetensors or .pt (a flat state dict); returns the files written.

    A .safetensors names the architecture in its metadata, a .pt in PATH.json. Beside a LiT goes `lit_torch.py`, the
    PyTorch module that computes the same function.

    Args:
        params: the tree of `models.dit`, arrays or leaves.
        architecture: as in `Checkpoint`, with num_heads and grid.
    Raises: PortingError if official DiT code would compute another function (timestep_freq_shift,
        mlp_norm_epsilon), or what goes beside it would replace another file.
    """
    path = pathlib.Path(path)
    linear = architecture["attention"] == "linear"
    _require_for_export(
        architecture,
        path,
        **({} if linear else {"timestep_freq_shift": 0, "mlp_norm_epsilon": 1e-6}),
    )
    if path.suffix not in (".safetensors", ".pt"):
        raise PortingError(
            f"{path}: the official layout is written as .safetensors or .pt, not {path.suffix!r}"
        )
    beside = {}
    if path.suffix == ".pt":
        beside[path.name + ".json"] = json.dumps({"architecture": architecture}, indent=1) + "\n"
    if linear:
        beside["lit_torch.py"] = (
            pathlib.Path(__file__).parent / "assets" / "lit_torch.py"
        ).read_text()
    beside = {path.with_name(name): text for name, text in beside.items()}
    for file, text in beside.items():
        if file.exists() and file.read_bytes() != text.encode():
            raise PortingError(
                f"{file} exists and is another than would be written beside {path.name}; "
                "a port never overwrites"
            )
    tensors = official_tensors(params, architecture)
    if path.suffix == ".pt":
        torch_file.write_torch(path, tensors)
    else:
        torch_file.write_safetensors(
            path, tensors, {"format": "pt", "architecture": json.dumps(architecture)}
        )
    for file, text in beside.items():
        file.write_text(text)
    return [path, *beside]


def export_diffusers(params: Any, path: str | pathlib.Path, architecture: dict) -> None:
    """Writes a folder that diffusers.DiTTransformer2DModel.from_pretrained loads.

    Raises: PortingError if the model is no DiT, its grid is not square, or diffusers would compute another function:
        it shifts the timestep frequencies by 1.
    """
    path = pathlib.Path(path)
    if architecture["attention"] != "softmax":
        raise PortingError(
            f"{path}: diffusers has no LiT; export it as .safetensors with its torch module"
        )
    _require_for_export(architecture, path, timestep_freq_shift=1)
    grid, C, D = architecture["grid"], architecture["in_channels"], architecture["width"]
    if grid[0] != grid[1]:
        raise PortingError(
            f"{path}: diffusers needs a square grid, the model has {grid[0]} x {grid[1]}"
        )
    config = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": architecture["qkv_bias"],
        "attention_head_dim": D // architecture["num_heads"],
        "dropout": 0.0,
        "in_channels": C,
        "norm_elementwise_affine": False,
        "norm_eps": architecture["mlp_norm_epsilon"],
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": architecture["num_heads"],
        "num_embeds_ada_norm": architecture["num_classes"],
        "num_layers": architecture["depth"],
        "out_channels": C * (2 if architecture["learn_sigma"] else 1),
        "patch_size": architecture["patch_size"],
        "sample_size": grid[0] * architecture["patch_size"],
        "upcast_attention": False,
    }
    tensors = []
    for key, shape, read in official_tensors(params, architecture)[1:]:
        module, _, leaf = key.rpartition(".")
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in layouts.DIFFUSERS_EMBEDDERS:
            tensors += [
                (
                    f"transformer_blocks.{i}.{layouts.DIFFUSERS_EMBEDDERS[module]}.{leaf}",
                    shape,
                    read,
                )
                for i in range(architecture["depth"])
            ]
        elif match and match[2] == "attn.qkv":
            third = (D, *shape[1:])
            for part, name in enumerate(layouts.DIFFUSERS_QKV):
                tensors.append(
                    (
                        f"transformer_blocks.{match[1]}.{name}.{leaf}",
                        third,
                        lambda read=read, part=part: read()[part * D : (part + 1) * D],
                    )
                )
        elif match:
            tensors.append(
                (
                    f"transformer_blocks.{match[1]}.{layouts.DIFFUSERS_BLOCK[match[2]]}.{leaf}",
                    shape,
                    read,
                )
            )
        else:
            tensors.append((f"{layouts.DIFFUSERS_TOP[module]}.{leaf}", shape, read))
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch_file.write_safetensors(
            partial / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"}
        )
        if path.is_dir():
            path.rmdir()  # only an empty one goes
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_orbax(
    checkpoint: Checkpoint,
    path: str | pathlib.Path,
    *,
    shardings: Any = None,
    consume: bool = False,
) -> None:
    """Writes an Orbax parameter checkpoint, float32; `shardings` spreads the arrays over devices on the way.

    `consume` empties `checkpoint.params` as they are loaded: for the last use of a checkpoint that is held in memory.
    """
    kind = "autoencoder" if "latent_channels" in checkpoint.architecture else "model"
    metadata = {
        kind: checkpoint.architecture,
        "source": checkpoint.report.source,
        "checksum": checkpoint.report.checksum,
    }
    checkpoint.save_params(
        path, load_params(checkpoint.params, shardings, consume=consume), metadata
    )
