"""Checkpoints that a field names: of another family, or a pipeline without null caption."""

import json
import shutil

import numpy as np
import pytest
from tiny_captions import make_config, write_transformer
from tiny_text import write_text_encoder

import lit_jax
from configs import debug, quickstart
from lit_jax.experiment import Experiment
from lit_jax.jobs import port, sample
from lit_jax.porting.pixart import NoNullCaptionError
from lit_jax.porting.read import read_checkpoint
from lit_jax.settings import reading

FIELDS = ("teacher.checkpoint", "student.init", "sample.checkpoint", "port.source")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a student in pixels, with a pipeline's folder as text encoder: transformer/ and the T5."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = make_config("nowhere", folder / "data", folder)
    config.teacher.dtype = "float32"
    config.model.position_base = 8  # as many tokens as a side has
    write_text_encoder(folder)
    write_transformer(config, folder)
    return config


def use(config, field, path, folder):
    """Opens what the field names, as the job that reads it."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: str(path)})
    if field == "teacher.checkpoint":
        _ = Experiment(config).teacher
    elif field == "student.init":
        Experiment(config).check_inheritance()
    elif field == "sample.checkpoint":
        config.sample.prompts = ("a cat",)
        sample.run(config, folder)
    else:
        config.port.target = str(folder / "ported")
        port.run(config, folder)


# ---- Another model -------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_checkpoint_of_another_family_is_named_with_both(config, tmp_path, field):
    dit = quickstart.get_config().teacher.checkpoint
    with pytest.raises(ValueError) as caught:
        use(config, field, dit, tmp_path)
    assert str(caught.value) == (
        f"{field} = {dit} holds a DiT, but model.family = pixart; take a config of the family "
        f"dit, or another checkpoint"
    )
    pixart = config.text.checkpoint
    with pytest.raises(ValueError) as caught:
        use(debug.get_config(), field, pixart, tmp_path)
    assert str(caught.value) == (
        f"{field} = {pixart} holds a PixArt, but model.family = dit; take a config of the family "
        f"pixart, or another checkpoint"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_such_model_is_named_with_its_field(config, tmp_path, field):
    """A pipeline of another model; a file of something else; a folder of nothing."""
    folder = tmp_path / "sd3"
    (folder / "transformer").mkdir(parents=True)
    about = {"_class_name": "SD3Transformer2DModel"}
    (folder / "transformer" / "config.json").write_text(json.dumps(about))
    other = f"{config.text.checkpoint}/text_encoder/model.safetensors"
    shutil.copy(other, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    next_step = "name a PixArt-Sigma checkpoint: a file, a folder or a pipeline's folder"
    for path, found in (
        (folder, "a 'SD3Transformer2DModel'"),
        (other, r"\d+ keys, encoder.block.0.\S+, .* and \d+ more"),
    ):
        with pytest.raises(ValueError) as caught:
            use(config, field, path, out)
        assert str(caught.value).startswith(f"{field} = {path} holds ")
        assert caught.match(f" holds {found}, but model.family = pixart; {next_step}$")
    with pytest.raises(FileNotFoundError) as caught:
        use(config, field, tmp_path / "empty", out)
    assert str(caught.value).startswith(f"{field} = {tmp_path / 'empty'}: neither an Orbax")
    assert not out.exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: no tensors", "teacher.checkpoint = a: no tensors"),
        ("a/transformer: no weights", "teacher.checkpoint = a/transformer: no weights"),
        ("path = a holds a DiT", "teacher.checkpoint = a holds a DiT"),
        ("weights = ema, but a has none", "teacher.weights = ema, but a has none"),
        ("another: no tensors", "another: no tensors"),
    ],
)
def test_an_error_that_speaks_of_the_path_names_the_field(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError) as caught, reading("teacher.checkpoint", "a/", "a download"):
        raise ValueError(text)
    assert str(caught.value) == expected


# ---- No null caption -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_null_caption_that_nothing_makes_is_told_with_both_ways(config, tmp_path, field):
    pipeline = config.text.checkpoint
    config = config.copy_and_resolve_references()
    ways = (
        ": name the folder of the text encoder there, or let --mode=port write a checkpoint that "
        "has it, with the features in a file that port.null_caption names"
    )
    for text, found in (("", "is empty"), ("/nowhere", "= /nowhere is not there")):
        config.text.checkpoint = text
        with pytest.raises(ValueError) as caught:
            use(config, field, pipeline, tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{field} = {pipeline} has no null caption, the text encoder's")
        assert message.endswith(f"text.checkpoint {found}{ways}")
    assert not any(tmp_path.iterdir())


def test_the_text_encoder_makes_a_teachers_null_caption(config, caplog, monkeypatch):
    """Not before it is read: shapes, and what tells runs apart, need no text encoder."""
    config = config.copy_and_resolve_references()
    config.teacher.checkpoint = config.text.checkpoint
    config.student.init = "teacher"
    experiment = Experiment(config)
    null = Experiment(config).load_text_encoder().null_features(config.model.caption_length)
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(Experiment, "load_text_encoder", lambda self: pytest.fail("it is loaded"))
        assert experiment.teacher.config.caption_length == config.model.caption_length
        experiment.check_inheritance()
    lines = [r.getMessage() for r in caplog.records if "null caption" in r.getMessage()]
    name = f"checkpoint = {config.text.checkpoint}"
    assert lines == [f"teacher.{name} has no null caption: text.{name} makes it"]
    params = experiment.load_teacher()
    np.testing.assert_array_equal(params["y_embedder"]["y_embedding"], null)
    leaf = experiment.init_checkpoint.params["y_embedder"]["y_embedding"]
    np.testing.assert_array_equal(np.asarray(leaf), null)
    np.testing.assert_array_equal(leaf[:2], null[:2])
    with pytest.raises(NoNullCaptionError, match="^null_caption must be named"):
        read_checkpoint(config.teacher.checkpoint)
    with pytest.raises(ValueError, match="port it with --config.port.null_caption="):
        lit_jax.load(config.teacher.checkpoint)


def test_a_port_and_a_run_of_samples_make_the_same_null_caption(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.model.attention = "softmax"
    pipeline = config.text.checkpoint
    config.port.update(source=pipeline, target=str(tmp_path / "ported"))
    port.run(config, tmp_path)
    config.sample.update(
        prompts=("a red cat",), steps=2, sampler="ddim", batch_size=8, checkpoint=pipeline
    )
    sample.run(config, tmp_path / "a")
    config.sample.checkpoint = config.port.target
    sample.run(config, tmp_path / "b")
    images = [(tmp_path / name / "samples" / "000000.png").read_bytes() for name in "ab"]
    assert images[0] == images[1]
