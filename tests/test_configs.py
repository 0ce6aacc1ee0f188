"""Every config loads, its train step traces, and its fields are those of configs/default.py.

The code reads every one of these fields.
"""

import ast
import contextlib
import dataclasses
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from lit_jax import fields, settings
from lit_jax.experiment import Experiment
from lit_jax.models import FAMILIES, param_shapes
from lit_jax.models.dit import DiTConfig
from lit_jax.train_step import make_train_step

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
ALL = NAMES + sorted(
    f"{folder}.{path.stem}"
    for folder in ("ablation", "workbench")
    for path in (ROOT / "configs" / folder).glob("*.py")
)


def load(name):
    """A config, locked as configs/default.py makes them."""
    return importlib.import_module(f"configs.{name}").get_config()


def leaves(config, prefix=""):
    """{"model.size": "XL", ...}"""
    found = {}
    for name in config:
        value = config[name]
        found |= (
            leaves(value, f"{prefix}{name}.")
            if isinstance(value, ConfigDict)
            else {prefix + name: value}
        )
    return found


DEFAULTS = leaves(load("default"))


@pytest.mark.parametrize("name", ALL)
def test_a_config_has_the_fields_of_the_default_and_no_others(name):
    config = leaves(load(name))
    family = FAMILIES[config["model.family"]].config
    own = {f"model.{field.name}" for field in dataclasses.fields(family)}
    assert set(DEFAULTS) <= set(config) <= set(DEFAULTS) | own
    for field, value in config.items():
        default = DEFAULTS.get(field)
        # None: a field of another family.
        unset = default is None or (value is None and field.startswith("model."))
        assert unset or isinstance(value, type(default)), (
            f"{field} = {value!r}, the default is {default!r}"
        )


@pytest.mark.parametrize("name", ALL)
def test_a_config_is_a_recipe(name):
    """The docstring says what to type, and how to get the FID that it promises."""
    text = importlib.import_module(f"configs.{name}").__doc__
    commands = [
        line
        for line in text.splitlines()
        if f"--config=configs/{name.replace('.', '/')}.py" in line
    ]
    assert commands or name == "debug"
    assert "FID" not in text or any("--mode=evaluate" in command for command in commands)


def models_of(config):
    """The experiment of a config, and the teacher of its step: a softmax model of its size."""
    experiment = Experiment(config)
    experiment.check_batches()
    taught = config.teacher.checkpoint or config.student.init == "teacher"
    return experiment, experiment.default_teacher() if taught else None


# These differ from one that is traced in the size of the model, the image or the batch alone: the
# same step is traced for them, and whether their sizes fit is found before.
OTHER_SIZES = re.compile("imagenet256_.*_[sbl]|imagenet512_.*|pixart_sigma_512")


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if not OTHER_SIZES.fullmatch(name)]
    + ["ablation.scratch", "ablation.few_heads", "ablation.variance_kd"]
    + [f"workbench.{name}" for name in ("sana", "mhla", "mala", "dit5", "hybrid")],
)
def test_one_train_step_of_every_config_traces(name):
    """Shapes alone, on the mesh of the config, over pretend devices."""
    config = load(name)
    experiment, teacher = models_of(config)
    size, C = config.model.input_size, config.model.in_channels
    teacher_shapes = param_shapes(teacher.config) if teacher else None
    train_step = make_train_step(
        experiment.model,
        teacher,
        experiment.process,
        experiment.optimizer_settings,
        experiment.unscaled_step_settings,
        experiment.mesh,
    )
    state = experiment.state_shapes
    B = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((B, size, size, C), jnp.uint8),
        **experiment.model_config.condition_shapes(B),
    }
    new, metrics = jax.eval_shape(
        train_step, state, teacher_shapes, batch, jax.eval_shape(lambda: jax.random.key(0))
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    norms = {"grad_norm", "param_norm", "update_norm", "learning_rate"}
    wanted = {"loss", "mse"} | norms
    has_variance = config.model.learn_sigma and config.model.prediction == "noise"
    if has_variance:
        wanted |= {"vb"}
    if teacher:
        wanted |= {f"kd_{config.model.prediction}"} | ({"kd_variance"} if has_variance else set())
        wanted |= {"kd_features"} if config.distill.feature_weight else set()
    assert set(metrics) == wanted
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((new.params, new.ema_params, metrics))
    )


