"""What is written is read back bit for bit, by torch, by diffusers and by us."""

import functools
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file
from torch_checkpoints import (
    VARIANTS,
    assert_same_state,
    assert_same_tree,
    inputs,
    make_torch,
    rel,
    run_ours,
    run_torch,
    save,
)

import lit_jax
from lit_jax import diffusion, samplers, sharding
from lit_jax.models import dit
from lit_jax.porting.dit import Overrides
from lit_jax.porting.read import load_params, read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_diffusers, export_official, export_orbax


@pytest.mark.parametrize("name", VARIANTS)
def test_official_layout_comes_back_bit_for_bit(tmp_path, name):
    fields = VARIANTS[name]
    model = make_torch(**fields)
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"]}
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", **known))
    for out, load in (
        (tmp_path / "out.safetensors", load_file),
        (tmp_path / "out.pt", functools.partial(torch.load, weights_only=True)),
    ):
        names = tuple(f"class {i}, or more" for i in range(checkpoint.config.num_classes))
        export_official(checkpoint.params, out, checkpoint.config, names)
        assert_same_state(load(out), model)
        again = read_checkpoint(out)
        assert again.class_names == names
        assert again.report.checksum == checkpoint.report.checksum
        assert again.config == checkpoint.config


@pytest.mark.parametrize("name", ["dit", "lit", "lit_no_bias"])
def test_orbax_comes_back_bit_for_bit(tmp_path, name):
    fields = VARIANTS[name]
    known = {"num_heads": fields["num_heads"], "grid": fields["grid"]}
    checkpoint = read_checkpoint(save(make_torch(**fields), tmp_path / "a.safetensors", **known))
    mesh = sharding.make_mesh(1, 8)
    shardings = sharding.fsdp_sharding(checkpoint.params, mesh, min_size=1)
    export_orbax(checkpoint, tmp_path / "orbax", shardings=shardings)
    again = read_checkpoint(tmp_path / "orbax")
    assert again.report.checksum == checkpoint.report.checksum
    assert again.config == checkpoint.config
    export_official(again.params, tmp_path / "b.safetensors", again.config)
    loaded = load_params(again.params, shardings, consume=True)
    assert not jax.tree.leaves(again.params)  # each was let go as it was loaded
    assert_same_tree(loaded, checkpoint.params)
    assert (tmp_path / "b.safetensors").read_bytes() == _official_bytes(
        checkpoint, tmp_path / "c.safetensors"
    )


def _official_bytes(checkpoint, path):
    export_official(checkpoint.params, path, checkpoint.config)
    return path.read_bytes()


def test_diffusers_loads_what_we_export_and_computes_the_same(tmp_path):
    fields = dict(timestep_freq_shift=1, mlp_norm_epsilon=3e-5)
    model = make_torch(**fields)
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=3, **fields))
    export_diffusers(checkpoint.params, tmp_path / "out", checkpoint.config)
    loaded, info = DiTTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, y = inputs({})
    expected = run_torch(model, x, t, y)
    assert rel(run_torch(loaded.eval(), x, t, y), expected) < 1e-5
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    again = read_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config and again.report.checksum == checkpoint.report.checksum
    loaded.save_pretrained(tmp_path / "theirs")
    assert read_checkpoint(tmp_path / "theirs").report.checksum == checkpoint.report.checksum


