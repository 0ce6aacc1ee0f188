"""Files and folders of the PyTorch world opened: which weights, which shards, and no way out."""

import argparse
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import torch
from torch_checkpoints import (
    edit,
    make_diffusers,
    make_torch,
    save,
    set_key,
    training_checkpoint,
    write_diffusers,
)

from lit_jax.porting.dit import Overrides
from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError

# Training checkpoints.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "_orig_mod.module.", "net.module."])
def test_training_checkpoints_give_ema_or_model(tmp_path, prefix, legacy):
    model, ema = make_torch(seed=1), make_torch(seed=2)
    content = training_checkpoint(model, ema)
    for name in ("model", "ema"):
        content[name] = {prefix + key: value for key, value in content[name].items()}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    for weights, expected in (("ema", ema), ("model", model)):
        checkpoint = read_checkpoint(
            tmp_path / "a.pt", weights=weights, overrides=Overrides(num_heads=3)
        )
        same = read_checkpoint(save(expected, tmp_path / f"{weights}.pt"))
        assert checkpoint.report.checksum == same.report.checksum
        assert any("model=DiT-S/2" in note for note in checkpoint.report.notes)
    with pytest.raises(ValueError, match="weights must be ema or model; got 'best'"):
        read_checkpoint(tmp_path / "a.pt", weights="best")


def prefixed(state, prefix="module."):
    return {prefix + key: value for key, value in state.items()}


