"""The porter against real torch and real diffusers: random weights everywhere, every layout in and out."""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import load_file, save_file
from tiny_autoencoder import write_autoencoder
from torch_dit import DiT, randomise_

import lit_jax
from configs import debug
from lit_jax import checkpoint, diffusion, experiment, losses, sharding
from lit_jax.jobs import port, train
from lit_jax.models import dit
from lit_jax.models.dit import make_dit
from lit_jax.porting import torch_file
from lit_jax.porting.read import (
    PortingError,
    is_autoencoder,
    load_params,
    read_autoencoder,
    read_checkpoint,
)
from lit_jax.porting.write import export_diffusers, export_official, export_orbax

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
    return randomise_(DiT(**(SMALL | fields)), seed).eval()


def architecture_of(fields):
    """What a checkpoint of make_torch(**fields) must be found to be."""
    defaults = dict(
        attention="softmax",
        learn_sigma=True,
        qkv_bias=True,
        kernel_function="relu",
        timestep_freq_shift=0,
        mlp_norm_epsilon=1e-6,
    )
    fields = defaults | SMALL | fields
    return fields | {
        "conv_size": fields.get("conv_size", 5) if fields["attention"] == "linear" else 0
    }


def save(model, path, **extra):
    """A .safetensors as ours (with architecture), or a flat .pt as the official ones."""
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        metadata = {"architecture": json.dumps(extra)} if extra else None
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


def inputs(fields, seed=1):
    fields = SMALL | fields
    rng = np.random.default_rng(seed)
    h, w = (side * fields["patch_size"] for side in fields["grid"])
    x = rng.normal(size=(2, h, w, fields["in_channels"])).astype(np.float32)
    return x, np.array([3, 750]), np.array([1, fields["num_classes"]])


def run_torch(model, x, t, y, **kwargs):
    with torch.no_grad():
        out = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t),
            torch.from_numpy(y),
            **kwargs,
        )
    return (out if isinstance(out, torch.Tensor) else out.sample).numpy().transpose(0, 2, 3, 1)


def build(checkpoint):
    fields = dict(checkpoint.architecture)
    fields.pop("grid")
    return make_dit(size="XL", dtype="float32", **fields)


def run_ours(checkpoint, x, t, y):
    model = build(checkpoint)
    return np.asarray(jax.jit(model.apply)({"params": load_params(checkpoint.params)}, x, t, y))


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


@pytest.fixture
def folder(tmp_path):
    return tmp_path


# In.


@pytest.mark.parametrize("name", VARIANTS)
def test_official_checkpoints_compute_the_same_function(folder, name):
    fields = VARIANTS[name]
    model = make_torch(**fields)
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"], "kernel_function": "relu"}
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", **known))
    assert checkpoint.architecture == architecture_of(fields)
    report = checkpoint.report
    assert set(report.keys) == set(model.state_dict()) and not report.left_out and not report.notes
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    x, t, y = inputs(fields)
    assert rel(run_ours(checkpoint, x, t, y), run_torch(model, x, t, y)) < 2e-5


@pytest.mark.parametrize("name", ["dit", "lit"])
def test_every_module_computes_the_same(folder, name):
    """Each module on the input that torch's module of the same name had, blocks one by one."""
    fields = VARIANTS[name]
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", num_heads=3))
    seen, outputs = {}, {}

    def hook(_, arguments, output, name):
        seen[name], outputs[name] = (
            [a.numpy() for a in arguments if isinstance(a, torch.Tensor)],
            output.numpy(),
        )

    for module_name, module in model.named_modules():
        module.register_forward_hook(functools.partial(hook, name=module_name))
    run_torch(model, *inputs(fields))
    ours, params = build(checkpoint), load_params(checkpoint.params)
    compared = set()

    def compare(module, params, where, *arguments):
        _, state = module.apply({"params": params}, *arguments, capture_intermediates=True)
        for path, (value,) in flatten_dict(state["intermediates"]).items():
            inner = ".".join(path[:-1]).replace("mlp_0", "mlp.0").replace("mlp_2", "mlp.2")
            torch_name = ".".join(filter(None, (where, inner))).replace(
                "adaLN_modulation", "adaLN_modulation.1"
            )
            if torch_name in outputs and not torch_name.endswith(
                "dwc"
            ):  # ours hands over its filters
                while isinstance(value, tuple):  # a block's: ((x, c), None)
                    value = value[0]
                expected = outputs[torch_name]
                if torch_name == "x_embedder.proj":
                    expected = expected.transpose(0, 2, 3, 1)
                assert rel(np.asarray(value).reshape(expected.shape), expected) < 1e-5, torch_name
                compared.add(torch_name)

    compare(
        dit.PatchEmbedder(48, 2, jnp.float32),
        params["x_embedder"],
        "x_embedder",
        seen["x_embedder"][0].transpose(0, 2, 3, 1),
    )
    compare(dit.TimestepEmbedder(48, 0), params["t_embedder"], "t_embedder", seen["t_embedder"][0])
    compare(dit.LabelEmbedder(10, 48), params["y_embedder"], "y_embedder", seen["y_embedder"][0])
    for layer in range(3):
        block = dit.Block(*ours._attention(), fields["grid"], 1e-6, jnp.float32)
        x, c = seen[f"blocks.{layer}"]
        compare(
            block,
            jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]),
            f"blocks.{layer}",
            (x, jax.nn.silu(c)),
            None,
        )
    x, c = seen["final_layer"]
    compare(
        dit.FinalLayer(32, jnp.float32), params["final_layer"], "final_layer", x, jax.nn.silu(c)
    )
    attention = ("qkv", "proj") if name == "dit" else ("q", "kv", "proj")
    in_block = [
        "",
        ".attn",
        ".norm1",
        ".norm2",
        ".mlp",
        ".mlp.fc1",
        ".mlp.fc2",
        ".adaLN_modulation.1",
    ]
    in_block += [f".attn.{module}" for module in attention]
    assert compared == {f"blocks.{layer}{module}" for layer in range(3) for module in in_block} | {
        "x_embedder.proj",
        "t_embedder",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "y_embedder",
        "y_embedder.embedding_table",
        "final_layer",
        "final_layer.linear",
        "final_layer.norm_final",
        "final_layer.adaLN_modulation.1",
    } | ({"x_embedder"} & compared)


@pytest.mark.parametrize("name", ["dit", "lit"])
def test_one_training_loss_is_the_same(folder, name):
    """Mean squared error of the noise and the variational term, computed here from each side's output."""
    fields = VARIANTS[name]
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", num_heads=3))
    x_start, t, y = inputs(fields)
    noise = np.random.default_rng(2).normal(size=x_start.shape).astype(np.float32)
    tables = diffusion.make_diffusion()
    x_t = np.asarray(
        diffusion.q_sample(tables, jnp.asarray(x_start), jnp.asarray(t), jnp.asarray(noise))
    )

    def loss(output):
        terms = losses.denoising_loss(
            tables,
            jnp.asarray(output),
            jnp.asarray(x_start),
            jnp.asarray(x_t),
            jnp.asarray(t),
            jnp.asarray(noise),
        )
        return {key: float(np.mean(value)) for key, value in terms.items()}

    ours, theirs = loss(run_ours(checkpoint, x_t, t, y)), loss(run_torch(model, x_t, t, y))
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_wrong_port_is_noticed(folder):
    """The parity above can fail: swapping k and v, or two chunks of the modulation, moves the output."""
    model = make_torch()
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", num_heads=3))
    x, t, y = inputs({})
    expected = run_torch(model, x, t, y)
    for path, chunks in (
        ("blocks/attn/qkv/kernel", 3),
        ("blocks/adaLN_modulation/kernel", 6),
        ("final_layer/adaLN_modulation/bias", 2),
    ):
        flat = {
            key: np.asarray(leaf) for key, leaf in flatten_dict(checkpoint.params, sep="/").items()
        }
        parts = np.split(flat[path], chunks, axis=-1)
        flat[path] = np.concatenate(parts[:-2] + [parts[-1], parts[-2]], axis=-1)
        params = unflatten_dict(flat, sep="/")
        assert (
            rel(run_ours(dataclasses.replace(checkpoint, params=params), x, t, y), expected) > 1e-3
        ), path


