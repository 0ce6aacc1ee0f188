"""PixArt checkpoints of every layout, in and out, and what the models then compute."""

import dataclasses
import functools
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_pixart
from flax.traverse_util import flatten_dict
from oracles import assert_close
from safetensors.torch import save_file
from torch_dit import randomise_

from lit_jax.assets import lit_torch
from lit_jax.models.pixart import PixArt
from lit_jax.porting.pixart import Overrides
from lit_jax.porting.read import load_params, read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_diffusers, export_official, export_orbax

D, CHANNELS, LENGTH = 48, 24, 6
# assert_close allows 8 * 2^-23 * sqrt(reduction) of the largest output: with this, 1e-5.
PARITY = dict(reduction=100)


def make_torch(attention="softmax", seed=0, **fields):
    """A PixArt with random weights everywhere, its position table that of 4 x 4 tokens."""
    num_heads = {"softmax": 4, "linear": 3}[attention]
    model = torch_pixart.PixArt(
        2, D, num_heads, cross_heads=4, grid=(4, 4), attention=attention, **fields
    )
    return randomise_(model, seed)


def inputs(grid=(4, 4), seed=0, length=LENGTH):
    """x, t, condition and drop: captions of 1, 4 and all tokens; the last image is told nothing."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2 * grid[0], 2 * grid[1], 4)).astype(np.float32)
    caption = rng.standard_normal((3, length, CHANNELS)).astype(np.float32)
    mask = np.arange(length) < np.array([1, 4, length])[:, None]
    t = np.array([0.0, 499.05, 17.0], np.float32)  # whole and fractional
    return x, t, {"caption": caption, "caption_mask": mask}, np.array([False, False, True])


def run_torch(model, x, t, condition, drop):
    with torch.no_grad():
        out = model(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            torch.tensor(t),
            torch.tensor(condition["caption"]),
            torch.tensor(condition["caption_mask"]),
            torch.tensor(drop),
        )
    return out.numpy().transpose(0, 2, 3, 1)


@functools.cache
def forward(config):
    return jax.jit(PixArt(config, dtype=jnp.float32).apply)


def run_ours(checkpoint, *arguments):
    return forward(checkpoint.config)({"params": load_params(checkpoint.params)}, *arguments)


def save(model, path, **fields):
    """The model as .safetensors, which names the fields that no shape tells."""
    stored = dict(num_heads=4, cross_heads=4) | fields
    metadata = {"format": "pt", "architecture": json.dumps(stored)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata)
    return path


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_the_model_computes_what_official_code_computes(tmp_path, attention, grid):
    model = make_torch(attention)
    heads = {"softmax": 4, "linear": 3}[attention]
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=heads))
    config = checkpoint.config
    assert (config.attention, config.width, config.position_base) == (attention, D, 4)
    arguments = inputs(grid)
    assert_close(run_ours(checkpoint, *arguments), run_torch(model, *arguments), **PARITY)


def make_diffusers(seed=0, is_told_sizes=False):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=D,
        sample_size=16,
        caption_channels=CHANNELS,
        interpolation_scale=0.5,
        use_additional_conditions=is_told_sizes,
    )
    return randomise_(model, seed).eval()


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    model = make_diffusers()
    model.save_pretrained(folder)
    return model, folder


NULL = np.random.default_rng(5).standard_normal((2, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_a_diffusers_folder_computes_the_same(diffusers_folder, grid):
    """Its null caption comes from the caller, and its mask may be the null caption's own."""
    model, folder = diffusers_folder
    checkpoint = read_checkpoint(folder, overrides=Overrides(null_caption=NULL))
    assert (checkpoint.config.position_base, checkpoint.config.position_scale) == (8, 0.5)
    assert checkpoint.config.caption_length == 300
    x, t, condition, drop = inputs(grid)
    own = np.broadcast_to(np.arange(LENGTH) < 1, (3, LENGTH))  # "" is one token
    caption = np.where(
        drop[:, None, None], NULL[np.minimum(np.arange(LENGTH), 1)], condition["caption"]
    )
    mask = np.where(drop[:, None], own, condition["caption_mask"])
    with torch.no_grad():
        theirs = model(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            encoder_hidden_states=torch.tensor(caption),
            timestep=torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask.astype(np.int64)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
    ours = run_ours(checkpoint, x, t, condition | {"null_mask": own}, drop)
    assert_close(ours, theirs.numpy().transpose(0, 2, 3, 1), **PARITY)


def test_padded_features_and_their_length_change_nothing(tmp_path):
    checkpoint = read_checkpoint(save(make_torch(), tmp_path / "a.safetensors"))
    x, t, condition, drop = inputs()
    plain = run_ours(checkpoint, x, t, condition, drop)
    noisy = condition["caption"] + 1e3 * ~condition["caption_mask"][..., None]
    other = run_ours(checkpoint, x, t, condition | {"caption": noisy}, drop)
    np.testing.assert_array_equal(other, plain)
    # The first four tokens hold all that the first two captions say.
    short = {name: value[:, :4] for name, value in condition.items()}
    cut = run_ours(checkpoint, x, t, short, drop)
    assert_close(cut[:2], plain[:2], **PARITY)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_the_torch_module_of_an_export_computes_the_same(tmp_path, attention):
    heads = {"softmax": 4, "linear": 3}[attention]
    source = save(make_torch(attention), tmp_path / "a.safetensors", num_heads=heads)
    checkpoint = read_checkpoint(source)
    written = export_official(checkpoint.params, tmp_path / "b.safetensors", checkpoint.config)
    # A softmax model is official code's; a LiT brings the module that runs it.
    assert (tmp_path / "lit_torch.py" in map(pathlib.Path, written)) == (attention == "linear")
    model = lit_torch.load(tmp_path / "b.safetensors")
    arguments = inputs((3, 5))
    assert_close(run_ours(checkpoint, *arguments), run_torch(model, *arguments), **PARITY)

    # Guidance sees every caption twice, the second time as nothing.
    x, t, condition, _ = arguments
    cond, null = (run_torch(model, x, t, condition, np.full(len(x), d)) for d in (False, True))
    expected = np.concatenate([(null + 3 * (cond - null))[..., :3], cond[..., 3:]], axis=-1)
    told = [torch.from_numpy(condition[name]) for name in ("caption", "caption_mask")]
    with torch.no_grad():
        images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        found = lit_torch.guide(model, images, torch.from_numpy(t), told, 3.0, "3")
    assert_close(found.numpy().transpose(0, 2, 3, 1), expected, **PARITY)


# ---- Round trips ---------------------------------------------------------------------------------


def assert_same(params, expected):
    params, expected = flatten_dict(params, sep="/"), flatten_dict(expected, sep="/")
    assert params.keys() == expected.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_official_files_go_in_and_out_bit_for_bit(tmp_path, attention):
    model = make_torch(attention)
    heads = {"softmax": 4, "linear": 3}[attention]
    source = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=heads))
    export_official(source.params, tmp_path / "b.pt", source.config)
    back = torch.load(tmp_path / "b.pt")
    for key, tensor in model.state_dict().items():
        # The table is computed in float64 and rounded; torch's sine may be a bit away.
        equal = torch.allclose if key == "pos_embed" else torch.equal
        assert equal(back.pop(key), tensor), key
    assert not back
    export_orbax(read_checkpoint(tmp_path / "b.pt"), tmp_path / "orbax")
    orbax = read_checkpoint(tmp_path / "orbax")
    assert orbax.config == source.config
    assert orbax.report.checksum == source.report.checksum
    assert_same(orbax.params, source.params)