# What trainers make of a state dict, for weights=ema and weights=model alike where they
# keep one alone.
FORMS = {
    "prefix": lambda state: prefixed(state, "model."),
    "ema_prefix": lambda state: prefixed(state, "ema_model.module."),
    "lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "ema_state_dict": lambda state: {"ema_state_dict": state, "model_state_dict": {}},
    "shadow": lambda state: {"ema": {"decay": 0.999, "shadow": state}, "model": {}},
    "counted_shadow": lambda state: {
        "ema": {"decay": torch.tensor(0.9), "num_updates": 7, "shadow_params": state}
    },
    "num_updates": lambda state: {"ema": state | {"num_updates": torch.tensor(7)}},
    "averaged_model": lambda state: prefixed(state) | {"n_averaged": torch.tensor(7)},
    "averaged_model_in": lambda state: {"ema": prefixed(state) | {"n_averaged": torch.tensor(7)}},
    "a_scalar_beside": lambda state: {"model": {}, "ema": state, "steps": np.int64(5)},
    "an_array_beside": lambda state: {"model": {}, "ema": state, "losses": np.arange(3.0)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_where_trainers_keep_them(tmp_path, form):
    model = make_torch()
    torch.save(FORMS[form](model.state_dict()), tmp_path / "a.pt")
    expected = read_checkpoint(save(model, tmp_path / "b.pt")).report
    report = read_checkpoint(tmp_path / "a.pt").report
    assert report.checksum == expected.checksum and len(report.keys) == len(expected.keys)


def test_a_prefix_without_end_is_refused(tmp_path):
    state = prefixed(make_torch().state_dict(), "module." * 7)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(PortingError, match="x_embedder.proj.weight is missing .*: module.blocks"):
        read_checkpoint(tmp_path / "a.pt")


def test_the_first_bytes_tell_the_format_and_not_the_name(tmp_path):
    model = make_torch()
    expected = read_checkpoint(save(model, tmp_path / "a.safetensors")).report.checksum
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    assert read_checkpoint(tmp_path / "b.ckpt").report.checksum == expected
    for legacy in (False, True):
        torch.save(
            model.state_dict(),
            tmp_path / "c.safetensors",
            _use_new_zipfile_serialization=not legacy,
        )
        assert read_checkpoint(tmp_path / "c.safetensors").report.checksum == expected


def test_a_whole_module_says_what_to_save(tmp_path):
    torch.save({"model": make_torch()}, tmp_path / "a.pt")
    message = (
        r"asks to run torch_dit.DiT, .*save the state_dict alone: torch.save\(model.state_dict"
    )
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_arguments_are_repeated_in_one_short_line(tmp_path):
    """They are a stranger's: numbers of any length, texts of megabytes, control characters."""
    args = argparse.Namespace(num_classes=10**10_000, model="x" * 10**6, vae="\x1b[2J\nfine")
    state = make_torch().state_dict()
    torch.save({"ema": state, "args": args, "\x1b" * 5000: 1}, tmp_path / "a.pt")
    summary = read_checkpoint(tmp_path / "a.pt").report.summary()
    assert len(summary) < 2000 and "\x1b" not in summary and "num_classes=" not in summary
    assert "vae=\\x1b[2J\\nfine" in summary
    with pytest.raises(PortingError, match="has no such weights") as caught:
        torch.save({"a": {}, "\x1b" * 5000: 1}, tmp_path / "b.pt")
        read_checkpoint(tmp_path / "b.pt")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_checkpoint_without_ema_says_what_to_choose(tmp_path):
    torch.save({"model": make_torch().state_dict(), "steps": 3}, tmp_path / "a.pt")
    message = (
        "^weights = ema, but .* has no such weights, only 'model', 'steps'; choose weights=model"
    )
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_a_name_is_no_weight_and_beside_the_weights_no_obstacle(tmp_path):
    state = make_torch().state_dict()
    torch.save(
        {
            "ema": state,
            "args": argparse.Namespace(dtype=torch.float32),
            "callbacks": {os.system: 1},
        },
        tmp_path / "a.pt",
    )
    assert len(read_checkpoint(tmp_path / "a.pt").report.keys) == len(state)
    torch.save({"ema": state | {"blocks.0.attn.proj.bias": os.system}}, tmp_path / "b.pt")
    with pytest.raises(PortingError, match="'blocks.0.attn.proj.bias' is a Global, not a tensor"):
        read_checkpoint(tmp_path / "b.pt")


def test_a_linked_sidecar_is_not_followed_out_of_its_folder(tmp_path):
    (tmp_path / "elsewhere.json").write_text(json.dumps({"architecture": {"num_heads": 3}}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pt.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PortingError, match="a.pt.json: a link to .* outside the folder"):
        read_checkpoint(save(make_torch(), tmp_path / "in" / "a.pt"))


# Folders that lie.


def sharded(folder):
    write_diffusers(folder, shard_size="200KB")
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
    write_diffusers(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _no_config(folder):
    write_diffusers(folder)
    (folder / "config.json").unlink()


def _config_a_list(folder):
    write_diffusers(folder)
    (folder / "config.json").write_text("[]")


def _weights_link_out(folder):
    write_diffusers(folder)
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
    write_diffusers(folder)
    edit(folder, lambda state: state.pop("transformer_blocks.1.attn1.to_k.weight"))


def _projection_wrong(folder):
    write_diffusers(folder)
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.1.attn1.to_k.weight": torch.zeros(48, 40)}),
    )


def _projection_uneven(folder):
    write_diffusers(folder)
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
    write_diffusers(folder)
    edit(
        folder,
        lambda state: state.pop("transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"),
    )


def _extra_key(folder):
    write_diffusers(folder)
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.1.attn2.to_q.weight": torch.zeros(48, 48)}),
    )


def _block_number_huge(folder):
    write_diffusers(folder)
    edit(
        folder,
        lambda state: state.update({"transformer_blocks.999999.ff.net.2.bias": torch.zeros(48)}),
    )


def _unknown_embedder_leaf(folder):
    write_diffusers(folder)
    edit(
        folder,
        set_key(
            "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.bias", torch.zeros(48)
        ),
    )


def _unknown_embedder_part(folder):
    write_diffusers(folder)
    edit(
        folder,
        set_key(
            "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.lora_A", torch.zeros(48)
        ),
    )


def _leading_zero(folder):
    write_diffusers(folder)
    edit(folder, set_key("transformer_blocks.01.attn1.to_out.0.weight", torch.full((48, 48), 9.0)))


def _other_digits(folder):
    write_diffusers(folder)
    edit(
        folder,
        set_key("transformer_blocks.\u0661.attn1.to_out.0.weight", torch.full((48, 48), 9.0)),
    )


def _official_block(folder):
    write_diffusers(folder)
    edit(folder, set_key("blocks.0.mlp.fc1.weight", torch.full((192, 48), 9.0)))


def _official_top(folder):
    write_diffusers(folder)
    edit(folder, set_key("x_embedder.proj.weight", torch.full((48, 4, 2, 2), 9.0)))


def _config_link_out(folder):
    write_diffusers(folder)
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
    write_diffusers(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 10**6}))