def training_checkpoint(model, ema, **extra):
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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_training_checkpoints_give_ema_or_model(folder, prefix, legacy):
    model, ema = make_torch(seed=1), make_torch(seed=2)
    content = training_checkpoint(model, ema)
    for name in ("model", "ema"):
        content[name] = {prefix + key: value for key, value in content[name].items()}
    torch.save(content, folder / "a.pt", _use_new_zipfile_serialization=not legacy)
    for weights, expected in (("ema", ema), ("model", model)):
        checkpoint = read_checkpoint(folder / "a.pt", weights=weights, num_heads=3)
        same = read_checkpoint(save(expected, folder / f"{weights}.pt"))
        assert checkpoint.report.checksum == same.report.checksum
        assert any("model=DiT-S/2" in note for note in checkpoint.report.notes)
    with pytest.raises(ValueError, match="weights must be ema or model .*; got 'best'"):
        read_checkpoint(folder / "a.pt", weights="best")


def test_a_checkpoint_without_ema_says_what_to_choose(folder):
    torch.save({"model": make_torch().state_dict(), "steps": 3}, folder / "a.pt")
    message = "no 'ema' weights in it, only 'model', 'steps'; choose weights=model .port.weights, teacher.weights or"
    with pytest.raises(PortingError, match=message):
        read_checkpoint(folder / "a.pt")


def test_a_name_is_no_weight_and_beside_the_weights_no_obstacle(folder):
    state = make_torch().state_dict()
    torch.save(
        {
            "ema": state,
            "args": argparse.Namespace(dtype=torch.float32),
            "callbacks": {os.system: 1},
        },
        folder / "a.pt",
    )
    assert len(read_checkpoint(folder / "a.pt").report.keys) == len(state)
    torch.save({"ema": state | {"blocks.0.attn.proj.bias": os.system}}, folder / "b.pt")
    with pytest.raises(PortingError, match="'blocks.0.attn.proj.bias' is a Global, not a tensor"):
        read_checkpoint(folder / "b.pt")


def test_repa_projectors_are_left_out_and_named(folder):
    model = make_torch(learn_sigma=False)
    state = model.state_dict()
    extra = {
        f"projectors.0.{i}.{leaf}": torch.randn(4, 4)
        for i in (0, 2, 4)
        for leaf in ("weight", "bias")
    }
    torch.save(
        {
            "model": state | extra,
            "ema": state | extra,
            "opt": {},
            "args": argparse.Namespace(),
            "steps": 1,
        },
        folder / "a.pt",
    )
    checkpoint = read_checkpoint(folder / "a.pt")
    assert set(checkpoint.report.left_out) == set(extra)
    assert any("REPA" in note for note in checkpoint.report.notes)
    assert (
        checkpoint.report.checksum == read_checkpoint(save(model, folder / "b.pt")).report.checksum
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_types_are_cast_and_said_so(folder, dtype):
    model = make_torch().to(dtype)
    checkpoint = read_checkpoint(save(model, folder / "a.pt"))
    with torch.no_grad():  # the table is computed anew: only the weights carry the rounding
        model.float().pos_embed.copy_(make_torch().pos_embed)
    assert_same_tree(checkpoint.params, read_checkpoint(save(model, folder / "b.pt")).params)
    assert "cast from" in checkpoint.report.keys["final_layer.linear.weight"]


def test_published_head_counts_are_known_and_others_asked_for(folder):
    checkpoint = read_checkpoint(save(make_torch(), folder / "a.pt"))
    assert checkpoint.architecture["num_heads"] is None
    with pytest.raises(PortingError, match="the export needs num_heads.*set port.num_heads"):
        export_official(checkpoint.params, folder / "b.pt", checkpoint.architecture)
    with pytest.raises(PortingError, match="num_heads = 5 does not divide the width 48"):
        read_checkpoint(folder / "a.pt", num_heads=5)
    small = read_checkpoint(save(DiT(12, 384, 6, 8, 4, 10, (2, 2)), folder / "s.pt"))
    assert small.architecture["num_heads"] == 6
    assert (
        "num_heads = 6 is that of the published size of this depth and width" in small.report.notes
    )
    assert not (folder / "b.pt").exists()


# diffusers.


def make_diffusers(seed=0, **fields):
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
    model = DiTTransformer2DModel(**(config | fields))
    randomise_(model, seed)
    state = model.state_dict()
    for key in state:  # the embedders of all blocks are one
        if ".norm1.emb." in key and not key.startswith("transformer_blocks.0."):
            state[key] = state["transformer_blocks.0." + key.split(".", 2)[2]]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "sharded_safetensors", "sharded_bin", "pipeline"]
)
def test_diffusers_folders_compute_what_diffusers_computes(folder, form):
    model = make_diffusers()
    target = folder / "transformer" if form == "pipeline" else folder
    model.save_pretrained(
        target,
        safe_serialization="bin" not in form,
        max_shard_size="200KB" if "sharded" in form else "5GB",
    )
    if form == "sharded_bin":
        assert len(list(folder.glob("*.bin"))) > 2
    checkpoint = read_checkpoint(folder)
    assert checkpoint.architecture == architecture_of(
        dict(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    )
    assert len(checkpoint.report.left_out) == 2 * 5  # the embedders of blocks 1 and 2
    assert set(checkpoint.report.keys) | set(checkpoint.report.left_out) == set(model.state_dict())
    x, t, y = inputs({})
    expected = run_torch(model, x, t, y)
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    official = read_checkpoint(folder, timestep_freq_shift=0)
    assert rel(run_ours(official, x, t, y), expected) > 1e-3  # the convention matters
    assert any("timestep_freq_shift = 0 was asked for" in note for note in official.report.notes)


def test_what_is_assumed_without_a_config_is_noted(folder):
    make_diffusers().save_pretrained(folder)
    notes = read_checkpoint(
        folder / "diffusion_pytorch_model.safetensors", num_heads=3
    ).report.notes
    assert (
        "no config.json beside it: diffusers' defaults are taken, timestep_freq_shift = 1, mlp_norm_epsilon = 1e-05"
        in notes
    )


def test_a_linked_sidecar_is_not_followed_out_of_its_folder(folder):
    (folder / "elsewhere.json").write_text(json.dumps({"architecture": {"num_heads": 3}}))
    (folder / "in").mkdir()
    (folder / "in" / "a.pt.json").symlink_to(folder / "elsewhere.json")
    with pytest.raises(PortingError, match="a.pt.json: a link to .* outside the folder"):
        read_checkpoint(save(make_torch(), folder / "in" / "a.pt"))


def test_old_diffusers_configs_are_taken(folder):
    make_diffusers().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(folder).architecture["num_heads"] == 3


DIFFUSERS_FAULTS = {
    "other_class": (dict(_class_name="UNet2DConditionModel"), "describes a UNet2DConditionModel"),
    "heads": (dict(num_attention_heads=4), "4 heads of 16, the width is 48"),
    "layers": (dict(num_layers=4), "num_layers = 4, expected 3"),
    "patch": (dict(patch_size=4), "patch_size = 4, expected 2"),
    "classes": (dict(num_embeds_ada_norm=11), "num_embeds_ada_norm = 11, expected 10"),
    "out_channels": (dict(out_channels=4), "out_channels = 4, the tensors have 8"),
    "activation": (dict(activation_fn="gelu"), "activation_fn = gelu, expected gelu-approximate"),
    "norm_type": (dict(norm_type="layer_norm"), "norm_type = layer_norm, expected ada_norm_zero"),
    "sample_size": (dict(sample_size=9), "sample_size = 9, the patch size is 2"),
    "norm_eps": (dict(norm_eps=-1.0), "norm_eps = -1.0"),
    "heads_a_list": (dict(num_attention_heads=[3]), "the width is 48"),
}


@pytest.mark.parametrize("name", DIFFUSERS_FAULTS)
def test_a_config_that_contradicts_the_tensors_is_refused(folder, name):
    change, message = DIFFUSERS_FAULTS[name]
    make_diffusers().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PortingError, match=message):
        read_checkpoint(folder)


