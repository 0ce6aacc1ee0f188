"""The text-to-image quickstart from nothing: teacher with text encoder, folder, student, scores."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import quickstart_t2i, quickstart_t2i_teacher
from lit_jax.data import digit_scenes
from lit_jax.experiment import Experiment
from lit_jax.jobs import evaluate, port, sample, train


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """As many as the recipes ask for. Eight would only take longer."""
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "devices", lambda: two)
        yield


def shrink(config):
    """A model that draws 180 pictures in a second."""
    config.model.update(depth=1, width=16, num_heads=2, cross_heads=2, caption_channels=12)
    config.mesh.cpu_devices = 0
    config.train.update(batch_size=8, steps=2, preview_every=2, preview_images=8, remat="none")
    config.optimizer.warmup = 1
    config.sample.update(steps=2, batch_size=64)
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a pipeline whose two models have seen 16 scenes, and its place."""
    place = epath.Path(tmp_path_factory.mktemp("quickstart"))
    tokenizer = place / "spiece.model"
    tokenizer.write_bytes(digit_scenes.tokenizer_model())
    config = shrink(quickstart_t2i_teacher.get_config())
    config.model.update(text_depth=1, text_num_heads=2, text_head_width=4, text_mlp_width=16)
    config.text.tokenizer = str(tokenizer)
    train.run(config, place / "teacher")
    config.port.update(source=str(place / "teacher"), target=str(place / "pipeline"))
    config.port.layout = "diffusers"
    port.run(config, place / "port")
    return place / "pipeline"


@pytest.fixture(scope="module")
def config(teacher):
    config = shrink(quickstart_t2i.get_config())
    config.train.preview_every = 0  # the teacher's run draws one
    config.teacher.checkpoint = config.text.checkpoint = str(teacher)
    return config


@pytest.fixture(scope="module")
def workdir(config, teacher):
    train.run(config, teacher.parent / "student")
    return teacher.parent / "student"


def test_what_tells_a_teachers_samples_apart_is_its_tokenizer(teacher):
    """Its text encoder is a part of the model: a finished folder is compared without another."""
    config = shrink(quickstart_t2i_teacher.get_config())
    config.text.tokenizer = str(teacher.parent / "spiece.model")
    experiment = Experiment(config)
    found = experiment.text_identity()
    assert found == {"tokenizer": experiment.tokenizer.sha256, "cleaning": "none"}
    asked = sample.what_is_asked(experiment, ())
    _, told = sample.tell(experiment, asked, None, np.arange(0))
    assert told == {"text": found}


def test_the_teacher_and_its_text_encoder_learn_together(teacher):
    """Both are in the folder, and both have left their first values."""
    names = sorted(path.name for path in teacher.iterdir())
    assert names == ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer"]
    lines = [
        json.loads(line)
        for line in (teacher.parent / "teacher" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == 2
    assert (teacher.parent / "teacher" / "previews" / "step_0000002.png").exists()


def test_the_report_scores_teacher_and_student_by_task(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["num_images"] == 180
    assert list(report["geneval"]) == ["teacher", "student"]
    # Each is what its name says: the student alone has a convolution, 5 x 5 on heads of 8 columns.
    assert report["parameters"]["student"] - report["parameters"]["teacher"] == 25 * 8 + 8
    for scores in report["geneval"].values():
        assert list(scores["tasks"]) == list(digit_scenes.TASKS)
        assert scores["images"] == 180
        assert scores["overall"] == pytest.approx(np.mean(list(scores["tasks"].values())))
    # 30 pictures of both models, five of each task, captions below.
    with Image.open(workdir / "samples.png") as grid:
        assert grid.width > 5 * 160


def test_pictures_of_the_prompts_are_right_and_those_of_their_neighbours_wrong(config):
    """In the order in which the report draws them."""
    read = train.scene_reader(Experiment(config))
    rng, digits = np.random.default_rng(0), digit_scenes.digit_images("test")
    images = np.stack([digit_scenes.compose(rng, each, digits) for each in digit_scenes.prompts()])
    # The ceiling is 0.904 and the floor 0.036, each +- 0.02 of 180 pictures.
    assert read(images).overall > 0.8 and read(np.roll(images, 1, axis=0)).overall < 0.15


def test_a_folder_of_samples_is_judged_by_the_same_rules(config, workdir):
    config = config.copy_and_resolve_references()
    config.sample.checkpoint = str(workdir)
    folder = workdir.parent / "samples"
    sample.run(config, folder)
    config.evaluate.geneval = str(folder / "samples")
    evaluate.run(config, folder)
    scores = json.loads((folder / "geneval.json").read_text())
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(results) == scores["images"] == 180
    assert scores["tasks"]["colors"] == np.mean(
        [result["correct"] for result in results if result["tag"] == "colors"]
    )
    # The file alone gives the table too.
    config.evaluate.geneval = str(folder / "results.jsonl")
    evaluate.run(config, workdir.parent / "again")
    again = json.loads((workdir.parent / "again" / "geneval.json").read_text())
    assert again == scores


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("report.num_images", 60, "report.num_images = 60, but report.read_scenes needs one of"),
        ("sample.prompt_file", "geneval", "but sample.prompt_file = 'geneval'; set it to digit"),
        ("data.flip", True, "data.flip = True, but captions say left and right"),
    ],
)
def test_a_report_that_cannot_be_is_refused_at_the_start(config, tmp_path, field, value, message):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        ("", "text.tokenizer is empty, but the model reads the tokens of a caption"),
        ("nowhere", "text.tokenizer = nowhere: no such file"),
    ],
)
def test_a_model_with_its_text_encoder_needs_a_tokenizer(tmp_path, tokenizer, message):
    config = shrink(quickstart_t2i_teacher.get_config())
    config.text.tokenizer = tokenizer
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(teacher, tmp_path):
    config = shrink(quickstart_t2i_teacher.get_config())
    config.text.tokenizer = str(teacher)
    config.model.text_vocab_size = 8
    with pytest.raises(ValueError, match="model.text_vocab_size = 8, but the tokenizer .* has 37"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_words_that_the_text_encoder_does_not_know_are_named(config, workdir, caplog):
    config = config.copy_and_resolve_references()
    config.sample.update(prompt_file="", prompts=("a purple elephant",))
    with caplog.at_level("WARNING", logger="absl"):
        Experiment(config).encode(config.sample.prompts)
    assert "does not know ['elephant']: a purple elephant" in caplog.text
