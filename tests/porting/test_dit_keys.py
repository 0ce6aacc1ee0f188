"""The layouts of DiT and LiT against real torch and real diffusers, random weights everywhere."""

import argparse
import dataclasses
import functools
import json
import os
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import save_file
from torch_checkpoints import (
    VARIANTS,
    config_of,
    inputs,
    make_diffusers,
    make_torch,
    poison,
    port_config,
    rel,
    rename_key,
    run_ours,
    run_torch,
    save,
    set_key,
    write_diffusers,
)
from torch_dit import DiT

from lit_jax import models, ranges
from lit_jax.diffusion import GaussianDiffusion
from lit_jax.jobs import port
from lit_jax.models import attention, dit
from lit_jax.porting.dit import Overrides, entries
from lit_jax.porting.read import load_params, read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_official, export_orbax


@pytest.mark.parametrize("name", VARIANTS)
def test_official_checkpoints_compute_the_same_function(tmp_path, name):
    fields = VARIANTS[name]
    model = make_torch(**fields)
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"], "kernel_function": "relu"}
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", **known))
    assert checkpoint.config == config_of(fields)
    report = checkpoint.report
    assert set(report.keys) == set(model.state_dict()) and not report.left_out and not report.notes
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    x, t, y = inputs(fields)
    assert rel(run_ours(checkpoint, x, t, y), run_torch(model, x, t, y)) < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_key(name):
    config = config_of(VARIANTS[name])
    shapes = flatten_dict(models.param_shapes(config), sep="/")
    assert {entry.path: entry.shape for entry in entries(config)} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    keys = [key for entry in entries(config) for key in entry.keys]
    assert {"pos_embed", *keys} == set(make_torch(**VARIANTS[name]).state_dict())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["dit", "lit"])
def test_every_module_computes_the_same(tmp_path, name):
    """Each module on the input that torch's module of the same name had, blocks one by one."""
    fields = VARIANTS[name]
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=3))
    seen = {}
    outputs = {}

    def hook(_, arguments, output, name):
        seen[name] = [a.numpy() for a in arguments if isinstance(a, torch.Tensor)]
        outputs[name] = output.numpy()

    for module_name, module in model.named_modules():
        module.register_forward_hook(functools.partial(hook, name=module_name))
    # An angle of the embedding carries t * 2^-24 of rounding: with a small t the tolerance is of
    # the modules.
    x, _, y = inputs(fields)
    run_torch(model, x, np.array([3, 63]), y)
    params = load_params(checkpoint.params)
    compared = set()

    def compare(module, params, where, *arguments):
        _, state = module.apply({"params": params}, *arguments, capture_intermediates=True)
        for path, (value,) in flatten_dict(state["intermediates"]).items():
            inner = ".".join(path[:-1]).replace("mlp_0", "mlp.0").replace("mlp_2", "mlp.2")
            torch_name = ".".join(filter(None, (where, inner))).replace(
                "adaLN_modulation", "adaLN_modulation.1"
            )
            # Our convolution hands over its filters.
            if torch_name in outputs and not torch_name.endswith("dwc"):
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
        block = dit.Block(checkpoint.config, fields["grid"], None, jnp.float32)
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
    parts = ("qkv", "proj") if name == "dit" else ("q", "kv", "proj")
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
    in_block += [f".attn.{part}" for part in parts]
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
def test_one_training_loss_is_the_same(tmp_path, name):
    """Mean squared error of the noise and the variational term, from each side's output."""
    fields = VARIANTS[name]
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=3))
    x_start, t, y = inputs(fields)
    noise = np.random.default_rng(2).normal(size=x_start.shape).astype(np.float32)
    process = GaussianDiffusion()
    x_t = np.asarray(process.perturb(x_start, t, noise))

    def loss(output):
        terms = process.loss(jnp.asarray(output), *map(jnp.asarray, (x_start, x_t, t, noise)))
        return {key: float(np.mean(value)) for key, value in terms.items()}

    ours = loss(run_ours(checkpoint, x_t, t, y))
    theirs = loss(run_torch(model, x_t, t, y))
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_wrong_port_is_noticed(tmp_path):
    """The parity above can fail: swapping k and v, or two chunks of the modulation, shows."""
    model = make_torch()
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=3))
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
        wrong = dataclasses.replace(checkpoint, params=params)
        assert rel(run_ours(wrong, x, t, y), expected) > 1e-3, path