def test_block_embedders_that_differ_are_refused(folder):
    model = make_diffusers()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[3, 4] += 1e-6
    model.save_pretrained(folder)
    with pytest.raises(
        PortingError, match="transformer_blocks.2.norm1.emb.class_embedder.* differs from block 0's"
    ):
        read_checkpoint(folder)


def sharded(folder):
    make_diffusers().save_pretrained(folder, max_shard_size="200KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    return index, json.loads(index.read_text())


def _traversal(folder):
    index, content = sharded(folder)
    secret = folder.parent / f"{folder.name}_secret.safetensors"
    shutil.copy(next(folder.glob("*.safetensors")), secret)
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = f"../{secret.name}"
    index.write_text(json.dumps(content))


def _absolute(folder):
    index, content = sharded(folder)
    content["weight_map"][next(iter(content["weight_map"]))] = "/etc/passwd"
    index.write_text(json.dumps(content))


def _link_out(folder):
    _, content = sharded(folder)
    shard = folder / next(iter(content["weight_map"].values()))
    outside = folder.parent / f"{folder.name}_outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def _missing_shard(folder):
    _, content = sharded(folder)
    (folder / next(iter(content["weight_map"].values()))).unlink()


def _key_in_no_shard(folder):
    index, content = sharded(folder)
    content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


def _key_in_another_shard(folder):
    index, content = sharded(folder)
    names = sorted(set(content["weight_map"].values()))
    key = next(key for key, name in content["weight_map"].items() if name == names[0])
    content["weight_map"][key] = names[1]
    index.write_text(json.dumps(content))


def _index_names_a_number(folder):
    index, content = sharded(folder)
    content["weight_map"][next(iter(content["weight_map"]))] = 7
    index.write_text(json.dumps(content))


def _index_without_map(folder):
    index, _ = sharded(folder)
    index.write_text("{}")


def _index_not_json(folder):
    index, _ = sharded(folder)
    index.write_text("{" * 100_000)


def _duplicate_key_in_index(folder):
    index, content = sharded(folder)
    key, name = next(iter(content["weight_map"].items()))
    index.write_text(
        index.read_text().replace('"weight_map": {', f'"weight_map": {{"{key}": "{name}",')
    )


def _no_weights(folder):
    make_diffusers().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _no_config(folder):
    make_diffusers().save_pretrained(folder)
    (folder / "config.json").unlink()


def _config_a_list(folder):
    make_diffusers().save_pretrained(folder)
    (folder / "config.json").write_text("[]")


def _weights_link_out(folder):
    make_diffusers().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    outside = folder.parent / f"{folder.name}_outside.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)


def _shard_is_a_pointer(folder):
    _, content = sharded(folder)
    (folder / next(iter(content["weight_map"].values()))).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )


def _projection_missing(folder):
    edit(folder, lambda state: state.pop("transformer_blocks.1.attn1.to_k.weight"))


def _projection_wrong(folder):
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.1.attn1.to_k.weight": torch.zeros(48, 40)}),
    )


def _projection_uneven(folder):
    edit(
        folder,
        lambda state: state.update(
            {
                "transformer_blocks.1.attn1.to_k.weight": torch.zeros(40, 48),
                "transformer_blocks.1.attn1.to_v.weight": torch.zeros(56, 48),
            }
        ),
    )


def _embedder_missing(folder):
    edit(
        folder,
        lambda state: state.pop("transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"),
    )


def _extra_key(folder):
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.1.attn2.to_q.weight": torch.zeros(48, 48)}),
    )


def _block_number_huge(folder):
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.999999.ff.net.2.bias": torch.zeros(48)}),
    )


def _unknown_embedder_leaf(folder):
    edit(
        folder,
        _set("transformer_blocks.1.norm1.emb.class_embedder.embedding_table.bias", torch.zeros(48)),
    )


def _unknown_embedder_part(folder):
    edit(
        folder,
        _set("transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.lora_A", torch.zeros(48)),
    )


def _leading_zero(folder):
    edit(folder, _set("transformer_blocks.01.attn1.to_out.0.weight", torch.full((48, 48), 9.0)))


def _other_digits(folder):
    edit(folder, _set("transformer_blocks.\u0661.attn1.to_out.0.weight", torch.full((48, 48), 9.0)))


def _official_block(folder):
    edit(folder, _set("blocks.0.mlp.fc1.weight", torch.full((192, 48), 9.0)))


def _official_top(folder):
    edit(folder, _set("x_embedder.proj.weight", torch.full((48, 4, 2, 2), 9.0)))


def _config_link_out(folder):
    make_diffusers().save_pretrained(folder)
    outside = folder.parent / f"{folder.name}_outside.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)


def _index_link_out(folder):
    index, _ = sharded(folder)
    outside = folder.parent / f"{folder.name}_index.json"
    index.rename(outside)
    index.symlink_to(outside)


def _variant(folder):
    make_diffusers().save_pretrained(folder, variant="fp16")


def _grid_huge(folder):
    edit(folder, lambda state: None)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 10**6}))


def _long_key(folder):
    edit(folder, _set("k" * 10**5, torch.zeros(1)))


def edit(folder, change):
    make_diffusers().save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}
    change(state)
    save_file(state, path)


FOLDERS = {
    _traversal: "not a plain file name",
    _absolute: "'/etc/passwd', which is not a plain file name",
    _link_out: "outside the folder",
    _weights_link_out: "outside the folder",
    _missing_shard: "which is not in the folder",
    _key_in_no_shard: "disagree on ghost",
    _key_in_another_shard: "disagree on",
    _index_names_a_number: "names the file 7",
    _index_without_map: "no weight_map",
    _index_not_json: "not valid JSON",
    _duplicate_key_in_index: "appears twice",
    _no_weights: "no diffusion_pytorch_model.safetensors or .bin",
    _no_config: "no config.json",
    _config_a_list: "a list, not an object",
    _shard_is_a_pointer: "Git LFS pointer",
    _projection_missing: "missing: transformer_blocks.1.attn1.to_k.weight",
    _projection_wrong: r"\(48, 40\)",
    _projection_uneven: r"\(40, 48\).*expected \(144, 48\)",
    _embedder_missing: "missing: transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias",
    _extra_key: "unexpected: transformer_blocks.1.attn2.to_q.weight",
    _block_number_huge: "do not count up from 0",
    _unknown_embedder_leaf: "unexpected: transformer_blocks.1.norm1.emb.class_embedder.embedding_table.bias",
    _unknown_embedder_part: "unexpected: transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.lora_A",
    _leading_zero: "unexpected: transformer_blocks.01.attn1.to_out.0.weight",
    _other_digits: "unexpected: transformer_blocks",
    _official_block: "unexpected: blocks.0.mlp.fc1.weight",
    _official_top: "unexpected: x_embedder.proj.weight",
    _config_link_out: "config.json: a link to .* outside the folder",
    _index_link_out: "index.json: a link to",
    _variant: "diffusion_pytorch_model.fp16.safetensors is a variant",
    _grid_huge: "grid of 500000x500000 positions, the limit is",
    _long_key: r"unexpected: k{77}\.\.\.$",
}