# Nothing else is given the config.
READERS = ("main.py", "settings.py", "experiment.py", "jobs/*.py")
CONFIGS = ("config", "self.config", "experiment.config", "self.experiment.config", "CONFIG.value")


def reads_of_fields():
    """The names that lit_jax reads of each section; "*" where it takes the whole section."""
    sections = {field.split(".")[0] for field in DEFAULTS if "." in field}
    reads = {section: set() for section in sections} | {"": set()}
    paths = [path for pattern in READERS for path in (ROOT / "lit_jax").glob(pattern)]
    functions = [
        node
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    for function in functions:
        # `sample = config.sample` makes `sample` another name of the section in that function.
        aliases = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if section := section_of(node.value, {}):
                    aliases[node.targets[0].id] = section
        for node in ast.walk(function):
            # Settings that are made of a group read the fields that they have.
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "of_group":
                of = getattr(settings, node.args[0].id)
                names = {field.name for field in dataclasses.fields(of)}
                reads[section_of(node.args[1], aliases)] |= names
            section = section_of(getattr(node, "value", None), aliases)
            if isinstance(node, ast.Attribute):
                if section in reads:
                    reads[section].add("*" if node.attr in ("items", "to_dict") else node.attr)
                if ast.unparse(node.value) in CONFIGS:
                    reads[""].add(node.attr)
            elif isinstance(node, ast.keyword | ast.Subscript) and section in reads:
                if isinstance(node, ast.Subscript) or node.arg is None:
                    reads[section].add("*")
    return reads


def section_of(node, aliases):
    """ "model" for `config.model`, or for a name that stands for it."""
    if not isinstance(node, ast.AST):
        return None
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in CONFIGS:
        return node.attr
    return aliases.get(ast.unparse(node))


def test_every_field_is_read_somewhere():
    reads, dead = reads_of_fields(), []
    for field in DEFAULTS:
        section, _, name = field.rpartition(".")
        section = section.split(".")[0]
        if name not in reads[section] and "*" not in reads[section]:
            dead.append(field)
    assert not dead, f"nothing in lit_jax reads {', '.join(dead)}"


def test_every_field_that_is_read_is_in_the_default():
    sections = {field.split(".")[0] for field in DEFAULTS}
    methods = {
        "to_json_best_effort",
        "items",
        "to_dict",
        "get",
        "update",
        "lock",
        "unlock",
        "value",
    }
    # A job calls an architecture `config`, too, and a model `model`.
    methods |= (
        {field.name for field in dataclasses.fields(DiTConfig)}
        | set(dir(DiTConfig))
        | {"apply", "config"}
    )
    reads = reads_of_fields()
    assert reads[""] - methods <= sections, (
        f"not in default.py: {sorted(reads[''] - methods - sections)}"
    )
    for section in sections & set(reads):
        fields = {
            field.removeprefix(f"{section}.").split(".")[0]
            for field in DEFAULTS
            if field.startswith(f"{section}.")
        }
        unknown = reads[section] - methods - {"*"} - fields
        assert not unknown, (
            f"not in default.py: {[f'{section}.{name}' for name in sorted(unknown)]}"
        )


NUMBERS = [
    name
    for name, value in DEFAULTS.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_has_a_range(field):
    """No field takes a number that makes no sense: not a negative one, and -1 is not -7."""
    config = load("default")
    group, _, name = field.rpartition(".")
    section = config[group] if group else config
    section[name] = -7 if isinstance(section[name], int) else float("nan")
    with pytest.raises(ValueError, match=f"^{field} must be "):
        Experiment(config)


# Large values of these mean "never" or "all", or are compared with what is there.
MAY_BE_LARGE = {
    "autoencoder.slice_size",
    "autoencoder.tile_size",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "evaluate.every",
    "evaluate.neighbours",
    "evaluate.num_images",
    "evaluate.num_neighbour_images",
    "evaluate.split_size",
    "port.num_classes",
    "port.num_heads",
    "prepare.max_pixels",
    "prepare.skip_broken",
    "teacher.num_heads",
    "train.accumulation",
    "train.log_every",
    "train.preview_every",
    "train.stop_after_bad_steps",
}
COUNTS = [name for name in NUMBERS if isinstance(DEFAULTS[name], int)]


@pytest.mark.parametrize("field", sorted(set(COUNTS) - MAY_BE_LARGE))
def test_a_size_beyond_reason_is_refused(field):
    """It would end in an abort, a hang, or an error of memory after hours."""
    config = load("default")
    group, _, name = field.rpartition(".")
    (config[group] if group else config)[name] = 10**12
    with pytest.raises(ValueError, match=f"{field} (must be|= 1000000000000)"):
        experiment = Experiment(config)
        experiment.mesh  # noqa: B018  builds it


@pytest.mark.parametrize(
    "sampler, steps, spacing",
    [
        ("ddpm", 1, ""),
        ("ddpm", 1, "trailing"),
        ("ddim", 1, ""),
        ("ddpm", 1001, ""),
        ("ddim", 1001, "leading"),
        ("dpm++", 1000, ""),
        ("dpm++", 2000, ""),
    ],
)
def test_steps_that_a_sampler_cannot_make_are_named_before_anything_is_read(
    sampler, steps, spacing
):
    config = load("default")
    config.sample.update(sampler=sampler, steps=steps, spacing=spacing)
    with pytest.raises(ValueError, match=f"^sample.steps = {steps}"):
        Experiment(config)


def test_an_interval_without_timesteps_is_refused():
    config = load("default")
    config.sample.cfg_interval = (2000.0, 3000.0)
    with pytest.raises(ValueError, match="^sample.cfg_interval = .* none of the timesteps 0 to"):
        Experiment(config)
    config.sample.cfg_scale = 1.0
    Experiment(config)


@pytest.mark.parametrize("name", ALL)
def test_every_config_holds_only_what_fields_may_hold(name):
    """And what fits together: heads and width, batch and mesh, the steps of a schedule."""
    experiment, _ = models_of(load(name))
    assert experiment.model.config.num_heads
    assert experiment.optimizer_settings and experiment.unscaled_step_settings


@pytest.mark.parametrize(
    "field, good, bad",
    [
        ("train.steps", 1, 0),
        ("train.preview_every", 0, -1),
        ("mesh.fsdp", -1, 0),
        ("model.conv_size", 0, -3),
        ("model.conv_size", 7, 4),
        ("seed", 2**32 - 1, 2**32),
        ("ema.decay", 0.0, 1.0),
        ("sample.eta", 1.0, 1.5),
        ("optimizer.learning_rate", 0.0, float("inf")),
        ("distill.variance_weight", 1.0, float("nan")),
        ("optimizer.epsilon", 1e-30, 0.0),
        ("sample.cfg_interval", (5.0, 5.0), (5.0, 4.0)),
        ("sample.cfg_interval", (-1.0, 0.0), ("a", "b")),
        ("sample.spacing", "trailing", "zigzag"),
        ("port.scaling_factor", 0.0, -1.0),
        ("prepare.caption_dtype", "int8", "int4"),
        ("model.implementation", "pallas_gpu", "cudnn"),
        ("model.timestep_freq_shift", 1, 2),
    ],
)
def test_values_at_the_ends_of_their_ranges(field, good, bad):
    for value, message in (
        (good, None),
        (bad, f"^{field} must be .*; got {re.escape(repr(bad))}$"),
    ):
        config = load("default")
        group, _, name = field.rpartition(".")
        (config[group] if group else config)[name] = value
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            Experiment(config)


def test_the_home_folder_is_meant_in_every_path_field(monkeypatch):
    """A shell replaces no ~ in --config.data.dir=~/data, and a folder called ~ would be made."""
    monkeypatch.setenv("HOME", "/home/of")
    config = load("default")
    for field in fields.PATHS:
        group, _, name = field.rpartition(".")
        section = config[group] if group else config
        section[name] = ("~/a",) if isinstance(section[name], tuple) else "~/a"
    fields.resolve_paths(config)
    resolved = {field for field, value in leaves(config).items() if "/home/of/a" in str(value)}
    assert resolved == set(fields.PATHS)
    # Fields with these names say where something lies.
    places = {
        "checkpoint",
        "dir",
        "source",
        "target",
        "weights",
        "samples",
        "reference",
        "compare",
        "geneval",
        "tokenizer",
        "prompt_file",
        "null_caption",
    }
    named = {field for field in DEFAULTS if field.rpartition(".")[2] in places}
    which = {"teacher.weights", "student.weights", "port.weights"}  # ema or model
    assert named - which <= set(fields.PATHS)


def test_a_misspelt_field_fails_at_once():
    config = load("default")
    with pytest.raises(AttributeError, match="learning_rat"):
        config.optimizer.learning_rat = 1.0
    with pytest.raises(TypeError, match="batch_size"):
        config.train.batch_size = "many"


def test_a_rate_for_a_text_encoder_that_no_model_has_is_refused():
    config = load("debug")
    config.optimizer.text_rate = 0.5
    with pytest.raises(ValueError, match=r"optimizer.text_rate = 0.5, but model.family = dit has"):
        Experiment(config)


def test_a_field_of_another_family_is_refused_unless_it_is_none():
    config = load("debug")
    with config.unlocked():
        config.model.caption_channels = None
    Experiment(config)
    with config.unlocked():
        config.model.caption_channels = 4096
    with pytest.raises(ValueError, match="model.caption_channels = 4096, .*family = dit has no"):
        Experiment(config)


def test_the_defaults_are_the_papers():
    """Class-conditional ImageNet: the numbers that LiT and DiT publish."""
    papers = {
        "distill.noise_weight": 0.5,
        "distill.variance_weight": 0.05,
        "optimizer.learning_rate": 1e-4,
        "optimizer.weight_decay": 0.0,
        "optimizer.b2": 0.999,
        "optimizer.warmup": 0,
        "optimizer.clip_norm": 0.0,
        "ema.decay": 0.9999,
        "train.batch_size": 256,
        "train.label_dropout": 0.1,
        "train.min_snr_gamma": 0.0,
        "train.vb_weight": 1.0,
        "sample.steps": 250,
        "sample.cfg_channels": "3",
        "model.conv_size": 5,
        "model.qkv_bias": True,
        "inherit.load": ("auto",),
        "distill.variance_target": "raw",
        "distill.teacher_sees_dropped_labels": False,
    }
    assert {field: DEFAULTS[field] for field in papers} == papers


@pytest.mark.parametrize(
    "input_size, autoencoder, asked, expected",
    [
        (32, "", 0, 32),
        (32, "vae", 0, 256),
        ((16, 32), "vae", 0, (128, 256)),
        (32, "vae", 96, 96),
    ],
)
def test_pictures_are_prepared_in_the_models_size_unless_told(
    input_size, autoencoder, asked, expected
):
    config = load("default")
    config.model.input_size = input_size
    config.autoencoder.checkpoint = autoencoder
    config.prepare.image_size = asked
    assert Experiment(config).image_settings.size == expected