def test_diffusers_folders_go_in_and_out_bit_for_bit(tmp_path, diffusers_folder):
    model, folder = diffusers_folder
    source = read_checkpoint(folder, overrides=Overrides(null_caption=NULL))
    export_diffusers(source.params, tmp_path / "out", source.config)
    back = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out")
    assert not back.config.use_additional_conditions
    for (key, ours), (_, theirs) in zip(
        sorted(back.state_dict().items()), sorted(model.state_dict().items()), strict=True
    ):
        assert torch.equal(ours, theirs), key
    again = read_checkpoint(tmp_path / "out", overrides=Overrides(null_caption=NULL))
    assert again.report.checksum == source.report.checksum


def test_training_files_have_their_weights_under_pixarts_names(tmp_path):
    model, ema = make_torch(), make_torch(seed=1)
    torch.save(
        {"state_dict": model.state_dict(), "state_dict_ema": ema.state_dict(), "epoch": 3},
        tmp_path / "a.pth",
    )
    for weights, expected in (("ema", ema), ("model", model)):
        read = read_checkpoint(
            tmp_path / "a.pth", weights=weights, overrides=Overrides(num_heads=4)
        )
        np.testing.assert_array_equal(
            np.asarray(read.params["t_block"]["kernel"]),
            expected.t_block[1].weight.detach().numpy().T,
        )
    # A released file has the state dict alone.
    torch.save({"state_dict": model.state_dict()}, tmp_path / "b.pth")
    read = read_checkpoint(tmp_path / "b.pth", overrides=Overrides(num_heads=4))
    assert (read.config.num_heads, read.config.cross_heads) == (4, 4)


# ---- Buffers -------------------------------------------------------------------------------------