@pytest.mark.parametrize("fault", FOLDERS, ids=lambda f: f.__name__[1:])
def test_hostile_folders_are_refused(folder, fault):
    fault(folder)
    before = sorted(os.listdir(folder.parent)), sorted(os.listdir(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=FOLDERS[fault]) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert (sorted(os.listdir(folder.parent)), sorted(os.listdir(folder))) == before


def test_links_of_the_hub_cache_are_followed(folder):
    """models--org--name/snapshots/REVISION/*, links into models--org--name/blobs."""
    snapshot, blobs = folder / "snapshots" / "abc" / "transformer", folder / "blobs"
    make_diffusers().save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(list(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(pathlib.Path("../../../blobs") / str(number))
    assert read_checkpoint(snapshot.parent).architecture["depth"] == 3


# State dicts that lie.


def _rename(old, new):
    def change(state):
        state[new] = state.pop(old)

    return change


def _set(key, value):
    return lambda state: state.update({key: value})


def _poison(key, value):
    def change(state):
        state[key] = state[key].clone()
        state[key].view(-1)[-1] = value

    return change


STATES = {
    "not_a_dit": (
        lambda s: (s.clear(), s.update({"conv.weight": torch.zeros(2)})),
        "not a DiT or LiT checkpoint: x_embedder",
    ),
    "empty": (lambda s: s.clear(), "no tensors"),
    "missing_key": (lambda s: s.pop("blocks.1.mlp.fc1.bias"), "missing: blocks.1.mlp.fc1.bias"),
    "unexpected_key": (
        _set("blocks.1.attn.q_norm.weight", torch.zeros(16)),
        "unexpected: blocks.1.attn.q_norm.weight",
    ),
    "both_named": (
        _rename("blocks.0.attn.proj.bias", "blocks.0.attn.project.bias"),
        "missing: blocks.0.attn.proj.bias; unexpected: blocks.0.attn.project.bias",
    ),
    "wrong_shape": (
        _set("blocks.2.mlp.fc2.weight", torch.zeros(192, 48)),
        r"blocks.2.mlp.fc2.weight \(192, 48\), expected \(48, 192\)",
    ),
    "scalar": (
        _set("blocks.2.mlp.fc2.bias", torch.zeros(())),
        r"blocks.2.mlp.fc2.bias \(\), expected \(48,\)",
    ),
    "empty_tensor": (
        _set("x_embedder.proj.weight", torch.zeros(48, 0, 2, 2)),
        "non-empty dimensions",
    ),
    "integer_weights": (
        _set("blocks.2.mlp.fc2.bias", torch.zeros(48, dtype=torch.int32)),
        "of int32, expected a float",
    ),
    "nan": (
        _poison("blocks.1.mlp.fc1.weight", float("nan")),
        r"blocks/mlp/fc1/kernel\[1\] holds values that are not finite",
    ),
    "inf": (
        _poison("final_layer.linear.bias", float("inf")),
        "final_layer/linear/bias holds values that are not finite",
    ),
    "overflows_float32": (
        lambda s: s.update(
            {"final_layer.linear.bias": s["final_layer.linear.bias"].double() + 1e300}
        ),
        "not finite in float32",
    ),
    "missing_block": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.1.")],
        "do not count up from 0: 0, 2",
    ),
    "no_blocks": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.")],
        "do not count up",
    ),
    "block_number_huge": (
        _set("blocks.999999999999.x", torch.zeros(1)),
        "unexpected: blocks.999999999999.x",
    ),
    "learned_pos_embed": (
        lambda s: s.update({"pos_embed": s["pos_embed"] + 1e-3}),
        "pos_embed differs from the computed 4 x 4 table by 0.001",
    ),
    "transposed_pos_embed": (
        lambda s: s.update(
            pos_embed=s["pos_embed"].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        ),
        "pos_embed differs",
    ),
    "nan_pos_embed": (_poison("pos_embed", float("nan")), "pos_embed differs .* by nan"),
    "scalar_pos_embed": (
        _set("pos_embed", torch.zeros(())),
        r"pos_embed has shape \(\), expected 3",
    ),
    "one_key_of_diffusers": (
        _set(
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", torch.zeros(48, 256)
        ),
        r"x_embedder.proj.weight is missing .*\(not of diffusers\)",
    ),
    "odd_pos_embed": (
        _set("pos_embed", torch.zeros(1, 15, 48)),
        "15 positions, the grid is unknown",
    ),
    "narrow_pos_embed": (_set("pos_embed", torch.zeros(1, 16, 40)), "needs"),
    "output_channels": (
        _set("final_layer.linear.weight", torch.zeros(48, 48)),
        "48 outputs; patch 2 and 4 channels need 16, or 32",
    ),
    "rectangular_patch": (
        _set("x_embedder.proj.weight", torch.zeros(48, 4, 2, 3)),
        r"\(48, 4, 2, 3\), expected \(48, 4, 2, 2\)",
    ),
    "one_row_of_labels": (
        _set("y_embedder.embedding_table.weight", torch.zeros(1, 48)),
        "label table of 1 row",
    ),
    "odd_width": (_set("x_embedder.proj.weight", torch.zeros(47, 4, 2, 2)), "the width is 47"),
    "prefix_of_some_keys": (
        _rename("x_embedder.proj.weight", "module.x_embedder.proj.weight"),
        "x_embedder.proj.weight is missing",
    ),
    "both_attentions": (
        _set("blocks.0.attn.q.weight", torch.zeros(48, 48)),
        "missing: .*unexpected: blocks.0.attn.qkv",
    ),
    "key_not_text": (
        lambda s: s.update({7: torch.zeros(1)}),
        "'7' is a ndarray, not a tensor|not a tensor",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_state_dicts_that_lie_are_refused(folder, name):
    change, message = STATES[name]
    state = {key: value.clone() for key, value in make_torch().state_dict().items()}
    change(state)
    torch.save(state, folder / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(folder / "a.pt")
    assert "\n" not in str(caught.value)
    assert os.listdir(folder) == ["a.pt"]
    with pytest.raises(ValueError):  # and the job writes nothing
        port.run(
            config(port=dict(source=str(folder / "a.pt"), target=str(folder / "out"))),
            folder / "work",
        )
    assert os.listdir(folder) == ["a.pt"]


METADATA = {
    "not_json": ("{", "not valid JSON"),
    "a_list": ("[]", "a list, not an object"),
    "the_same_field_twice": ('{"num_heads": 3, "num_heads": 2}', "'num_heads' appears twice"),
    "unknown_field": ('{"depht": 3}', "says depht = 3"),
    "heads_do_not_divide": (
        '{"num_heads": 5}',
        "num_heads = 5, which does not divide the width 48",
    ),
    "negative_heads": ('{"num_heads": -3}', "says num_heads = -3"),
    "heads_as_text": ('{"num_heads": "3"}', "says num_heads = 3"),
    "another_depth": ('{"depth": 4}', "depth = 4, the tensors say 3"),
    "another_attention": ('{"attention": "linear"}', "attention = linear, the tensors say softmax"),
    "grid_of_three": ('{"grid": [4, 4, 1]}', "says grid"),
    "another_grid": ('{"grid": [4, 5]}', "16 positions, the grid is 4 x 5"),
    "huge_grid": ('{"grid": [1000000000, 1000000000]}', "says grid"),
    "epsilon": ('{"mlp_norm_epsilon": 0.0}', "says mlp_norm_epsilon = 0.0"),
    "shift": ('{"timestep_freq_shift": 2}', "says timestep_freq_shift = 2"),
    "kernel": ('{"kernel_function": "os.system"}', "says kernel_function = os.system"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_lies_is_refused(folder, name):
    text, message = METADATA[name]
    save_file(make_torch().state_dict(), folder / "a.safetensors", metadata={"architecture": text})
    with pytest.raises(PortingError, match=message):
        read_checkpoint(folder / "a.safetensors")


# Asked-for changes.


def test_label_table_is_resized_only_when_asked(folder):
    model = make_torch()
    save(model, folder / "a.pt")
    table = model.y_embedder.embedding_table.weight.detach().numpy()

    def read(**kwargs):
        checkpoint = read_checkpoint(folder / "a.pt", num_heads=3, **kwargs)
        return checkpoint, np.asarray(
            checkpoint.params["y_embedder"]["embedding_table"]["embedding"]
        )

    same, kept = read(num_classes=10)
    assert np.array_equal(kept, table) and not same.report.reinitialised
    fewer, rows = read(num_classes=4)
    assert np.array_equal(rows, table[[0, 1, 2, 3, 10]]) and not fewer.report.reinitialised
    more, rows = read(num_classes=40)
    assert np.array_equal(rows[:10], table[:10]) and np.array_equal(rows[-1], table[-1])
    assert rows.shape == (41, 48) and 0.015 < rows[10:40].std() < 0.025
    assert more.report.reinitialised == [
        "y_embedder/embedding_table/embedding[10:40], normal with std 0.02, seed 0"
    ]
    assert np.array_equal(read(num_classes=40)[1], rows) and not np.array_equal(
        read(num_classes=40, seed=1)[1], rows
    )
    assert more.architecture["num_classes"] == 40


def test_position_table_is_recomputed_only_when_asked(folder):
    checkpoint = read_checkpoint(
        save(make_torch(), folder / "a.pt"), input_size=(16, 12), num_heads=3
    )
    assert checkpoint.architecture["grid"] == (8, 6)
    assert "recomputed for the 8 x 6 grid, the source has 4 x 4" in " ".join(
        checkpoint.report.notes
    )
    export_official(checkpoint.params, folder / "b.pt", checkpoint.architecture)
    state = torch.load(folder / "b.pt", weights_only=True)
    assert torch.equal(state["pos_embed"], make_torch(grid=(8, 6)).pos_embed)
    with pytest.raises(
        PortingError, match="input_size = 16x15 was asked for, its patches are 2 wide"
    ):
        read_checkpoint(folder / "a.pt", input_size=(16, 15))
    orbax_checkpoint = read_checkpoint(folder / "a.pt")
    export_orbax(orbax_checkpoint, folder / "orbax")
    assert read_checkpoint(folder / "orbax", input_size=(16, 12)).architecture["grid"] == (8, 6)


def test_a_grid_that_is_not_square_can_be_named(folder):
    save(make_torch(grid=(3, 5)), folder / "a.pt")
    assert read_checkpoint(folder / "a.pt", input_size=(6, 10)).architecture["grid"] == (3, 5)
    with pytest.raises(PortingError, match="15 positions"):
        read_checkpoint(folder / "a.pt")
    with pytest.raises(PortingError, match="pos_embed differs from the computed 5 x 3 table"):
        read_checkpoint(folder / "a.pt", input_size=(10, 6))


# Out.


@pytest.mark.parametrize("name", VARIANTS)
def test_official_layout_comes_back_bit_for_bit(folder, name):
    fields = VARIANTS[name]
    model = make_torch(**fields)
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"]}
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", **known))
    for out, load in (
        (folder / "out.safetensors", load_file),
        (folder / "out.pt", functools.partial(torch.load, weights_only=True)),
    ):
        export_official(checkpoint.params, out, checkpoint.architecture)
        assert_same_state(load(out), model)
        again = read_checkpoint(out)
        assert again.report.checksum == checkpoint.report.checksum
        assert again.architecture == checkpoint.architecture


@pytest.mark.parametrize("name", ["dit", "lit", "lit_no_bias"])
def test_orbax_comes_back_bit_for_bit(folder, name):
    fields = VARIANTS[name]
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"]}
    checkpoint = read_checkpoint(save(make_torch(**fields), folder / "a.safetensors", **known))
    mesh = sharding.make_mesh(1, 8)
    shardings = sharding.fsdp_sharding(checkpoint.params, mesh, min_size=1)
    export_orbax(checkpoint, folder / "orbax", shardings=shardings)
    again = read_checkpoint(folder / "orbax")
    assert again.report.checksum == checkpoint.report.checksum
    assert again.architecture == checkpoint.architecture
    export_official(again.params, folder / "b.safetensors", again.architecture)
    loaded = load_params(again.params, shardings, consume=True)
    assert not jax.tree.leaves(again.params)  # each was let go as it was loaded
    assert_same_tree(loaded, checkpoint.params)
    assert (folder / "b.safetensors").read_bytes() == _official_bytes(
        checkpoint, folder / "c.safetensors"
    )


def _official_bytes(checkpoint, path):
    export_official(checkpoint.params, path, checkpoint.architecture)
    return path.read_bytes()


def test_leaves_load_straight_onto_shards(folder):
    model = make_torch()
    checkpoint = read_checkpoint(save(model, folder / "a.pt"))
    mesh = sharding.make_mesh(2, 4)
    shardings = sharding.fsdp_sharding(checkpoint.params, mesh, min_size=1)
    read = []

    class Spy:
        def __init__(self, leaf):
            self.leaf, self.shape = leaf, leaf.shape

        def __getitem__(self, index):
            part = self.leaf[index]
            read.append(part.size / self.leaf.size)
            return part

    sharded_params = load_params(jax.tree.map(Spy, checkpoint.params), shardings)
    assert_same_tree(sharded_params, load_params(checkpoint.params))
    assert jax.tree.map(lambda a: a.sharding, sharded_params) == shardings
    assert np.median(read) == 0.25  # no device is handed more than its part


def test_diffusers_loads_what_we_export_and_computes_the_same(folder):
    fields = dict(timestep_freq_shift=1, mlp_norm_epsilon=3e-5)
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", num_heads=3, **fields))
    export_diffusers(checkpoint.params, folder / "out", checkpoint.architecture)
    loaded, info = DiTTransformer2DModel.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, y = inputs({})
    expected = run_torch(model, x, t, y)
    assert rel(run_torch(loaded.eval(), x, t, y), expected) < 1e-5
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    again = read_checkpoint(folder / "out")
    assert (
        again.architecture == checkpoint.architecture
        and again.report.checksum == checkpoint.report.checksum
    )
    loaded.save_pretrained(folder / "theirs")
    assert read_checkpoint(folder / "theirs").report.checksum == checkpoint.report.checksum


def test_an_export_never_changes_the_function_silently(folder):
    official = read_checkpoint(save(make_torch(), folder / "a.safetensors", num_heads=3))
    with pytest.raises(
        PortingError, match="timestep_freq_shift = 0, code of that layout computes with 1; set port"
    ):
        export_diffusers(official.params, folder / "out", official.architecture)
    shifted = read_checkpoint(folder / "a.safetensors", timestep_freq_shift=1)
    with pytest.raises(
        PortingError, match="timestep_freq_shift = 1, code of that layout computes with 0"
    ):
        export_official(shifted.params, folder / "b.pt", shifted.architecture)
    lit = read_checkpoint(save(make_torch(attention="linear"), folder / "l.safetensors"))
    with pytest.raises(PortingError, match="diffusers has no LiT"):
        export_diffusers(lit.params, folder / "out", lit.architecture)
    assert sorted(os.listdir(folder)) == ["a.safetensors", "l.safetensors"]


@pytest.mark.parametrize(
    "kernel_function, suffix",
    [
        ("relu", ".safetensors"),
        ("relu", ".pt"),
        ("gelu", ".pt"),
        ("focused", ".pt"),
        ("focused_gelu", ".pt"),
    ],
)
def test_the_torch_module_beside_an_export_computes_the_same(folder, kernel_function, suffix):
    fields = dict(attention="linear", grid=(3, 5), timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    model = make_torch(**fields)
    known = {
        "grid": (3, 5),
        "kernel_function": kernel_function,
        "timestep_freq_shift": 1,
        "mlp_norm_epsilon": 1e-5,
    }
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", **known))
    written = export_official(
        checkpoint.params, folder / "out" / f"lit{suffix}", checkpoint.architecture
    )
    assert {path.name for path in written} == set(os.listdir(folder / "out"))
    torch_model = lit_torch(folder / "out" / "lit_torch.py").load(folder / "out" / f"lit{suffix}")
    x, t, y = inputs(fields)
    expected = run_torch(torch_model, x, t, y)
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    if kernel_function == "relu":
        assert rel(expected, run_torch(model, x, t, y)) < 2e-5
    if suffix == ".safetensors":  # another resolution, as our model takes any
        x, t, y = inputs(fields | {"grid": (2, 4)})
        assert rel(run_ours(checkpoint, x, t, y), run_torch(torch_model, x, t, y)) < 2e-5


def test_the_torch_module_runs_a_dit_too(folder):
    model = make_torch()
    checkpoint = read_checkpoint(save(model, folder / "a.safetensors", num_heads=3))
    export_official(checkpoint.params, folder / "b.safetensors", checkpoint.architecture)
    torch_model = lit_torch(pathlib.Path(lit_jax.__file__).parent / "assets" / "lit_torch.py").load(
        folder / "b.safetensors"
    )
    x, t, y = inputs({})
    assert rel(run_torch(torch_model, x, t, y), run_torch(model, x, t, y)) < 2e-5


def lit_torch(path):
    spec = importlib.util.spec_from_file_location("lit_torch_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Autoencoders: three spellings of one set of tensors.


def to_old_names(state):
    """diffusers before 0.18, and the files on the Hub of that time."""
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for key, value in state.items():
        for new, old in renames.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        out[key] = value
    return out


def to_ldm_names(state, prefix=""):
    """The original latent-diffusion code, for 3 resolutions: linear maps are 1 x 1 convolutions, `up` counts down."""
    out = {}
    for key, value in state.items():
        key = key.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        if "attentions.0" in key and "group_norm" not in key and key.endswith("weight"):
            value = value[:, :, None, None]
        for new, old in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            key = key.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
        for i in range(3):
            key = key.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            key = key.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            key = key.replace(f"up_blocks.{i}.resnets", f"up.{2 - i}.block")
            key = key.replace(f"up_blocks.{i}.upsamplers.0", f"up.{2 - i}.upsample")
        out[
            prefix
            + key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        ] = value
    return out


@pytest.fixture(scope="module")
def torch_autoencoder():
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=32,
        layers_per_block=2,
    )
    return randomise_(model, 5)


@pytest.fixture(scope="module")
def orbax_autoencoder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "a")


def test_three_spellings_give_one_autoencoder(folder, torch_autoencoder):
    torch_autoencoder.save_pretrained(folder / "new")
    state = torch_autoencoder.state_dict()
    reference = read_autoencoder(folder / "new")
    assert (
        reference.architecture["scaling_factor"] == 0.18215
        and reference.report.layout == "diffusers"
    )
    shutil.copytree(folder / "new", folder / "old")
    save_file(
        {k: v.contiguous() for k, v in to_old_names(state).items()},
        folder / "old" / "diffusion_pytorch_model.safetensors",
    )
    torch.save(
        {"state_dict": to_ldm_names(state) | {"loss.logvar": torch.zeros(())}}, folder / "ldm.ckpt"
    )
    torch.save(
        {"state_dict": to_ldm_names(state, "first_stage_model.") | {"model.x": torch.zeros(1)}},
        folder / "sd.ckpt",
    )
    assert (
        set(to_ldm_names(state)) & set(state) and len(set(to_ldm_names(state)) - set(state)) > 100
    )
    readings = {
        name: read_autoencoder(folder / name, scaling_factor=0.18215)
        for name in ("old", "ldm.ckpt", "sd.ckpt")
    }
    for name, reading in readings.items():
        assert reading.report.checksum == reference.report.checksum, name
        assert reading.architecture == reference.architecture, name
    assert readings["ldm.ckpt"].report.layout == "LDM"
    assert readings["ldm.ckpt"].report.left_out == {"loss.logvar": "loss of its training"}
    assert readings["sd.ckpt"].report.left_out == {"model.x": "not of the autoencoder"}


def test_autoencoder_goes_to_orbax_and_back(folder, torch_autoencoder):
    torch_autoencoder.save_pretrained(folder / "pipe" / "vae")
    report = port.run(
        config(port=dict(source=str(folder / "pipe" / "vae"), target=str(folder / "out"))),
        folder / "w",
    )
    again = read_autoencoder(folder / "out")
    assert (
        again.report.checksum
        == report.checksum
        == read_autoencoder(folder / "pipe").report.checksum
    )
    assert again.architecture == report.architecture
    with pytest.raises(PortingError, match="not a DiT or LiT checkpoint"):
        read_checkpoint(folder / "out")
    assert is_autoencoder(
        folder / "pipe"
    )  # a pipeline without a transformer, as Stable Diffusion's


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layers_per_block=10**9), "layers_per_block = 1000000000"),
        (dict(block_out_channels=[]), "block_out_channels = "),
        (dict(norm_num_groups=3), "norm_num_groups = 3, which does not divide"),
        (dict(scaling_factor=0), "scaling_factor = 0"),
        (dict(use_quant_conv="yes"), "use_quant_conv = yes"),
        (dict(extra=1), "describe no autoencoder"),
        (
            dict(latent_channels=8),
            r"encoder/conv_out/kernel \(3, 3, 8, 8\), expected \(3, 3, 8, 16\)",
        ),
    ],
)
def test_metadata_of_an_orbax_autoencoder_that_lie_are_refused(
    folder, orbax_autoencoder, change, message
):
    shutil.copytree(orbax_autoencoder, folder / "a")
    path = folder / "a" / "metadata" / "metadata"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"autoencoder": content["autoencoder"] | change}))
    with pytest.raises(PortingError, match=message):
        read_autoencoder(folder / "a")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scaling_factor=-1.0), "scaling_factor = -1.0"),
        (dict(norm_num_groups=5), "norm_num_groups = 5"),
        (dict(scaling_factor=True), "scaling_factor = True"),
        (dict(shift_factor=False), "shift_factor = False"),
        (dict(scaling_factor=float("nan")), "scaling_factor = nan"),
        (dict(shift_factor=float("inf")), "shift_factor = inf"),
        (dict(act_fn="re\nlu\x1b[2J"), r"act_fn = re\\nlu\\x1b\[2J, expected silu"),
        (dict(act_fn="relu"), "act_fn = relu"),
        (dict(latent_channels=8), "latent_channels = 8, expected 4"),
        (dict(_class_name="VQModel"), "describes a VQModel"),
        (dict(latents_mean=[0.0]), "latents_mean"),
        (dict(block_out_channels=[32, 64, 128]), "block_out_channels"),
        (dict(down_block_types=["X", "Y", "Z"]), "down_block_types"),
    ],
)
def test_autoencoder_config_that_lies_is_refused(folder, torch_autoencoder, change, message):
    torch_autoencoder.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(PortingError, match=message):
        read_autoencoder(folder)


