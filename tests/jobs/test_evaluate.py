"""The evaluation job, and evaluation during training: files of images in, reports out."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import object_store
import pytest
from etils import epath
from PIL import Image
from tiny_dataset import put_digits
from tiny_extractor import make_extractor, random_images

from configs import debug
from lit_jax import pictures
from lit_jax.data import dataset
from lit_jax.evaluation import features, in_training, protocol, references, run_report
from lit_jax.evaluation.evaluator import EvaluationSettings, Evaluator
from lit_jax.jobs import evaluate, sample, train


def make_config(**evaluate_fields):
    defaults = dict(
        features="efficientnet_lite0",
        weights="",
        samples="",
        reference="",
        num_images=0,
        batch_size=8,
        num_neighbour_images=10_000,
        neighbours=3,
        split_size=5000,
        self_check=False,
        compare=(),
        compare_across=("samples.cfg_scale",),
        geneval="",
    )
    return ml_collections.ConfigDict(
        {"evaluate": defaults | evaluate_fields, "data": {"dir": "data"}}
    )


@pytest.fixture
def tiny_features(monkeypatch):
    """A network of a few products in place of the pretrained ones."""
    monkeypatch.setattr(features, "make_extractor", lambda name, weights: make_extractor())


def test_samples_from_elsewhere_are_known_by_their_bytes(tmp_path, tiny_features):
    """Neither the file's name nor the number of images tells two sets apart, or makes them one."""
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8))
    results = []
    for folder, seed in (("a", 0), ("b", 1), ("c", 0)):
        workdir = tmp_path / folder
        workdir.mkdir()
        np.savez(
            workdir / "samples.npz", arr_0=random_images(8, seed), speed=json.dumps({"devices": 2})
        )
        evaluate.run(make_config(reference=str(tmp_path / "reference.npz")), workdir)
        results.append(json.loads((workdir / "evaluation_samples.json").read_text()))
    assert results[0]["protocol"] == results[2]["protocol"]
    assert results[0]["protocol"]["image_shape"] == [8, 8, 3]
    message = "a and b were not made by the same protocol: samples.file is"
    with pytest.raises(ValueError, match=message):
        protocol.check_comparable(dict(zip("ab", results)))


def test_the_settings_of_the_job_reach_the_scores(tmp_path, tiny_features):
    np.savez(tmp_path / "reference.npz", arr_0=random_images(30, seed=1))
    np.savez(tmp_path / "samples.npz", arr_0=random_images(30))
    made_by = {}
    for name, fields in {
        "default": {},
        "changed": dict(
            num_images=20, neighbours=2, split_size=10, num_neighbour_images=25, batch_size=5
        ),
    }.items():
        evaluate.run(make_config(reference=str(tmp_path / "reference.npz"), **fields), tmp_path)
        result = json.loads((tmp_path / "evaluation_samples.json").read_text())
        made_by[name] = protocol.flatten(result["protocol"])
    changed = {
        key: value for key, value in made_by["changed"].items() if value != made_by["default"][key]
    }
    assert changed == {
        "num_images": 20,
        "neighbours": 2,
        "inception_score_split_size": 10,
        "reference.neighbour_images": 25,
    }


def save_samples(path, images, cfg_scale):
    """What the sampling job leaves."""
    np.savez(
        path,
        arr_0=images,
        protocol=json.dumps({"sampler": "ddpm", "steps": 250, "cfg_scale": cfg_scale}),
        speed=json.dumps({"images_per_second": 12.34, "device": "abacus", "devices": 2}),
    )


