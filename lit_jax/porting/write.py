"""Our parameter trees written for the PyTorch world, and as Orbax checkpoints.

Nothing is written that the code of a layout would compute another function with: the
model's conventions are compared with those of the layout first. Tensors are read,
converted and written one at a time.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lit_jax.checkpoint import save_params
from lit_jax.porting import autoencoder
from lit_jax.porting.read import KEY_TABLES, AutoencoderCheckpoint, Checkpoint, load_params
from lit_jax.porting.torch_checkpoint import DIFFUSERS_FILES, PortingError
from lit_jax.porting.torch_file import NewTensor, write_safetensors, write_torch

# Of one file of weights: two files for a T5-XXL, as on the Hub.
SHARD_BYTES = 10 * 1000**3


def export_official(
    params: Any, path: epath.PathLike, config: Any, class_names: Sequence[str] = ()
) -> list[epath.Path]:
    """Writes the official layout as .safetensors or .pt (a flat state dict).

    A .safetensors names the architecture in its metadata, a .pt in PATH.json. With a LiT
    goes `lit_torch.py`, the PyTorch module that computes the same function.

    Args:
        params: the tree of the model, arrays or leaves.
        config: with num_heads and grid.
        class_names: of the labels, in their order; (): they are not known.
    Returns: the files written.
    Raises: PortingError if official code would compute another function, then with a text
      that starts with the field's name, or if what goes with the file would replace
      another file.
    """
    path = epath.Path(path)
    family = KEY_TABLES[type(config)]
    family.check_official(config)
    if path.suffix not in (".safetensors", ".pt"):
        raise PortingError(
            f"{path}: the official layout is written as .safetensors or .pt, not {path.suffix!r}"
        )

    # All checks come before the first file: an export that fails leaves none.
    about = {"architecture": config.to_json()}
    if class_names:
        about["class_names"] = list(class_names)
    companions = {}
    if path.suffix == ".pt":
        text = json.dumps(about, indent=1) + "\n"
        companions[path.with_name(path.name + ".json")] = text
    module = family.torch_module(config)
    if module:
        companions[path.with_name(module.name)] = module.read_text()
    for file, text in companions.items():
        # The same text may be there, of an export into the same folder.
        if file.exists() and file.read_bytes() != text.encode():
            raise PortingError(
                f"{file} exists and is another than would be written beside {path.name}; "
                "a port never overwrites"
            )

    tensors = family.official_tensors(params, config)
    if path.suffix == ".pt":
        write_torch(path, tensors)
    else:
        texts = {name: json.dumps(value) for name, value in about.items()}
        write_safetensors(path, tensors, {"format": "pt"} | texts)
    for file, text in companions.items():
        file.write_text(text)
    return [path, *companions]


def export_diffusers(params: Any, path: epath.PathLike, config: Any) -> None:
    """Writes a folder that diffusers.DiTTransformer2DModel.from_pretrained loads.

    Args: as `export_official`.
    Raises: PortingError if the model is no DiT, its grid is not square, or diffusers
      would compute another function: it shifts the timestep frequencies by 1.
    """
    path = epath.Path(path)
    family = KEY_TABLES[type(config)]
    family.check_diffusers(config)
    # The transformer would compute the same, but what draws with it reads noise.
    if config.prediction != "noise":
        raise PortingError(
            f"the model predicts the {config.prediction}, and diffusers draws with one of this "
            f"class that predicts noise; export it as .safetensors or .pt"
        )
    tensors = family.diffusers_tensors(params, config)
    fields = family.diffusers_config(config)
    write_folder(path, fields, "diffusion_pytorch_model.safetensors", tensors)


def export_autoencoder(params: Any, path: epath.PathLike, architecture: Mapping[str, Any]) -> None:
    """Writes a folder that diffusers.AutoencoderKL.from_pretrained loads, float32.

    Args:
        params: the tree of `models.autoencoder`, arrays or leaves.
        architecture: that of an `AutoencoderCheckpoint`.
    Raises: PortingError with both sides unless the tree is that of the architecture.
    """
    tensors = autoencoder.diffusers_tensors(params, architecture)
    fields = autoencoder.diffusers_config(architecture)
    write_folder(path, fields, DIFFUSERS_FILES[0], tensors)


def write_folder(
    path: epath.PathLike, config: dict[str, Any], name: str, tensors: Sequence[NewTensor]
) -> None:
    """Writes a folder of config.json and the weights, as a whole or not at all.

    Weights of more than `SHARD_BYTES` are several files and their index, as on the Hub.

    Args: name: of the .safetensors file in it.
    """
    metadata = {"format": "pt"}
    shards = _shards(tensors)
    with whole_folder(path) as folder:
        write_json(folder / "config.json", config)
        if len(shards) == 1:
            write_safetensors(folder / name, tensors, metadata)
            return
        stem = name.removesuffix(".safetensors")
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, shard, metadata)
            places |= {tensor.key: file for tensor in shard}
        total = {"total_size": sum(map(_size, tensors))}
        write_json(folder / f"{name}.index.json", {"metadata": total, "weight_map": places})


def _shards(tensors):
    """The tensors in their order, in lists of at most `SHARD_BYTES`, or of one."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _size(tensor) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _size(tensor)
    return shards


def _size(tensor):
    return 4 * math.prod(tensor.shape)


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a value as the folders of diffusers and transformers have theirs."""
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill; it gets its name when that is done, and is gone if it fails.

    Raises: OSError or ValueError where the path is a folder that is not empty.
    """
    path = epath.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.rmtree(missing_ok=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.is_dir():
            path.rmdir()  # only an empty one goes
        partial.rename(path)
    finally:
        partial.rmtree(missing_ok=True)


def export_orbax(
    checkpoint: Checkpoint | AutoencoderCheckpoint,
    path: epath.PathLike,
    *,
    shardings: Any = None,
    consume: bool = False,
) -> None:
    """Writes an Orbax parameter checkpoint, float32.

    Args:
        shardings: spreads the arrays over devices on the way.
        consume: empties `checkpoint.params` as they are loaded, so that those in memory
            are not there twice: for the last use of a checkpoint.
    """
    # `read_checkpoint` finds the architecture here, and a user from where it
    # came.
    metadata: dict[str, Any] = {
        "source": checkpoint.report.source,
        "checksum": checkpoint.report.checksum,
    }
    if isinstance(checkpoint, AutoencoderCheckpoint):
        metadata["autoencoder"] = checkpoint.architecture
    else:
        metadata["model"] = checkpoint.config.to_json()
        metadata["class_names"] = list(checkpoint.class_names)
    # Leaf by leaf, each read once and straight onto its shards.
    arrays = load_params(checkpoint.params, shardings, consume=consume)
    save_params(path, arrays, metadata)
