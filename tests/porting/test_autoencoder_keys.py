"""Autoencoders: three spellings of one set of tensors, and our own."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_autoencoder import write_autoencoder
from torch_dit import randomise_

from lit_jax.porting.read import is_autoencoder, read_autoencoder, read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_orbax


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
    """The original code, for 3 resolutions: linear maps are convolutions, `up` counts down."""
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


def test_three_spellings_give_one_autoencoder(tmp_path, torch_autoencoder):
    torch_autoencoder.save_pretrained(tmp_path / "new")
    state = torch_autoencoder.state_dict()
    reference = read_autoencoder(tmp_path / "new")
    assert (
        reference.architecture["scaling_factor"] == 0.18215
        and reference.report.layout == "diffusers"
    )
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    save_file(
        {k: v.contiguous() for k, v in to_old_names(state).items()},
        tmp_path / "old" / "diffusion_pytorch_model.safetensors",
    )
    torch.save(
        {"state_dict": to_ldm_names(state) | {"loss.logvar": torch.zeros(())}},
        tmp_path / "ldm.ckpt",
    )
    torch.save(
        {"state_dict": to_ldm_names(state, "first_stage_model.") | {"model.x": torch.zeros(1)}},
        tmp_path / "sd.ckpt",
    )
    assert (
        set(to_ldm_names(state)) & set(state) and len(set(to_ldm_names(state)) - set(state)) > 100
    )
    readings = {
        name: read_autoencoder(tmp_path / name, scaling_factor=0.18215)
        for name in ("old", "ldm.ckpt", "sd.ckpt")
    }
    for name, reading in readings.items():
        assert reading.report.checksum == reference.report.checksum, name
        assert reading.architecture == reference.architecture, name
    assert readings["ldm.ckpt"].report.layout == "LDM"
    assert readings["ldm.ckpt"].report.left_out == {"loss.logvar": "loss of its training"}
    assert readings["sd.ckpt"].report.left_out == {"model.x": "not of the autoencoder"}


def test_autoencoder_goes_to_orbax_and_back(tmp_path, torch_autoencoder):
    torch_autoencoder.save_pretrained(tmp_path / "pipe" / "vae")
    read = read_autoencoder(tmp_path / "pipe" / "vae")
    export_orbax(read, tmp_path / "out")
    again = read_autoencoder(tmp_path / "out")
    assert again.report.checksum == read.report.checksum
    assert again.report.checksum == read_autoencoder(tmp_path / "pipe").report.checksum
    assert again.architecture == read.architecture
    with pytest.raises(PortingError, match="not a DiT or LiT checkpoint"):
        read_checkpoint(tmp_path / "out")
    # A pipeline without a transformer, as Stable Diffusion's.
    assert is_autoencoder(tmp_path / "pipe") and is_autoencoder(tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layers_per_block=10**9), "layers_per_block = 1000000000"),
        (dict(block_out_channels=[]), "block_out_channels = "),
        (dict(norm_num_groups=3), "norm_num_groups = 3, which does not divide"),
        (dict(scaling_factor=0), "scaling_factor = 0"),
        (dict(use_quant_conv="yes"), "use_quant_conv = yes"),
        (dict(extra=1), "describe no autoencoder"),
        (dict(block_out_channels=[8] * 9), "block_out_channels = "),
        (
            dict(latent_channels=8),
            r"encoder/conv_out/kernel \(3, 3, 8, 8\), expected \(3, 3, 8, 16\)",
        ),
    ],
)
def test_metadata_of_an_orbax_autoencoder_that_lie_are_refused(
    tmp_path, orbax_autoencoder, change, message
):
    shutil.copytree(orbax_autoencoder, tmp_path / "a")
    path = tmp_path / "a" / "metadata" / "metadata"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"autoencoder": content["autoencoder"] | change}))
    with pytest.raises(PortingError, match=message):
        read_autoencoder(tmp_path / "a")


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
def test_autoencoder_config_that_lies_is_refused(tmp_path, torch_autoencoder, change, message):
    torch_autoencoder.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(PortingError, match=message):
        read_autoencoder(tmp_path)


def test_autoencoder_without_scale_or_with_odd_keys_is_refused(tmp_path, torch_autoencoder):
    state = torch_autoencoder.state_dict()
    torch.save(to_ldm_names(state), tmp_path / "a.ckpt")
    with pytest.raises(PortingError, match="^scaling_factor must be named: nothing in"):
        read_autoencoder(tmp_path / "a.ckpt")
    torch.save(to_ldm_names(state) | {"encoder.extra": torch.zeros(1)}, tmp_path / "b.ckpt")
    with pytest.raises(PortingError, match="unexpected: encoder.extra"):
        read_autoencoder(tmp_path / "b.ckpt", scaling_factor=1.0)
    torch.save(state | to_old_names(state), tmp_path / "c.pt")
    with pytest.raises(PortingError, match="both mean encoder.mid_block.attentions.0.to_q.weight"):
        read_autoencoder(tmp_path / "c.pt", scaling_factor=1.0)
    narrow = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4)
    torch.save(narrow.state_dict(), tmp_path / "d.pt")
    with pytest.raises(
        PortingError, match=r"32, what published ones have, does not divide the widths \(16,\)"
    ):
        read_autoencoder(tmp_path / "d.pt", scaling_factor=1.0)
    flux = AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.save(flux.state_dict(), tmp_path / "e.pt")
    with pytest.raises(PortingError, match="16 latent channels, .* shift their latents"):
        read_autoencoder(tmp_path / "e.pt", scaling_factor=0.3611)


def test_an_autoencoder_of_very_many_layers_is_refused_before_it_is_traced(tmp_path):
    weight = {"encoder.down_blocks.{}.resnets.{}.conv1.weight": torch.zeros(32, 32, 3, 3)}
    for blocks, layers in ((9, 1), (1, 9)):
        state = {
            key.format(i, j): value
            for key, value in weight.items()
            for i in range(blocks)
            for j in range(layers)
        }
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(PortingError, match=f"{blocks} blocks of {layers} layers, the limit"):
            read_autoencoder(tmp_path / "a.pt", scaling_factor=1.0)