def test_repa_projectors_are_left_out_and_named(tmp_path):
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
        tmp_path / "a.pt",
    )
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert set(checkpoint.report.left_out) == set(extra)
    assert any("a REPA model" in note for note in checkpoint.report.notes)
    assert checkpoint.config.prediction == "velocity"
    # Without them it is the same file, but for what turns REPA's time and sign to SiT's.
    plain = read_checkpoint(save(model, tmp_path / "b.pt"))
    ours, theirs = (flatten_dict(each.params, sep="/") for each in (checkpoint, plain))
    changed = {path for path in theirs if not np.array_equal(ours[path], theirs[path])}
    assert ours.keys() == theirs.keys()
    assert changed == {
        "t_embedder/mlp_0/kernel",
        "final_layer/linear/kernel",
        "final_layer/linear/bias",
    }


def test_published_head_counts_are_known_and_others_asked_for(tmp_path):
    checkpoint = read_checkpoint(save(make_torch(), tmp_path / "a.pt"))
    assert checkpoint.config.num_heads is None
    with pytest.raises(PortingError, match="num_heads must be named: the checkpoint does"):
        export_official(checkpoint.params, tmp_path / "b.pt", checkpoint.config)
    with pytest.raises(PortingError, match="num_heads = 5 does not divide the width 48"):
        read_checkpoint(tmp_path / "a.pt", overrides=Overrides(num_heads=5))
    small = read_checkpoint(save(DiT(12, 384, 6, 8, 4, 10, (2, 2)), tmp_path / "s.pt"))
    assert small.config.num_heads == 6
    assert (
        "num_heads = 6 is that of the published size of this depth and width" in small.report.notes
    )
    assert not (tmp_path / "b.pt").exists()


# diffusers.


@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "sharded_safetensors", "sharded_bin", "pipeline"]
)
def test_diffusers_folders_compute_what_diffusers_computes(tmp_path, form):
    model = make_diffusers()
    target = tmp_path / "transformer" if form == "pipeline" else tmp_path
    model.save_pretrained(
        target,
        safe_serialization="bin" not in form,
        max_shard_size="200KB" if "sharded" in form else "5GB",
    )
    if form == "sharded_bin":
        assert len(list(tmp_path.glob("*.bin"))) > 2
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config == config_of(dict(timestep_freq_shift=1, mlp_norm_epsilon=1e-5))
    assert len(checkpoint.report.left_out) == 2 * 5  # the embedders of blocks 1 and 2
    assert set(checkpoint.report.keys) | set(checkpoint.report.left_out) == set(model.state_dict())
    x, t, y = inputs({})
    expected = run_torch(model, x, t, y)
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    official = read_checkpoint(tmp_path, overrides=Overrides(timestep_freq_shift=0))
    assert rel(run_ours(official, x, t, y), expected) > 1e-3  # the convention matters
    assert any("timestep_freq_shift = 0 was asked for" in note for note in official.report.notes)


def test_what_is_assumed_without_a_config_is_noted(tmp_path):
    write_diffusers(tmp_path)
    notes = read_checkpoint(
        tmp_path / "diffusion_pytorch_model.safetensors", overrides=Overrides(num_heads=3)
    ).report.notes
    assert (
        "no config.json beside it: diffusers' defaults are taken, timestep_freq_shift = 1, "
        "mlp_norm_epsilon = 1e-05"
    ) in notes