def test_autoencoder_without_scale_or_with_odd_keys_is_refused(folder, torch_autoencoder):
    state = torch_autoencoder.state_dict()
    torch.save(to_ldm_names(state), folder / "a.ckpt")
    with pytest.raises(PortingError, match="set autoencoder.scaling_factor"):
        read_autoencoder(folder / "a.ckpt")
    torch.save(to_ldm_names(state) | {"encoder.extra": torch.zeros(1)}, folder / "b.ckpt")
    with pytest.raises(PortingError, match="unexpected: encoder.extra"):
        read_autoencoder(folder / "b.ckpt", scaling_factor=1.0)
    torch.save(state | to_old_names(state), folder / "c.pt")
    with pytest.raises(PortingError, match="both mean encoder.mid_block.attentions.0.to_q.weight"):
        read_autoencoder(folder / "c.pt", scaling_factor=1.0)
    narrow = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4)
    torch.save(narrow.state_dict(), folder / "d.pt")
    with pytest.raises(
        PortingError, match=r"32, what published ones have, does not divide the widths \(16,\)"
    ):
        read_autoencoder(folder / "d.pt", scaling_factor=1.0)
    flux = AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.save(flux.state_dict(), folder / "e.pt")
    with pytest.raises(PortingError, match="16 latent channels, .* shift their latents"):
        read_autoencoder(folder / "e.pt", scaling_factor=0.3611)
    with pytest.raises(ValueError, match="scaling_factor must not be negative; got -1.0"):
        read_autoencoder(folder / "d.pt", scaling_factor=-1.0)


