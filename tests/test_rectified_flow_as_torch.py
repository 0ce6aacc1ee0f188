"""Velocity models as SiT's checkpoints (arXiv 2401.08740) hold them, written again in torch."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_sampler import SHAPE
from torch_checkpoints import (
    assert_same_state,
    inputs,
    make_torch,
    rel,
    run_ours,
    run_torch,
    save,
    small_config,
    training_checkpoint,
)

from lit_jax import diffusion
from lit_jax.experiment import Experiment
from lit_jax.porting.dit import Overrides, lit_config
from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_diffusers, export_official

C = SHAPE[-1]


def make_sit(seed=0, **fields):
    """A SiT of torch: no loss has ever reached the rows of the last layer's second half."""
    model = make_torch(seed, **fields)
    patch = model.patch_size**2
    with torch.no_grad():
        for parameter in (model.final_layer.linear.weight, model.final_layer.linear.bias):
            parameter.reshape(patch, 2, -1)[:, 1] = 0.0
    return model


def test_a_sit_is_recognised_goes_in_and_out_and_predicts_its_velocity(tmp_path):
    """At times in [0, 1], unscaled: SiT's model is DiT's, and its output the first C channels."""
    model = make_sit()
    checkpoint = read_checkpoint(save(model, tmp_path / "a.pt"), overrides=Overrides(num_heads=3))
    assert checkpoint.config.prediction == "velocity" and checkpoint.config.learn_sigma
    assert any("predicts the velocity" in note for note in checkpoint.report.notes)
    x, _, y = inputs({})
    t = np.array([0.13, 0.98], np.float32)
    theirs = run_torch(model, x, t, y)[..., :C]
    ours = diffusion.RectifiedFlow().parts(run_ours(checkpoint, x, t, y), C)["velocity"]
    assert rel(ours, theirs) < 2e-5
    assert np.abs(theirs).max() > 0.1

    export_official(checkpoint.params, tmp_path / "b.pt", checkpoint.config)
    assert_same_state(torch.load(tmp_path / "b.pt"), model)
    assert json.loads((tmp_path / "b.pt.json").read_text())["architecture"]["prediction"] == (
        "velocity"
    )
    assert read_checkpoint(tmp_path / "b.pt").config == checkpoint.config


def test_a_training_checkpoint_of_sit_has_both_its_weights(tmp_path):
    both = training_checkpoint(make_torch(), make_sit(1))
    both["model"] = make_sit(0).state_dict()
    both["args"].path_type = "Linear"
    both["args"].prediction = "velocity"
    torch.save(both, tmp_path / "0400000.pt")
    x, t, y = inputs({})
    for weights, seed in (("model", 0), ("ema", 1)):
        checkpoint = read_checkpoint(
            tmp_path / "0400000.pt", weights=weights, overrides=Overrides(num_heads=3)
        )
        assert checkpoint.config.prediction == "velocity"
        assert any("path_type=Linear, prediction=velocity" in n for n in checkpoint.report.notes)
        assert rel(run_ours(checkpoint, x, t, y), run_torch(make_sit(seed), x, t, y)) < 2e-5


def test_a_repa_model_is_turned_round_to_sits_time_and_sign(tmp_path):
    """REPA's velocity is noise - image at the time of the noise, x = (1 - t) image + t noise."""
    model = make_torch(learn_sigma=False)
    projectors = {f"projectors.0.{i}.weight": torch.randn(4, 4) for i in (0, 2, 4)}
    torch.save({"ema": model.state_dict() | projectors}, tmp_path / "last.pt")
    checkpoint = read_checkpoint(tmp_path / "last.pt", overrides=Overrides(num_heads=3))
    assert set(checkpoint.report.left_out) == set(projectors)
    x, _, y = inputs({})
    t = np.array([0.13, 0.98], np.float32)
    ours = run_ours(checkpoint, x, t, y)
    assert rel(ours, -run_torch(model, x, 1 - t, y)) < 2e-5
    assert rel(ours, run_torch(model, x, t, y)) > 0.1

    # What goes out is a SiT, and reads as one.
    export_official(checkpoint.params, tmp_path / "sit.pt", checkpoint.config)
    again = read_checkpoint(tmp_path / "sit.pt")
    assert again.config.prediction == "velocity"
    assert again.report.checksum == checkpoint.report.checksum