def test_old_diffusers_configs_are_taken(tmp_path):
    write_diffusers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).config.num_heads == 3


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
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, name):
    change, message = DIFFUSERS_FAULTS[name]
    write_diffusers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path)


def test_block_embedders_that_differ_are_refused(tmp_path):
    model = make_diffusers()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[3, 4] += 1e-6
    model.save_pretrained(tmp_path)
    with pytest.raises(
        PortingError, match="transformer_blocks.2.norm1.emb.class_embedder.* differs from block 0's"
    ):
        read_checkpoint(tmp_path)


# State dicts and metadata that lie.


STATES = {
    "not_a_dit": (
        lambda s: (s.clear(), s.update({"conv.weight": torch.zeros(2)})),
        "not a DiT or LiT checkpoint: x_embedder",
    ),
    "empty": (lambda s: s.clear(), "no tensors"),
    "missing_key": (lambda s: s.pop("blocks.1.mlp.fc1.bias"), "missing: blocks.1.mlp.fc1.bias"),
    "unexpected_key": (
        set_key("blocks.1.attn.q_norm.weight", torch.zeros(16)),
        "unexpected: blocks.1.attn.q_norm.weight",
    ),
    "both_named": (
        rename_key("blocks.0.attn.proj.bias", "blocks.0.attn.project.bias"),
        "missing: blocks.0.attn.proj.bias; unexpected: blocks.0.attn.project.bias",
    ),
    "wrong_shape": (
        set_key("blocks.2.mlp.fc2.weight", torch.zeros(192, 48)),
        r"blocks.2.mlp.fc2.weight \(192, 48\), expected \(48, 192\)",
    ),
    "scalar": (
        set_key("blocks.2.mlp.fc2.bias", torch.zeros(())),
        r"blocks.2.mlp.fc2.bias \(\), expected \(48,\)",
    ),
    "empty_tensor": (
        set_key("x_embedder.proj.weight", torch.zeros(48, 0, 2, 2)),
        "non-empty dimensions",
    ),
    "integer_weights": (
        set_key("blocks.2.mlp.fc2.bias", torch.zeros(48, dtype=torch.int32)),
        "of int32, expected a float",
    ),
    "nan": (
        poison("blocks.1.mlp.fc1.weight", float("nan")),
        r"blocks/mlp/fc1/kernel\[1\] holds values that are not finite",
    ),
    "inf": (
        poison("final_layer.linear.bias", float("inf")),
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
        set_key("blocks.999999999999.x", torch.zeros(1)),
        "unexpected: blocks.999999999999.x",
    ),
    "learned_pos_embed": (
        lambda s: s.update({"pos_embed": s["pos_embed"] + 6e-3}),
        "pos_embed differs from the computed 4 x 4 table, by up to 0.006 .*0.005.: this is another",
    ),
    "scaled_pos_embed": (
        lambda s: s.update({"pos_embed": s["pos_embed"] * 1.02}),
        "pos_embed is 1.02 times the computed 4 x 4 table, by up to 0.02 .*: this is a scaled",
    ),
    "transposed_pos_embed": (
        lambda s: s.update(
            pos_embed=s["pos_embed"].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        ),
        "pos_embed differs",
    ),
    "nan_pos_embed": (poison("pos_embed", float("nan")), "pos_embed differs .* up to nan"),
    "inf_pos_embed": (poison("pos_embed", float("inf")), "pos_embed differs .* up to inf"),
    "scalar_pos_embed": (
        set_key("pos_embed", torch.zeros(())),
        r"pos_embed has shape \(\), expected 3",
    ),
    "one_key_of_diffusers": (
        set_key(
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", torch.zeros(48, 256)
        ),
        r"x_embedder.proj.weight is missing .*\(not of diffusers\)",
    ),
    "odd_pos_embed": (
        set_key("pos_embed", torch.zeros(1, 15, 48)),
        "15 positions, the grid is unknown",
    ),
    # Its computed table would have 4 million rows of 40,000.
    "pos_embed_without_end": (
        lambda s: s.update(
            {
                "pos_embed": torch.zeros(1, 2000**2, 1, dtype=torch.float16),
                "x_embedder.proj.weight": torch.zeros(40_000, 4, 2, 2, dtype=torch.float16),
            }
        ),
        r"pos_embed is \(1, 4000000, 1\) .* needs \(1, 4000000, 40000\)",
    ),
    "narrow_pos_embed": (set_key("pos_embed", torch.zeros(1, 16, 40)), "needs"),
    "output_channels": (
        set_key("final_layer.linear.weight", torch.zeros(48, 48)),
        "48 outputs; patch 2 and 4 channels need 16, or 32",
    ),
    "rectangular_patch": (
        set_key("x_embedder.proj.weight", torch.zeros(48, 4, 2, 3)),
        r"\(48, 4, 2, 3\), expected \(48, 4, 2, 2\)",
    ),
    "one_row_of_labels": (
        set_key("y_embedder.embedding_table.weight", torch.zeros(1, 48)),
        "label table of 1 row",
    ),
    "odd_width": (
        set_key("x_embedder.proj.weight", torch.zeros(47, 4, 2, 2)),
        "a.pt: width = 47 is not a multiple of 4",
    ),
    "prefix_of_some_keys": (
        rename_key("x_embedder.proj.weight", "module.x_embedder.proj.weight"),
        "x_embedder.proj.weight is missing",
    ),
    "both_attentions": (
        set_key("blocks.0.attn.q.weight", torch.zeros(48, 48)),
        "missing: .*unexpected: blocks.0.attn.qkv",
    ),
    "key_not_text": (
        lambda s: s.update({7: torch.zeros(1)}),
        "'7' is a ndarray, not a tensor|not a tensor",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_state_dicts_that_lie_are_refused(tmp_path, name):
    change, message = STATES[name]
    state = {key: value.clone() for key, value in make_torch().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(ValueError):  # and the job writes nothing
        port.run(port_config(source=tmp_path / "a.pt", target=tmp_path / "out"), tmp_path / "work")
    assert os.listdir(tmp_path) == ["a.pt"]


METADATA = {
    "not_json": ("{", "not valid JSON"),
    "a_list": ("[]", "a list, not an object"),
    "the_same_field_twice": ('{"num_heads": 3, "num_heads": 2}', "'num_heads' appears twice"),
    "unknown_field": ('{"depht": 3}', "depht = 3 is no field of an architecture"),
    "heads_do_not_divide": (
        '{"num_heads": 5}',
        "num_heads = 5 does not divide the width 48",
    ),
    "negative_heads": (
        '{"num_heads": -3}',
        "its metadata: num_heads must be a whole number .*; got -3",
    ),
    "heads_as_text": ('{"num_heads": "3"}', "num_heads must be a whole number .*; got '3'"),
    "another_depth": ('{"depth": 4}', "depth = 4, the tensors say 3"),
    "another_attention": ('{"attention": "linear"}', "attention = linear, the tensors say softmax"),
    "grid_of_three": ('{"grid": [4, 4, 1]}', "grid must be two whole numbers"),
    "another_grid": ('{"grid": [4, 5]}', "16 positions, the grid is 4 x 5"),
    "huge_grid": ('{"grid": [1000000000, 1000000000]}', "grid must be two whole"),
    "epsilon": ('{"mlp_norm_epsilon": 0.0}', "mlp_norm_epsilon must be .*; got 0.0"),
    "shift": ('{"timestep_freq_shift": 2}', "timestep_freq_shift must be 0 or 1; got 2"),
    "kernel": ('{"kernel_function": "os.system"}', "kernel_function must be one of relu"),
    "kernel_a_list": ('{"kernel_function": ["relu"]}', "kernel_function must be one of relu"),
    "learn_sigma_as_text": ('{"learn_sigma": "yes"}', "learn_sigma must be True or False"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_lies_is_refused(tmp_path, name):
    text, message = METADATA[name]
    save_file(
        make_torch().state_dict(), tmp_path / "a.safetensors", metadata={"architecture": text}
    )
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "a.safetensors")


# Asked-for changes.


def test_label_table_is_resized_only_when_asked(tmp_path):
    model = make_torch()
    save(model, tmp_path / "a.pt")
    table = model.y_embedder.embedding_table.weight.detach().numpy()

    def read(**kwargs):
        checkpoint = read_checkpoint(tmp_path / "a.pt", overrides=Overrides(**kwargs))
        rows = checkpoint.params["y_embedder"]["embedding_table"]["embedding"]
        return checkpoint, np.asarray(rows)

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
    assert np.array_equal(read(num_classes=40)[1], rows)
    assert not np.array_equal(read(num_classes=40, seed=1)[1], rows)
    assert more.config.num_classes == 40


def averaged(table):
    """A frozen table in the EMA of DiT's train.py, which averages it too, after 5,000 steps."""
    average = table.clone()
    for _ in range(5000):
        average.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    return average


ROUNDED_TABLES = {
    "averaged": averaged,
    "bfloat16": lambda table: table.bfloat16().float(),
    "float16": lambda table: table.half().float(),
    "a_little_off": lambda table: table + 4e-3,
}


@pytest.mark.parametrize("how", ROUNDED_TABLES)
def test_a_rounded_position_table_is_the_computed_one(tmp_path, how):
    model = make_torch()
    expected = read_checkpoint(save(model, tmp_path / "a.pt")).report
    table = model.pos_embed.detach().clone()
    with torch.no_grad():
        model.pos_embed.copy_(ROUNDED_TABLES[how](table))
    difference = float((model.pos_embed - table).abs().max())
    assert difference > 5e-5  # or this would test nothing
    report = read_checkpoint(save(model, tmp_path / "b.pt")).report
    assert report.checksum == expected.checksum
    said = f"largest difference {difference:.2g}"
    assert said in report.keys["pos_embed"]
    notes = [note for note in report.notes if note not in expected.notes]
    assert len(notes) == 1 and said in notes[0]


def test_position_table_is_recomputed_only_when_asked(tmp_path):
    wanted = Overrides(num_heads=3, input_size=(16, 12))
    checkpoint = read_checkpoint(save(make_torch(), tmp_path / "a.pt"), overrides=wanted)
    assert checkpoint.config.grid == (8, 6)
    note = "the position table is recomputed for the 8 x 6 grid, the source has 4 x 4"
    assert note in checkpoint.report.notes
    export_official(checkpoint.params, tmp_path / "b.pt", checkpoint.config)
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(state["pos_embed"], make_torch(grid=(8, 6)).pos_embed)
    with pytest.raises(PortingError, match="^input_size = 8000x8000: a grid of 4000x4000 posit"):
        read_checkpoint(tmp_path / "a.pt", overrides=Overrides(input_size=(8000, 8000)))
    message = "input_size = 16x15 was asked for, but the patches of .*a.pt are 2 wide"
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "a.pt", overrides=Overrides(input_size=(16, 15)))
    export_orbax(read_checkpoint(tmp_path / "a.pt"), tmp_path / "orbax")
    assert read_checkpoint(tmp_path / "orbax", overrides=wanted).config.grid == (8, 6)


def test_a_grid_that_is_not_square_can_be_named(tmp_path):
    save(make_torch(grid=(3, 5)), tmp_path / "a.pt")
    named = read_checkpoint(tmp_path / "a.pt", overrides=Overrides(input_size=(6, 10)))
    assert named.config.grid == (3, 5)
    message = "^input_size must be named: pos_embed of .*a.pt has 15 positions, the grid is unknown"
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(PortingError, match="pos_embed differs from the computed 5 x 3 table"):
        read_checkpoint(tmp_path / "a.pt", overrides=Overrides(input_size=(10, 6)))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_heads=-3), "num_heads must be at least 0; got -3"),
        (dict(num_classes=-1), r"num_classes must be in \[0, 1,000,000\]; got -1"),
        (dict(num_classes=10**13), r"num_classes must be in \[0, 1,000,000\]; got 10{13}$"),
        (dict(input_size=(8, -8)), r"input_size must be at least 0; got \(8, -8\)"),
        (dict(timestep_freq_shift=2), "timestep_freq_shift must be 0 or 1; got 2"),
        (dict(mlp_norm_epsilon=0.0), "mlp_norm_epsilon must be between 0 and 1; got 0.0"),
    ],
)
def test_overrides_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Overrides(**fields)