# The job.


def config(**changes):
    base = dict(
        seed=0,
        model=dict(
            size="S",
            depth=3,
            width=48,
            num_heads=3,
            patch_size=2,
            attention="softmax",
            num_classes=10,
            input_size=8,
            in_channels=4,
            learn_sigma=True,
            qkv_bias=True,
            conv_size=5,
            kernel_function="relu",
        ),
        mesh=dict(data=-1, fsdp=1),
        port=dict(
            source="",
            target="",
            layout="",
            weights="ema",
            num_heads=0,
            num_classes=0,
            input_size=0,
            scaling_factor=0.0,
            timestep_freq_shift=None,
            mlp_norm_epsilon=None,
            check_model=True,
        ),
    )
    base = copy.deepcopy(base)
    for section, fields in changes.items():
        base[section] |= fields
    return ml_collections.ConfigDict(base)


def test_the_job_goes_there_and_back_again(folder):
    model = make_torch()
    source = save(model, folder / "a.pt")
    run = functools.partial(port.run, workdir=folder / "work")
    report = run(config(port=dict(source=str(source), target=str(folder / "orbax"), num_heads=3)))
    saved = json.loads((folder / "work" / "port_report.json").read_text())
    assert saved["counts"] == {
        "keys": 42,
        "left_out": 0,
        "missing": 0,
        "unexpected": 0,
        "reinitialised": 0,
    }
    assert saved["checksum"] == report.checksum and set(saved["keys"]) == set(model.state_dict())
    assert "42 keys matched" in report.summary() and report.checksum in report.summary()
    assert checkpoint.is_checkpoint(folder / "orbax")
    run(config(port=dict(source=str(folder / "orbax"), target=str(folder / "b.pt"))))
    assert_same_state(torch.load(folder / "b.pt", weights_only=True), model)
    run(
        config(
            port=dict(
                source=str(folder / "orbax"),
                target=str(folder / "d"),
                layout="diffusers",
                timestep_freq_shift=1,
            )
        )
    )
    back = run(
        config(
            port=dict(
                source=str(folder / "d"),
                target=str(folder / "c.safetensors"),
                timestep_freq_shift=0,
                mlp_norm_epsilon=1e-6,
            )
        )
    )
    assert back.checksum == report.checksum
    assert_same_state(load_file(folder / "c.safetensors"), model)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model=dict(depth=4)),
            "has depth = 3, the config's model has 4; name its model, or set port.check_model=False",
        ),
        (dict(model=dict(width=64)), "has width = 48, the config's model has 64"),
        (dict(model=dict(patch_size=4)), "has patch_size = 2, the config's model has 4"),
        (dict(model=dict(num_classes=1000)), "has num_classes = 10, the config's model has 1000"),
        (
            dict(model=dict(learn_sigma=False)),
            "has learn_sigma = True, the config's model has False",
        ),
        (dict(model=dict(input_size=16)), "has grid = 4x4, the config's model has 8x8"),
        (dict(port=dict(target="")), "port.target is empty"),
        (dict(port=dict(source="")), "port.source is empty"),
        (dict(port=dict(source="/nowhere")), "port.source = /nowhere: no such file"),
        (
            dict(port=dict(layout="onnx")),
            "port.layout must be one of orbax, dit, diffusers; got 'onnx'",
        ),
        (dict(port=dict(weights="best")), "weights must be ema or model"),
        (
            dict(port=dict(target="new.pth")),
            "port.target = new.pth: files are written as .pt or .safetensors, not .pth",
        ),
        (dict(port=dict(layout="dit")), "is written as .safetensors or .pt, not ''"),
        (dict(port=dict(num_heads=-3)), "port.num_heads must not be negative; got -3"),
        (dict(port=dict(num_classes=-1)), "port.num_classes must not be negative; got -1"),
        (dict(port=dict(input_size=-8)), "port.input_size must not be negative; got -8"),
        (dict(port=dict(timestep_freq_shift=2)), "port.timestep_freq_shift must be 0 or 1; got 2"),
        (
            dict(port=dict(mlp_norm_epsilon=0.0)),
            "port.mlp_norm_epsilon must be between 0 and 1; got 0.0",
        ),
        (dict(port=dict(layout="diffusers")), "timestep_freq_shift = 0"),
        (dict(port=dict(input_size=7)), "input_size = 7x7 was asked for, its patches are 2 wide"),
    ],
)
def test_the_job_says_what_is_wrong_and_writes_nothing(folder, change, message):
    source = save(make_torch(), folder / "a.pt")
    settings = config(port=dict(source=str(source), target=str(folder / "out"), num_heads=3))
    for section, fields in change.items():
        settings[section].update(fields)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        port.run(settings, folder / "work")
    assert os.listdir(folder) == ["a.pt"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch canary\x85R.", "asks to run posix.system"),
        (None, "neither an Orbax checkpoint nor a diffusers folder"),
    ],
)
def test_the_job_refuses_what_is_no_checkpoint(folder, monkeypatch, content, message):
    """And runs nothing of it, writes nothing."""
    monkeypatch.chdir(folder)
    source = folder / "a.pt"
    source.mkdir() if content is None else source.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        port.run(config(port=dict(source=str(source), target=str(folder / "out"))), folder / "work")
    assert os.listdir(folder) == ["a.pt"]