def test_an_export_never_changes_the_function_silently(tmp_path):
    official = read_checkpoint(save(make_torch(), tmp_path / "a.safetensors", num_heads=3))
    with pytest.raises(
        PortingError,
        match="^timestep_freq_shift = 0 is what the model computes with, but diffusers",
    ):
        export_diffusers(official.params, tmp_path / "out", official.config)
    shifted = read_checkpoint(
        tmp_path / "a.safetensors", overrides=Overrides(timestep_freq_shift=1)
    )
    with pytest.raises(
        PortingError,
        match="^timestep_freq_shift = 1 .* but official DiT code computes with 0; set it to",
    ):
        export_official(shifted.params, tmp_path / "b.pt", shifted.config)
    lit = read_checkpoint(save(make_torch(attention="linear"), tmp_path / "l.safetensors"))
    with pytest.raises(PortingError, match="diffusers has no linear attention"):
        export_diffusers(lit.params, tmp_path / "out", lit.config)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "l.safetensors"]


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
def test_the_torch_module_beside_an_export_computes_the_same(tmp_path, kernel_function, suffix):
    fields = dict(attention="linear", grid=(3, 5), timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    model = make_torch(**fields)
    known = {
        "grid": (3, 5),
        "kernel_function": kernel_function,
        "timestep_freq_shift": 1,
        "mlp_norm_epsilon": 1e-5,
    }
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", **known))
    written = export_official(
        checkpoint.params, tmp_path / "out" / f"lit{suffix}", checkpoint.config
    )
    assert {path.name for path in written} == set(os.listdir(tmp_path / "out"))
    torch_model = lit_torch(tmp_path / "out" / "lit_torch.py").load(
        tmp_path / "out" / f"lit{suffix}"
    )
    x, t, y = inputs(fields)
    expected = run_torch(torch_model, x, t, y)
    assert rel(run_ours(checkpoint, x, t, y), expected) < 2e-5
    if kernel_function == "relu":
        assert rel(expected, run_torch(model, x, t, y)) < 2e-5
    if suffix == ".safetensors":  # another resolution, as our model takes any
        x, t, y = inputs(fields | {"grid": (2, 4)})
        assert rel(run_ours(checkpoint, x, t, y), run_torch(torch_model, x, t, y)) < 2e-5


def test_the_torch_module_runs_a_dit_too(tmp_path):
    model = make_torch()
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", num_heads=3))
    export_official(checkpoint.params, tmp_path / "b.safetensors", checkpoint.config)
    torch_model = lit_torch(pathlib.Path(lit_jax.__file__).parent / "assets" / "lit_torch.py").load(
        tmp_path / "b.safetensors"
    )
    x, t, y = inputs({})
    assert rel(run_torch(torch_model, x, t, y), run_torch(model, x, t, y)) < 2e-5


@pytest.mark.parametrize("prediction, sampler", [("noise", "ddim"), ("velocity", "euler")])
def test_the_torch_module_draws_what_our_sampler_draws(tmp_path, prediction, sampler):
    """The same noise; DDIM's 21 steps have timesteps that are halves before they are rounded."""
    model = make_torch(attention="linear")
    told = dict(kernel_function="relu", prediction=prediction)
    source = save(model, tmp_path / "a.safetensors", **told)
    checkpoint = read_checkpoint(source)
    export_official(checkpoint.params, tmp_path / "b.safetensors", checkpoint.config)
    module = lit_torch(tmp_path / "lit_torch.py")
    torch_model = module.load(tmp_path / "b.safetensors")
    guided = dict(steps=21, cfg_scale=2.0, cfg_channels="3", clip_denoised=True)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    labels = np.array([1, 8])

    def ours(**fields):
        settings = samplers.SamplerSettings(sampler=sampler, **fields)
        grid = samplers.make_grid(diffusion.PROCESSES[prediction](), settings)
        params = load_params(checkpoint.params)
        model = dit.DiT(checkpoint.config, dtype=jnp.float32)

        @jax.jit
        def draw(noise):
            def model_fn(*args):
                return model.apply({"params": params}, *args)

            return samplers.sample(
                model_fn,
                jax.random.split(jax.random.key(0), 2),
                {"label": jnp.asarray(labels)},
                noise.shape[1:],
                grid,
                settings,
                noise=noise,
            )

        return np.asarray(draw(noise))

    def theirs(**fields):
        start = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        drawn = module.sample(torch_model, start, (torch.from_numpy(labels),), **fields)
        return drawn.numpy().transpose(0, 2, 3, 1)

    assert rel(theirs(**guided), ours(**guided)) < 2e-5
    plain = dict(steps=4, cfg_scale=1.0)
    assert rel(theirs(**plain), ours(**plain)) < 2e-5


def test_the_torch_module_refuses_what_it_cannot_draw_with(tmp_path):
    """Another prediction would be taken for noise, without a word."""
    source = save(
        make_torch(attention="linear"), tmp_path / "a.safetensors", kernel_function="relu"
    )
    checkpoint = read_checkpoint(source)
    export_official(checkpoint.params, tmp_path / "b.safetensors", checkpoint.config)
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    module = lit_torch(tmp_path / "lit_torch.py")
    for field, value in (("prediction", "x_start"), ("attention", "mala"), ("softmax_every", 2)):
        architecture = json.loads(metadata["architecture"]) | {field: value}
        changed = metadata | {"architecture": json.dumps(architecture)}
        save_numpy(tensors, tmp_path / "c.safetensors", changed)
        with pytest.raises(ValueError, match=f"c.safetensors: no .*{field}") as error:
            module.load(tmp_path / "c.safetensors")
        assert field == "softmax_every" or f"{field} = {value} here" in str(error.value)


def lit_torch(path):
    spec = importlib.util.spec_from_file_location("lit_torch_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_goes_beside_an_export_replaces_nothing(tmp_path):
    source = save(
        make_torch(attention="linear"), tmp_path / "a.safetensors", kernel_function="relu"
    )
    checkpoint = read_checkpoint(source)
    for name in ("lit_torch.py", "b.pt.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(
            PortingError, match=f"{name} exists and is another than would be written beside b.pt"
        ):
            export_official(checkpoint.params, tmp_path / "b.pt", checkpoint.config)
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "b.pt").exists()
        (tmp_path / name).unlink()
    export_official(checkpoint.params, tmp_path / "b.pt", checkpoint.config)
    export_official(
        checkpoint.params, tmp_path / "c.pt", checkpoint.config
    )  # the same lit_torch.py


def test_a_killed_export_does_not_stand_in_the_way(tmp_path):
    fields = dict(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    checkpoint = read_checkpoint(
        save(make_torch(**fields), tmp_path / "a.safetensors", num_heads=3, **fields)
    )
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    export_diffusers(checkpoint.params, tmp_path / "out", checkpoint.config)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "out"]