def test_the_buffers_are_optional(tmp_path):
    """The 256 pixel file has no position table, and diffusers none of the two."""
    state = make_torch().state_dict()
    del state["pos_embed"], state["y_embedder.y_embedding"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(PortingError, match="null_caption must be named"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(PortingError, match="input_size must be named"):
        read_checkpoint(tmp_path / "a.pth", overrides=Overrides(null_caption=NULL))
    asked = Overrides(num_heads=4, input_size=(32, 32), null_caption=NULL)
    read = read_checkpoint(tmp_path / "a.pth", overrides=asked)
    config = read.config
    assert (config.position_base, config.position_scale, config.grid) == (16, 0.5, (16, 16))
    table = np.asarray(read.params["y_embedder"]["y_embedding"])
    assert table.shape == (300, CHANNELS)
    np.testing.assert_array_equal(table[0], NULL[0])
    np.testing.assert_array_equal(table[1:], np.broadcast_to(NULL[1], (299, CHANNELS)))


@pytest.mark.parametrize("scale, drift", [(0.125, 0.0), (1.0, 1e-3)])
def test_the_stored_table_tells_its_scale(tmp_path, scale, drift):
    """Sigma's follows the size; alpha's 256 and 512 have one scale. An average may have drifted."""
    model = make_torch(position_scale=scale)
    model.pos_embed += drift
    read = read_checkpoint(save(model, tmp_path / "a.safetensors"))
    assert (read.config.position_base, read.config.position_scale) == (4, scale)


def test_another_table_is_refused(tmp_path):
    model = make_torch()
    model.pos_embed *= 1.1
    with pytest.raises(PortingError, match="another table, and our model has a fixed one"):
        read_checkpoint(save(model, tmp_path / "a.safetensors"))


# ---- PixArt-alpha --------------------------------------------------------------------------------


def test_an_alpha_file_is_the_same_model_with_captions_of_120_tokens(tmp_path):
    """Its 512 has 32 tokens a side at scale 1, and names neither heads nor scale."""
    model = make_torch(caption_length=120)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "PixArt-XL-2-512x512.pth")
    read = read_checkpoint(tmp_path / "PixArt-XL-2-512x512.pth", overrides=Overrides(num_heads=4))
    assert (read.config.caption_length, read.config.position_scale) == (120, 1.0)
    x, t, condition, drop = inputs(length=120)
    ours = run_ours(read, x, t, condition, drop)
    assert_close(ours, run_torch(model, x, t, condition, drop), **PARITY)


def test_an_alpha_folder_is_read_unless_it_is_told_the_size(tmp_path):
    """Its class has the name of diffusers' older releases; the 1024's has two embedders more."""
    asked = Overrides(null_caption=NULL, caption_length=120)
    for is_told in (False, True):
        folder = tmp_path / str(is_told)
        model = make_diffusers(is_told_sizes=is_told)
        model.save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        about["_class_name"] = "Transformer2DModel"
        for field in ("interpolation_scale", "use_additional_conditions"):
            del about[field]
        (folder / "config.json").write_text(json.dumps(about))
        if is_told:
            with pytest.raises(PortingError, match="told the image's size and aspect ratio"):
                read_checkpoint(folder, overrides=asked)
            continue
        config = read_checkpoint(folder, overrides=asked).config
        assert (config.caption_length, config.position_base, config.position_scale) == (120, 8, 1.0)


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, why",
    [
        ("csize_embedder.mlp.0.weight", "PixArt-alpha 1024-MS"),
        ("blocks.1.attn.sr.weight", "compresses keys and values"),
        ("blocks.1.attn.q_norm.weight", "normalises queries and keys"),
        ("blocks.1.attn.extra", "unexpected: blocks.1.attn.extra"),
    ],
)
def test_a_key_of_another_model_is_named(tmp_path, key, why):
    state = make_torch().state_dict() | {key: torch.zeros(3)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(PortingError, match=why) as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert key in str(caught.value)


def test_a_missing_third_of_a_split_weight_is_refused(tmp_path, diffusers_folder):
    model, folder = diffusers_folder
    state = model.state_dict()
    del state["transformer_blocks.1.attn2.to_v.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PortingError, match=r"attn2\.to_k\.bias \(48,\), expected \(96,\)"):
        read_checkpoint(tmp_path, overrides=Overrides(null_caption=NULL))


@pytest.mark.parametrize(
    "field, value, why",
    [
        ("num_layers", 3, "num_layers = 3, expected 2"),
        ("num_attention_heads", 5, "5 heads of 12, the width is 48"),
        ("interpolation_scale", "big", "interpolation_scale = big"),
        ("sample_size", 1e9, "sample_size"),
        ("norm_eps", 1e-5, "norm_eps"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path, diffusers_folder, field, value, why
):
    model, folder = diffusers_folder
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PortingError, match=why):
        read_checkpoint(tmp_path, overrides=Overrides(null_caption=NULL))


def test_the_released_sizes_heads_are_known(tmp_path):
    """Nothing in an official file tells them; of another size they must be named."""
    read = read_checkpoint(save(make_torch(), tmp_path / "a.safetensors"))
    assert (read.config.num_heads, read.config.cross_heads) == (4, 4)
    torch.save(make_torch().state_dict(), tmp_path / "b.pth")
    read = read_checkpoint(tmp_path / "b.pth")
    assert (read.config.num_heads, read.config.cross_heads) == (None, None)
    with pytest.raises(PortingError, match="num_heads must be named"):
        export_official(read.params, tmp_path / "c.safetensors", read.config)
    with pytest.raises(PortingError, match="diffusers has no linear attention"):
        linear = dataclasses.replace(read.config, attention="linear", num_heads=4, cross_heads=4)
        export_diffusers(read.params, tmp_path / "c", linear)