def test_a_damaged_file_is_named_before_anything_is_written(folder):
    """One bit in one weight: still finite, still of the right shape."""
    model = make_torch()
    source = save(model, folder / "a.pt")
    content = model.blocks[1].mlp.fc2.weight.detach().numpy().tobytes()
    data = source.read_bytes()
    place = data.index(content) + 1000
    source.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(
        torch_file.TensorFileError, match=r"record 'a/data/\d+' is damaged: its CRC-32 is"
    ):
        port.run(
            config(port=dict(source=str(source), target=str(folder / "out"), num_heads=3)),
            folder / "work",
        )
    assert os.listdir(folder) == ["a.pt"]
    source.write_bytes(data)
    assert any("the CRC-32 of 42 records" in note for note in read_checkpoint(source).report.notes)


def test_what_goes_beside_an_export_replaces_nothing(folder):
    source = save(make_torch(attention="linear"), folder / "a.safetensors", kernel_function="relu")
    checkpoint = read_checkpoint(source)
    for name in ("lit_torch.py", "b.pt.json"):
        (folder / name).write_text("mine")
        with pytest.raises(
            PortingError, match=f"{name} exists and is another than would be written beside b.pt"
        ):
            export_official(checkpoint.params, folder / "b.pt", checkpoint.architecture)
        assert (folder / name).read_text() == "mine" and not (folder / "b.pt").exists()
        (folder / name).unlink()
    export_official(checkpoint.params, folder / "b.pt", checkpoint.architecture)
    export_official(
        checkpoint.params, folder / "c.pt", checkpoint.architecture
    )  # the same lit_torch.py