def test_the_heads_of_a_convolution_are_not_overridden(tmp_path):
    save(make_torch(attention="linear"), tmp_path / "a.pt")
    message = "^num_heads = 2 was asked for, but blocks/attn/dwc/bias of .* is that of 3 heads"
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "a.pt", overrides=Overrides(num_heads=2))
    save(make_torch(attention="linear", conv_size=0), tmp_path / "b.pt")
    other = read_checkpoint(tmp_path / "b.pt", overrides=Overrides(num_heads=2))
    assert other.config.num_heads == 2


class GatedAttention(flax.linen.Module):
    """A design whose modules and leaves no checkpoint of LiT or DiT has."""

    num_heads: int
    qkv_bias: bool
    implementation: str | None
    dtype: Any

    @flax.linen.compact
    def __call__(self, x, grid):
        B, T, D = x.shape

        def dense(name):
            return flax.linen.Dense(D, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x)

        # A norm for each head: the shape follows their number.
        gate = flax.linen.RMSNorm(dtype=self.dtype, name="gate_norm")(
            dense("query").reshape(B, T, self.num_heads, -1)
        )
        mixed = gate.reshape(B, T, D) * dense("key") * dense("value").mean(axis=1, keepdims=True)
        return flax.linen.Dense(D, dtype=self.dtype, name="proj")(mixed)