@pytest.fixture
def optimised():
    """For a program that takes longer to run than to compile."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


def test_the_job_scores_the_samples_of_its_workdir(tmp_path, optimised):
    """With the default features: their names, the protocol, a report and a grid."""
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8, seed=1, size=32))
    images = random_images(8, size=32)
    save_samples(tmp_path / "samples.npz", images, 1.5)
    evaluate.run(make_config(reference=str(tmp_path / "reference.npz")), tmp_path)

    result = json.loads((tmp_path / "evaluation_samples.json").read_text())
    assert list(result["scores"]) == [
        "fd_efficientnet_lite0_8",
        "precision_efficientnet_lite0_8",
        "recall_efficientnet_lite0_8",
    ]
    assert result["scores"]["fd_efficientnet_lite0_8"] > 1
    assert result["protocol"]["samples"]["cfg_scale"] == 1.5
    assert result["protocol"]["weights"]
    report = (tmp_path / "evaluation_samples.md").read_text()
    assert "fd_efficientnet_lite0_8" in report
    assert "Drawn at 12.3 images/s on 2 x abacus" in report
    grid = np.asarray(Image.open(tmp_path / "evaluation_samples.png"))
    np.testing.assert_array_equal(grid, pictures.square_grid(images))


def test_guidance_scales_are_compared(tmp_path, tiny_features):
    """The noisier the images, the farther they are, and the table is sorted by the scale."""
    images = random_images(8, size=32)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    rng = np.random.default_rng(0)
    files = []
    distances = {}
    for cfg_scale, noise in [(4.0, 60), (1.0, 2), (1.5, 20)]:
        workdir = tmp_path / f"cfg_{cfg_scale}"
        workdir.mkdir()
        samples = workdir / f"samples_{cfg_scale}.npz"
        noisy = np.clip(images + rng.normal(0, noise, images.shape), 0, 255)
        save_samples(samples, noisy.astype(np.uint8), cfg_scale)
        config = make_config(reference=str(tmp_path / "reference.npz"), samples=str(samples))
        evaluate.run(config, workdir)
        # The fraction of the scale is part of the name.
        files.append(f"{workdir}/evaluation_samples_{cfg_scale}.json")
        scores = json.loads(pathlib.Path(files[-1]).read_text())["scores"]
        distances[cfg_scale] = scores["fd_tiny_8"]
    assert distances[1.0] < distances[1.5] < distances[4.0]

    evaluate.run(make_config(compare=tuple(files)), tmp_path / "all")
    table = (tmp_path / "all" / "comparison.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert rows[0] == ["run", "samples.cfg_scale", *scores, "images/s drawn"]
    assert [row[1:3] for row in rows[2:]] == [
        [str(scale), f"{distances[scale]:.4f}"] for scale in (1.0, 1.5, 4.0)
    ]
    assert {row[-1] for row in rows[2:]} == {"12.3"}
    assert Image.open(tmp_path / "all" / "comparison.png").width > 500
    message = r"evaluate.compare_across = \(\): .*samples.cfg_scale is 4.0 and 1.0"
    with pytest.raises(ValueError, match=message):
        evaluate.run(make_config(compare=tuple(files), compare_across=()), tmp_path / "all")


def test_training_shows_and_scores_what_sampling_and_evaluation_do_after_it(
    tmp_path, tiny_features
):
    """The EMA of the last step, images of the same numbers: the same pictures and scores."""
    np.savez(tmp_path / "reference.npz", arr_0=random_images(12, size=28)[..., :1])
    config = debug.get_config()
    config.model.attention = "softmax"
    config.student.init = "random"
    # Two steps that can be seen, and an EMA that lags behind them.
    config.optimizer.learning_rate = 0.01
    config.ema.decay = 0.5
    config.data.dir = str(put_digits(tmp_path / "data"))
    config.train.update(steps=2, batch_size=8, remat="none", preview_every=2, preview_images=8)
    config.report.update(num_images=8, read_labels=False)
    config.sample.update(steps=2, num_images=8, batch_size=8, labels="balanced")
    config.evaluate.update(
        every=1,
        every_images=8,
        num_images=0,
        batch_size=8,
        reference=str(tmp_path / "reference.npz"),
    )
    trained = tmp_path / "trained"
    train.run(config, trained)
    drawn = tmp_path / "drawn"
    config.sample.checkpoint = str(trained)
    sample.run(config, drawn)
    evaluate.run(config, drawn)

    # Scores
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {name: value for name, value in line.items() if name.startswith("eval/")}
        | {"step": line["step"]}
        for line in lines
        if "eval/fd_tiny_8" in line
    ]
    during = [json.loads((trained / f"evaluation_{step:07d}.json").read_text()) for step in (1, 2)]
    after = json.loads((drawn / "evaluation_samples.json").read_text())
    assert logged == [
        {f"eval/{name}": value for name, value in result["scores"].items()} | {"step": step}
        for step, result in enumerate(during, 1)
    ]
    assert during[1]["scores"] == pytest.approx(after["scores"], rel=1e-4)
    assert during[0]["scores"] != during[1]["scores"]

    # Protocols
    with pytest.raises(ValueError, match="samples.weights is 'EMA in training of run .*' and"):
        protocol.check_comparable({"during": during[1], "after": after}, ("samples.step",))
    protocol.check_comparable(
        {"during": during[1], "after": after}, ("samples.step", "samples.weights")
    )
    protocol.check_comparable({"first": during[0], "second": during[1]}, ("samples.step",))

    # Pictures
    with np.load(drawn / "samples.npz") as archive:
        images = archive["arr_0"]
    for picture, expected in [
        (trained / "previews" / "step_0000002.png", pictures.image_grid([images], ["student"])),
        (trained / "samples.png", pictures.square_grid(images)),
    ]:
        difference = np.asarray(Image.open(picture), np.int32) - np.asarray(expected, np.int32)
        assert np.abs(difference).max() <= 1  # a level of uint8, where rounding decides

    # Report
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    report = json.loads((trained / "report.json").read_text())
    assert report["loss"]["loss"] == {"start": losses[0], "end": losses[1]}


def write_result(path):
    made_by = {"features": "inception_adm", "samples": {"cfg_scale": 1.5}}
    result = {"scores": {"fid_adm_50k": 2.0}, "protocol": made_by}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    files = [write_result(tmp_path / name) for name in ("a/x.json", "b/x.json", "b/y.json")]
    for chosen, names in ((files[1:], ["x", "y"]), (files, ["a/x", "b/x", "b/y"])):
        evaluate.run(make_config(compare=tuple(chosen)), tmp_path)
        assert list(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == names


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (
            dict(),
            FileNotFoundError,
            "evaluate.samples is empty, and .*workdir/samples.npz is not there",
        ),
        (dict(samples="nowhere.npz"), FileNotFoundError, "evaluate.samples = nowhere.npz: no such"),
        (
            dict(samples="SAMPLES", num_images=50),
            ValueError,
            "evaluate.num_images = 50, but .* holds 4 images",
        ),
        (
            dict(samples="SAMPLES", features="fid"),
            ValueError,
            "evaluate.features must be one of .*; got 'fid'",
        ),
        (
            dict(samples="SAMPLES", features="inception_adm"),
            FileNotFoundError,
            "evaluate.weights = '' is empty: inception_adm needs",
        ),
        (
            dict(samples="SAMPLES", features="inception_adm", weights="nowhere.pth"),
            FileNotFoundError,
            "evaluate.weights = nowhere.pth: no such file or folder; docs/evaluation.md",
        ),
        (dict(samples="EMPTY"), ValueError, "evaluate.samples = .*empty holds no images"),
        (
            dict(samples="SAMPLES", reference="EMPTY"),
            ValueError,
            "evaluate.reference = .*empty holds no images",
        ),
        (dict(samples="SAMPLES"), ValueError, "evaluate.reference = '' is empty"),
        (
            dict(samples="SAMPLES", reference="cifar10"),
            ValueError,
            "evaluate.reference = 'cifar10' is neither an npz file, nor a folder, nor DATA",
        ),
        (
            dict(samples="SAMPLES", reference="nowhere.npz"),
            FileNotFoundError,
            "evaluate.reference = nowhere.npz not found",
        ),
        (
            dict(samples="SAMPLES", self_check=True),
            ValueError,
            "evaluate.self_check = True .*features is efficientnet_lite0, and there are 4 images",
        ),
        (
            dict(samples="SAMPLES", num_images=3),
            ValueError,
            "evaluate.neighbours = 3 needs more images .* number of images is 3",
        ),
        (
            dict(samples="SAMPLES", num_neighbour_images=2),
            ValueError,
            "evaluate.neighbours = 3 needs .* num_neighbour_images is 2",
        ),
        (dict(compare=("a.json",)), FileNotFoundError, "evaluate.compare: a.json not found"),
        (dict(compare=("SAMPLES",)), ValueError, "evaluate.compare: .*images.npz is no evaluation"),
        (
            dict(compare=("CONFIG",)),
            ValueError,
            "evaluate.compare: .*config.json is no evaluation_.*: it has no scores and protocol",
        ),
    ],
)
def test_bad_requests_end_before_anything_is_written(tmp_path, fields, error, message):
    np.savez(tmp_path / "images.npz", arr_0=random_images(4))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    files = {
        "SAMPLES": str(tmp_path / "images.npz"),
        "CONFIG": str(tmp_path / "config.json"),
        "EMPTY": str(tmp_path / "empty"),
    }
    for name, value in fields.items():
        if name == "compare":
            fields = {"compare": tuple(files.get(file, file) for file in value)}
        elif name in ("samples", "reference"):
            fields = fields | {name: files.get(value, value)}
    with pytest.raises(error, match=message):
        evaluate.run(make_config(**fields), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


@pytest.fixture
def bucket(monkeypatch):
    with object_store.serve(monkeypatch) as bucket:
        yield bucket


def save(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def test_the_job_reads_and_writes_an_object_store(bucket, tiny_features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(bucket / "reference.npz", arr_0=random_images(20, seed=1))
    for run in ("a", "b"):
        save(bucket / run / "samples.npz", arr_0=random_images(9))
        evaluate.run(make_config(reference=f"{bucket}/reference.npz"), bucket / run)
        assert files_in(bucket / run) == {
            "samples.npz",
            "evaluation_samples.json",
            "evaluation_samples.md",
            "evaluation_samples.png",
        }
    files = tuple(f"{bucket}/{run}/evaluation_samples.json" for run in ("a", "b"))
    evaluate.run(make_config(compare=files), bucket / "both")
    assert files_in(bucket / "both") == {"comparison.json", "comparison.md", "comparison.png"}
    for name in ("x.npz", "x"):
        message = f"evaluate.reference = gs://.*/{name} not found"
        with pytest.raises(FileNotFoundError, match=message):
            evaluate.run(make_config(reference=f"{bucket}/{name}"), bucket / "a")

    # Folders of images
    for folder, count in (("drawn", 9), ("drawn/more", 2), ("reference", 20)):
        for i, image in enumerate(random_images(count)):
            (bucket / folder).mkdir(parents=True, exist_ok=True)
            sample.save_image(bucket / folder / f"{i}.png", image)
    fields = dict(reference=f"{bucket}/reference", samples=f"{bucket}/drawn")
    evaluate.run(make_config(**fields), bucket / "folder")
    written = json.loads((bucket / "folder" / "evaluation_drawn.json").read_text())
    assert written["protocol"]["num_images"] == 11
    assert not list(tmp_path.iterdir())  # no folder called "gs:"


def test_what_training_shows_may_be_in_an_object_store(bucket):
    def draw(params, index, condition, on_batch):
        return random_images(len(index), seed=int(params["seed"])) / np.float32(127.5) - 1

    condition = {"label": np.arange(6)}
    params = {"student": {"seed": np.ones((), int)}}
    previews = in_training.Previews({"student": draw}, condition, bucket / "previews")
    previews.draw(params, 1)

    settings = EvaluationSettings("digits:test", batch_size=8)
    records = [{"image": image, "label": 0} for image in random_images(20, seed=2)]
    digits = dataset.ImageDataset("digits", "test", records, (8, 8, 3), 10)

    def read_reference():
        return references.dataset_reference(
            digits,
            make_extractor(),
            batch_size=8,
            num_neighbour_images=9,
            cache=bucket / "reference.npz",
        )

    evaluator = Evaluator(settings, make_extractor(), read_reference())
    np.testing.assert_array_equal(read_reference().features, evaluator.reference.features)
    evaluation = in_training.PeriodicEvaluation(evaluator, draw, condition, {}, bucket)
    evaluation.score(params["student"], 1)
    (bucket / "metrics.jsonl").write_text("")
    run_report.report({"student": draw}, params, condition, bucket, asked={"step": 1})
    assert previews.path(1).exists() and evaluation.path(1).exists()
    assert files_in(bucket) == {
        "previews",
        "reference.npz",
        "evaluation_0000001.json",
        "evaluation_0000001.md",
        "metrics.jsonl",
        "report.json",
        "samples.png",
    }


def save_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


def test_a_folder_scores_as_the_npz_of_its_images(tmp_path, tiny_features):
    """Samples and reference; what the sampling job left beside its PNGs is the protocol."""
    made_by = {"sampler": "ddpm", "cfg_scale": 1.5}
    speed = {"images_per_second": 12.34, "device": "abacus", "devices": 2}
    samples = random_images(9)
    np.savez(tmp_path / "a.npz", arr_0=samples, protocol=json.dumps(made_by))
    np.savez(tmp_path / "reference.npz", arr_0=random_images(20, seed=1))
    save_pngs(tmp_path / "cfg_1.5", samples)
    (tmp_path / "cfg_1.5" / "protocol.json").write_text(json.dumps(made_by))
    (tmp_path / "cfg_1.5" / "speed.json").write_text(json.dumps(speed))
    save_pngs(tmp_path / "reference", random_images(20, seed=1))
    results = []
    for name, reference in (("a.npz", "reference.npz"), ("cfg_1.5/", "reference")):
        config = make_config(
            samples=f"{tmp_path}/{name}",
            reference=str(tmp_path / reference),
            num_neighbour_images=9,
        )
        evaluate.run(config, tmp_path)
    results = [
        json.loads((tmp_path / f"evaluation_{name}.json").read_text()) for name in ("a", "cfg_1.5")
    ]
    assert results[0]["scores"] == results[1]["scores"]
    assert results[1]["protocol"]["samples"] == made_by
    assert results[1]["sampling_speed"] == speed and results[1]["notes"] == []
    assert (
        protocol.differences(results[0]["protocol"], results[1]["protocol"], ("reference.file",))
        == []
    )
    hashes = [result["protocol"]["reference"]["file"] for result in results]
    assert all(len(text) == 16 for text in hashes) and len(set(hashes)) == 2
    grid = np.asarray(Image.open(tmp_path / "evaluation_cfg_1.5.png"))
    np.testing.assert_array_equal(grid, pictures.square_grid(samples))


def test_a_folder_from_elsewhere_is_known_by_its_content(tmp_path, tiny_features):
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8))
    hashes = []
    for seed in (0, 1, 0):
        save_pngs(tmp_path / "drawn", random_images(8, seed))
        config = make_config(
            samples=str(tmp_path / "drawn"), reference=str(tmp_path / "reference.npz")
        )
        evaluate.run(config, tmp_path)
        result = json.loads((tmp_path / "evaluation_drawn.json").read_text())
        hashes.append(result["protocol"]["samples"]["file"])
    assert hashes[0] == hashes[2] != hashes[1]


def test_samples_of_another_size_than_the_reference_are_noted(tmp_path, tiny_features, caplog):
    """The reference may be a file, a folder, or statistics that were kept of a data set."""
    np.savez(tmp_path / "samples.npz", arr_0=random_images(8, size=16))
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8))
    save_pngs(tmp_path / "folder", random_images(8))
    records = [{"image": image, "label": 0} for image in random_images(8)]
    references.dataset_reference(
        dataset.ImageDataset("digits", "test", records, (8, 8, 3), 10),
        make_extractor(),
        batch_size=8,
        num_neighbour_images=9,
        cache=epath.Path(tmp_path / "kept.npz"),
    )
    note = "the samples are 16 x 16 pixels (height x width), the reference's images 8 x 8: "
    for reference in ("reference.npz", "folder", "kept.npz"):
        caplog.clear()
        evaluate.run(make_config(reference=str(tmp_path / reference)), tmp_path)
        (found,) = json.loads((tmp_path / "evaluation_samples.json").read_text())["notes"]
        assert found.startswith(note) and found in caplog.messages
        assert note in (tmp_path / "evaluation_samples.md").read_text()


def test_images_that_are_all_equal_are_noted(tmp_path, tiny_features, caplog):
    grey = np.full((6, 8, 8, 3), 128, np.uint8)
    other = grey.copy()
    other[5, 0, 0, 0] = 129
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8))
    for images, notes in ((grey, 1), (other, 0)):
        caplog.clear()
        np.savez(tmp_path / "samples.npz", arr_0=images)
        config = make_config(reference=str(tmp_path / "reference.npz"), batch_size=4)
        evaluate.run(config, tmp_path)
        found = json.loads((tmp_path / "evaluation_samples.json").read_text())["notes"]
        assert len(found) == notes
        assert all(f"{tmp_path}/samples.npz are all equal" in text for text in found)
        assert set(found) <= set(caplog.messages)
