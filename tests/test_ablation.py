"""The paper's ablation path: every file is the one before it and the change that its name says."""

import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

from lit_jax.experiment import Experiment
from lit_jax.models import param_shapes

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "ablation"
INIT = "workdir/imagenet256_dit_s/checkpoints"
PATH = [  # config, the one that it is compared with, what differs
    (
        "scratch",
        "imagenet256_dit_s",
        {"model.attention": "linear", "model.num_heads": 6, "model.conv_size": 0},
    ),
    ("conv", "scratch", {"model.conv_size": 5}),
    ("few_heads", "conv", {"model.num_heads": 2}),
    ("inherit_200k", "few_heads", {"student.init": f"{INIT}/200000"}),
    ("inherit_400k", "inherit_200k", {"student.init": f"{INIT}/400000"}),
    ("inherit_600k", "inherit_400k", {"student.init": f"{INIT}/600000"}),
    ("inherit_800k", "inherit_600k", {"student.init": f"{INIT}/800000"}),
    (
        "noise_kd",
        "inherit_800k",
        {
            "teacher.checkpoint": "DiT-XL-2-256x256.pt",
            "teacher.size": "XL",
            "distill.variance_weight": 0.0,
        },
    ),
    ("variance_kd", "noise_kd", {"distill.variance_weight": 0.05}),
]


def load(name):
    package = "configs.ablation" if (FOLDER / f"{name}.py").exists() else "configs"
    return importlib.import_module(f"{package}.{name}")


def leaves(config, prefix=""):
    found = {}
    for name in config:
        value = config[name]
        found |= (
            leaves(value, f"{prefix}{name}.")
            if isinstance(value, ConfigDict)
            else {prefix + name: value}
        )
    return found


def test_the_path_is_whole():
    assert {path.stem for path in FOLDER.glob("*.py")} == {name for name, *_ in PATH}


@pytest.mark.parametrize("name, before, change", PATH, ids=[name for name, *_ in PATH])
def test_a_step_changes_what_it_says(name, before, change):
    config, old = leaves(load(name).get_config()), leaves(load(before).get_config())
    assert set(config) == set(old)
    differing = {field: value for field, value in config.items() if value != old[field]}
    assert differing == {field: value for field, value in change.items() if old[field] != value}
    assert {field: config[field] for field in change} == change
    assert f"--config=configs/ablation/{name}.py" in load(name).__doc__
    budget = {
        "train.steps": 400_000,
        "train.batch_size": 256,
        "sample.cfg_scale": 1.0,
        "model.size": "S",
        "autoencoder.checkpoint": "sd-vae-ft-mse",
    }
    assert {field: config[field] for field in budget} == budget


@pytest.mark.parametrize("name", [name for name, *_ in PATH])
def test_its_models_can_be_built(name):
    config = load(name).get_config()
    experiment = Experiment(config)
    shapes = param_shapes(experiment.model_config)
    heads = config.model.num_heads
    assert ("dwc" in shapes["blocks"]["attn"]) == (name != "scratch")
    if name != "scratch":
        assert shapes["blocks"]["attn"]["dwc"]["kernel"].shape == (12, 5, 5, 1, 384 // heads)
    if config.teacher.checkpoint:
        teacher = experiment.default_teacher().config
        assert (teacher.depth, teacher.width, teacher.attention) == (28, 1152, "softmax")