def test_another_attention_design_is_ported_under_its_own_names(tmp_path, monkeypatch):
    design = attention.Design(GatedAttention, ("xla",))
    monkeypatch.setitem(attention.ATTENTIONS, "gated", design)
    monkeypatch.setitem(dit.DiTConfig.ranges, "attention", ranges.one_of(*attention.ATTENTIONS))
    config = dit.DiTConfig(
        depth=2, width=32, num_heads=2, attention="gated", num_classes=3, grid=(2, 2)
    )
    assert config.conv_size == 0  # which it does not read
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32),
        models.param_shapes(config),
    )
    export_official(params, tmp_path / "a.safetensors", config)
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert "blocks.1.attn.gate_norm.weight" in read.report.keys
    assert read.config == config
    jax.tree.map(np.testing.assert_array_equal, load_params(read.params), params)
    export_orbax(read, tmp_path / "orbax")
    again = read_checkpoint(tmp_path / "orbax")
    assert again.config == config and again.report.checksum == read.report.checksum


@pytest.mark.parametrize("design", sorted(attention.ATTENTIONS.keys() - {"softmax", "linear"}))
def test_every_design_goes_out_and_in(tmp_path, design):
    """Its own leaves too, under their paths; the metadata name the design."""
    config = dit.DiTConfig(
        depth=2, width=32, num_heads=2, attention=design, num_classes=3, conv_size=3, num_blocks=4,
        grid=(4, 4),
    )  # fmt: skip
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32),
        models.param_shapes(config),
    )
    export_official(params, tmp_path / "a.safetensors", config)
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert read.config == config
    jax.tree.map(np.testing.assert_array_equal, load_params(read.params), params)
