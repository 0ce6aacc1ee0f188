"""Small DiTs and LiTs as files of the PyTorch world, run there and here."""

import argparse
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file
from torch_dit import DiT, randomise_

from configs import debug, default
from lit_jax.models import dit
from lit_jax.models.dit import DiTConfig
from lit_jax.porting.read import load_params

# Sizes that have nothing in common, so that no axis can be taken for another.
SMALL = dict(
    depth=3, width=48, num_heads=3, patch_size=2, in_channels=4, num_classes=10, grid=(4, 4)
)
VARIANTS = {
    "dit": SMALL,
    "dit_patch_4_no_sigma": SMALL
    | dict(depth=2, width=32, num_heads=4, patch_size=4, in_channels=3, learn_sigma=False),
    "lit": SMALL | dict(attention="linear"),
    "lit_no_bias": SMALL | dict(attention="linear", num_heads=2, qkv_bias=False, conv_size=3),
    "lit_no_conv": SMALL | dict(attention="linear", conv_size=0),
    "lit_wide_grid": SMALL | dict(attention="linear", grid=(3, 5)),
}


def make_torch(seed=0, **fields):
    """A random DiT or LiT of torch."""
    return randomise_(DiT(**(SMALL | fields)), seed).eval()


def make_diffusers(seed=0, **fields):
    """A random DiTTransformer2DModel: the embedders of all blocks are one."""
    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    model = randomise_(DiTTransformer2DModel(**(config | fields)), seed)
    state = model.state_dict()
    for key in state:
        if ".norm1.emb." in key and not key.startswith("transformer_blocks.0."):
            state[key] = state["transformer_blocks.0." + key.split(".", 2)[2]]
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def _saved_diffusers(shard_size):
    folder = tempfile.TemporaryDirectory()
    make_diffusers().save_pretrained(folder.name, max_shard_size=shard_size)
    return folder


def write_diffusers(folder, shard_size="5GB"):
    """The folder of a DiTTransformer2DModel: each test gets a copy of the same."""
    shutil.copytree(_saved_diffusers(shard_size).name, folder, dirs_exist_ok=True)


def config_of(fields):
    """What a checkpoint of make_torch(**fields) must be found to be."""
    return DiTConfig(**(SMALL | fields))


def save(model, path, **architecture):
    """A .safetensors as ours (with the architecture), or a flat .pt as the official ones."""
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        metadata = {"architecture": json.dumps(architecture)} if architecture else None
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


def small_config(teacher, **fields):
    """The debug config for the model of `make_torch`, which is in the file of its teacher.

    Args: fields: of the config, by their whole names, such as "student.init".
    """
    config = debug.get_config()
    config.model.update(
        size="S", depth=3, width=48, num_heads=3, patch_size=2, num_classes=10, input_size=8,
        in_channels=4,
    )  # fmt: skip
    config.teacher.update(checkpoint=str(teacher), num_heads=3, size="")
    config.update_from_flattened_dict(fields)
    return config


def training_checkpoint(model, ema, **extra):
    """What DiT's trainer saves: both weights, an optimizer that made a step, the arguments."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    args = argparse.Namespace(
        model="DiT-S/2",
        image_size=256,
        num_classes=10,
        vae="ema",
        results_dir="x",
        data_path=pathlib.Path("a/b"),
    )
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": args,
    } | extra


def port_config(model=None, **fields):
    """The config of a port of make_torch()'s model, with other fields of model and port."""
    config = default.get_config()
    config.model.update(
        size="S",
        depth=3,
        width=48,
        num_heads=3,
        patch_size=2,
        attention="softmax",
        num_classes=10,
        input_size=8,
        in_channels=4,
    )
    config.model.update(model or {})
    for name in ("source", "target"):
        if fields.get(name):
            fields[name] = str(fields[name])
    config.port.update(fields)
    return config


def inputs(fields, seed=1):
    """x (2, h, w, C), t (2,) and y (2,) for a model; the second label is torch's null class."""
    fields = SMALL | fields
    rng = np.random.default_rng(seed)
    h, w = (side * fields["patch_size"] for side in fields["grid"])
    x = rng.normal(size=(2, h, w, fields["in_channels"])).astype(np.float32)
    return x, np.array([3, 750]), np.array([1, fields["num_classes"]])


def run_torch(model, x, t, y):
    """The output of a model of torch or diffusers, channels last."""
    with torch.no_grad():
        x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        out = model(x, torch.from_numpy(t), torch.from_numpy(y))
    out = out if isinstance(out, torch.Tensor) else out.sample
    return out.numpy().transpose(0, 2, 3, 1)


@functools.cache
def _forward(config):
    return jax.jit(dit.DiT(config, dtype=jnp.float32).apply)


def run_ours(checkpoint, x, t, y):
    """The output of our model; models of one architecture share their compiled program."""
    config = checkpoint.config
    drop = y == config.num_classes
    condition = {"label": np.where(drop, 0, y)}
    params = load_params(checkpoint.params)
    return np.asarray(_forward(config)({"params": params}, x, t, condition, drop))


def rel(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def assert_same_tree(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        assert np.array_equal(np.asarray(a[path]), np.asarray(b[path])), path


def assert_same_state(state, model):
    expected = model.state_dict()
    assert set(state) == set(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def edit(folder, change):
    """Changes the state dict of a diffusers folder in place."""
    path = folder / "diffusion_pytorch_model.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}
    change(state)
    save_file(state, path)


def set_key(key, value):
    return lambda state: state.update({key: value})


def rename_key(old, new):
    def change(state):
        state[new] = state.pop(old)

    return change


def poison(key, value):
    """Sets the last element of a tensor."""

    def change(state):
        state[key] = state[key].clone()
        state[key].view(-1)[-1] = value

    return change