def test_a_killed_export_does_not_stand_in_the_way(folder):
    fields = dict(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    checkpoint = read_checkpoint(
        save(make_torch(**fields), folder / "a.safetensors", num_heads=3, **fields)
    )
    (folder / ".out.partial").mkdir()
    (folder / ".out.partial" / "half").write_text("x")
    export_diffusers(checkpoint.params, folder / "out", checkpoint.architecture)
    assert sorted(os.listdir(folder / "out")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert sorted(os.listdir(folder)) == ["a.safetensors", "out"]


def test_a_report_without_a_place_stops_the_job_before_it_writes(folder):
    source = save(make_torch(), folder / "a.pt")
    (folder / "file").write_text("x")
    settings = config(port=dict(source=str(source), target=str(folder / "out"), num_heads=3))
    with pytest.raises(ValueError, match="workdir = .*file/work: .*file is not a folder"):
        port.run(settings, folder / "file" / "work")
    assert sorted(os.listdir(folder)) == ["a.pt", "file"]


def test_the_job_never_overwrites_and_can_skip_the_check(folder):
    source = save(make_torch(), folder / "a.pt")
    (folder / "out").mkdir()
    (folder / "out" / "precious").write_text("x")
    settings = config(port=dict(source=str(source), target=str(folder / "out"), num_heads=3))
    with pytest.raises(ValueError, match="exists; a port never overwrites"):
        port.run(settings, folder / "work")
    settings = config(
        model=dict(depth=9),
        port=dict(source=str(source), target=str(folder / "b"), check_model=False),
    )
    port.run(settings, folder / "work")
    lit = config(
        model=dict(attention="linear", num_heads=2),
        port=dict(source=str(source), target=str(folder / "c")),
    )
    port.run(lit, folder / "work")  # the teacher of a LiT config
    # The position table is counted in the source's patches, not the config's.
    settings = config(
        model=dict(patch_size=4),
        port=dict(source=str(source), target=str(folder / "d"), check_model=False, input_size=16),
    )
    assert port.run(settings, folder / "work").architecture["grid"] == (8, 8)


def test_a_training_checkpoint_of_ours_is_read(folder):
    """EMA or raw, from the workdir of a run."""
    checkpoint = read_checkpoint(save(make_torch(attention="linear"), folder / "a.safetensors"))
    params = load_params(checkpoint.params)
    raw = jax.tree.map(lambda a: a + 1.0, params)
    manager = checkpoint.Checkpointer(folder / "work" / "checkpoints", keep=1, keep_every=0)
    items = {
        "params": raw,
        "ema_params": params,
        "opt_state": {"m": jnp.zeros(2)},
        "train": {"step": jnp.zeros(())},
    }
    manager.save(5, items, data={}, metadata={"model": checkpoint.architecture})
    manager.wait()
    manager.close()
    ema = read_checkpoint(folder / "work")
    assert (
        ema.report.checksum == checkpoint.report.checksum
        and ema.architecture == checkpoint.architecture
    )
    model = read_checkpoint(folder / "work", weights="model")
    assert model.report.checksum != ema.report.checksum
    assert_same_tree(model.params, raw)


def test_integers_in_an_orbax_checkpoint_are_refused(folder):
    checkpoint = read_checkpoint(save(make_torch(), folder / "a.pt"))
    flat = flatten_dict(load_params(checkpoint.params), sep="/")
    flat["blocks/mlp/fc1/bias"] = flat["blocks/mlp/fc1/bias"].astype(jnp.int32)
    checkpoint.save_params(folder / "b", unflatten_dict(flat, sep="/"), {})
    with pytest.raises(PortingError, match="wrong: blocks/mlp/fc1/bias of int32, expected a float"):
        read_checkpoint(folder / "b")
    (folder / "b" / "metadata" / "metadata").write_text("[1]")
    with pytest.raises(ValueError, match="b cannot be read: its metadata is a list, not an object"):
        read_checkpoint(folder / "b")


def training_config(**changes):
    settings = debug.get_config()
    settings.model.update(num_heads=2, width=32, depth=2)
    for name, value in changes.items():
        settings.update_from_flattened_dict({name: value})
    return settings


def test_the_main_job_chooses_ema_or_raw(folder):
    """teacher.weights and student.weights, of a DiT training checkpoint."""
    fields = dict(depth=2, width=32, num_heads=2, patch_size=4, in_channels=1, grid=(7, 7))
    model, ema = make_torch(1, **fields), make_torch(2, **fields)
    torch.save(training_checkpoint(model, ema), folder / "a.pt")
    expected = {
        name: read_checkpoint(save(weights, folder / f"{name}.pt")).report.checksum
        for name, weights in (("model", model), ("ema", ema))
    }
    for weights in expected:
        settings = training_config(
            **{
                "teacher.checkpoint": str(folder / "a.pt"),
                "teacher.weights": weights,
                "teacher.num_heads": 2,
                "student.init": str(folder / "a.pt"),
            }
        )
        settings.student.weights = "model" if weights == "ema" else "ema"
        student = experiment.student(settings)
        _, source = train.open_teacher(settings, student)
        assert source.report.checksum == expected[weights]
        assert (
            train.open_init_source(settings, student, source).report.checksum
            == expected[settings.student.weights]
        )


def test_the_main_job_inherits_no_convention_unseen(folder):
    """Weights of a diffusers folder are for other timestep frequencies than the student's."""
    make_diffusers(
        num_layers=2,
        num_attention_heads=2,
        patch_size=4,
        in_channels=1,
        out_channels=2,
        sample_size=28,
    ).save_pretrained(folder)
    settings = training_config(**{"teacher.checkpoint": str(folder)})
    student = experiment.student(settings)
    _, source = train.open_teacher(settings, student)
    with pytest.raises(
        ValueError,
        match="model.timestep_freq_shift = 0, but .* inherits from, computes with 1; set model",
    ):
        train.open_init_source(settings, student, source)
    settings.model.update(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    assert train.open_init_source(settings, experiment.student(settings), source) is source
    settings.student.init = "random"
    assert train.open_init_source(settings, student, source) is None


def test_opening_a_file_costs_no_memory_for_its_tensors(folder):
    """A sparse 64 GiB file opens: tensors are views of the map."""
    size = 64 << 30
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    with (folder / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    tensors = torch_file.read_safetensors(folder / "a.safetensors").tensors
    assert tensors["a"].nbytes == size and tensors["a"][-1] == 0