def _shard_of_a_bad_name(folder):
    index, content = sharded(folder)
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "\x1b[2J" + "n" * 200
    index.write_text(json.dumps(content))


def _shard_of_a_long_name(folder):
    index, content = sharded(folder)
    content["weight_map"][next(iter(content["weight_map"]))] = "\x1b" * 5000
    index.write_text(json.dumps(content))


def _transformer_link_out(folder):
    write_diffusers(folder.parent / f"{folder.name}_outside")
    (folder / "transformer").symlink_to(folder.parent / f"{folder.name}_outside")


def _config_large(folder):
    write_diffusers(folder)
    os.truncate(folder / "config.json", 9 << 20)


def _long_key(folder):
    write_diffusers(folder)
    edit(folder, set_key("k" * 10**5, torch.zeros(1)))


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
    _no_weights: "no diffusion_pytorch_model.safetensors or",
    _no_config: "no config.json",
    _config_a_list: "a list, not an object",
    _shard_is_a_pointer: "Git LFS pointer",
    _projection_missing: "missing: transformer_blocks.1.attn1.to_k.weight",
    _projection_wrong: r"\(48, 40\)",
    _projection_uneven: r"\(40, 48\).*expected \(144, 48\)",
    _embedder_missing: "missing: transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias",
    _extra_key: "unexpected: transformer_blocks.1.attn2.to_q.weight",
    _block_number_huge: "do not count up from 0",
    _unknown_embedder_leaf: "unexpected: transformer_blocks.1.norm1.emb.class_embedder.*.bias",
    _unknown_embedder_part: "unexpected: transformer_blocks.2.norm1.emb.*linear_1.lora_A",
    _leading_zero: "unexpected: transformer_blocks.01.attn1.to_out.0.weight",
    _other_digits: "unexpected: transformer_blocks",
    _official_block: "unexpected: blocks.0.mlp.fc1.weight",
    _official_top: "unexpected: x_embedder.proj.weight",
    _config_link_out: "config.json: a link to .* outside the folder",
    _index_link_out: "index.json: a link to",
    _variant: "diffusion_pytorch_model.fp16.safetensors is a variant",
    _grid_huge: "grid of 500000x500000 positions, the limit is",
    _shard_of_a_bad_name: r"index.json: names '.{1,90}, which is not in the folder$",
    _shard_of_a_long_name: r"names the file .{1,90}, which is not a plain file name$",
    _transformer_link_out: "transformer: a link to .*, outside the folder; name that itself",
    _config_large: "config.json: not valid JSON: larger than 8388608 bytes",
    _long_key: r"unexpected: k{77}\.\.\.$",
}


@pytest.mark.parametrize("fault", FOLDERS, ids=lambda f: f.__name__[1:])
def test_hostile_folders_are_refused(tmp_path, fault):
    fault(tmp_path)
    before = sorted(os.listdir(tmp_path.parent)), sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=FOLDERS[fault]) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert (sorted(os.listdir(tmp_path.parent)), sorted(os.listdir(tmp_path))) == before


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """models--org--name/snapshots/REVISION/*, links into models--org--name/blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "abc" / "transformer", tmp_path / "blobs"
    make_diffusers().save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(list(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(pathlib.Path("../../../blobs") / str(number))
    assert read_checkpoint(snapshot.parent).config.depth == 3