@pytest.mark.parametrize(
    "path_type, prediction, taken",
    [
        ("Linear", "velocity", True),  # SiT's spelling
        ("linear", "v", True),  # REPA's
        ("GVP", "velocity", False),
        ("Linear", "noise", False),
        ("Linear", ["velocity"], False),
        ("Linear", torch.ones(2), False),
    ],
)
def test_the_arguments_of_a_training_checkpoint_say_what_was_trained(
    tmp_path, path_type, prediction, taken
):
    """A model of C output channels tells it by nothing else; of 2 C the zeros would lie."""
    for name, model in (("c", make_torch(learn_sigma=False)), ("two_c", make_sit())):
        both = training_checkpoint(make_torch(), model)
        both["args"].path_type = path_type
        both["args"].prediction = prediction
        torch.save(both, tmp_path / f"{name}.pt")
        if taken:
            assert read_checkpoint(tmp_path / f"{name}.pt").config.prediction == "velocity"
            continue
        message = f"say path_type = '{path_type}', prediction = .*; of SiT's models those on the"
        with pytest.raises(PortingError, match=message):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_what_a_checkpoint_predicts_is_told_by_it_or_named(tmp_path):
    """A DiT's variance is no zero; a file without those rows tells nothing."""
    dit = save(make_torch(), tmp_path / "dit.pt")
    assert read_checkpoint(dit).config.prediction == "noise"
    untrained = make_torch()
    torch.nn.init.zeros_(untrained.final_layer.linear.weight)
    torch.nn.init.zeros_(untrained.final_layer.linear.bias)
    assert read_checkpoint(save(untrained, tmp_path / "new.pt")).config.prediction == "noise"

    bare = save(make_torch(learn_sigma=False), tmp_path / "bare.pt")
    assert read_checkpoint(bare).config.prediction == "noise"
    named = read_checkpoint(bare, overrides=Overrides(prediction="velocity"))
    assert named.config.prediction == "velocity"
    assert "prediction = velocity was asked for, the source has noise" in named.report.notes
    # The file's own word stands before what its values look like.
    told = save(make_sit(), tmp_path / "told.safetensors", num_heads=3, prediction="noise")
    assert read_checkpoint(told).config.prediction == "noise"
    with pytest.raises(ValueError, match="^prediction must be one of .*noise, velocity; got 'v'"):
        Overrides(prediction="v")


def test_diffusers_gets_no_velocity_model(tmp_path):
    checkpoint = read_checkpoint(
        save(make_sit(), tmp_path / "a.pt"),
        overrides=Overrides(num_heads=3, timestep_freq_shift=1),
    )
    with pytest.raises(PortingError, match="predicts the velocity, and diffusers draws"):
        export_diffusers(checkpoint.params, tmp_path / "b", checkpoint.config)
    linear = dataclasses.replace(checkpoint.config, attention="linear")
    with pytest.raises(PortingError, match="predicts the velocity"):
        lit_config(linear)
    assert not (tmp_path / "b").exists()


def test_a_flow_and_a_diffusion_are_never_taken_for_each_other(tmp_path):
    """As teacher, as start, and as what is sampled."""
    sit = save(make_sit(), tmp_path / "sit.pt")
    dit = save(make_torch(), tmp_path / "dit.pt")
    flow = {"model.prediction": "velocity", "sample.sampler": "euler"}
    taken = Experiment(small_config(sit, **flow))
    assert taken.teacher.config.prediction == "velocity"
    assert isinstance(taken.process, diffusion.RectifiedFlow)
    taken.check_inheritance()

    with pytest.raises(ValueError, match="^model.prediction = noise, but the teacher .* velocity"):
        _ = Experiment(small_config(sit)).teacher
    message = "noise; if it has velocity, port it with port.prediction=velocity$"
    with pytest.raises(ValueError, match=message):
        _ = Experiment(small_config(dit, **flow)).teacher
    with pytest.raises(ValueError, match="^model.prediction = noise, but .* with velocity"):
        Experiment(small_config(dit, **{"student.init": str(sit)})).check_inheritance()
    fitting = {"model.attention": "softmax"}
    with pytest.raises(ValueError, match="^model.prediction = noise, but the checkpoint"):
        Experiment(small_config(dit, **fitting)).check_checkpoint(taken.teacher_checkpoint, sit)
    with pytest.raises(ValueError, match="^sample.sampler = dpm.*, but RectifiedFlow offers euler"):
        Experiment(small_config(sit, **{"model.prediction": "velocity"}))
