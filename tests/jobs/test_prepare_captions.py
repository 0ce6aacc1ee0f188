"""Images with captions from end to end: prepared into buckets, and trained on."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from tiny_autoencoder import write_autoencoder
from tiny_captions import BUCKETS, COUNT, make_config, picture, texts, write_folder
from tiny_text import spiece_model, write_text_encoder

from lit_jax import sharding
from lit_jax.data import caption_records, pipeline
from lit_jax.data.buckets import Buckets, crop_to
from lit_jax.data.caption_records import open_captions
from lit_jax.data.dataset import PREPARED
from lit_jax.data.encoding import make_encoder
from lit_jax.data.shards import VERSION, Shards, finish_splits
from lit_jax.experiment import Experiment
from lit_jax.jobs import prepare


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folders of images, text encoder and autoencoder."""
    folder = tmp_path_factory.mktemp("captions")
    for name in ("images", "text"):
        (folder / name).mkdir()
    return {
        "folder": write_folder(folder / "images"),
        "text": write_text_encoder(folder / "text"),
        "autoencoder": write_autoencoder(folder / "tiny-vae"),
    }


def run(config):
    prepare.run(config, epath.Path("unused"))
    return pathlib.Path(config.data.dir) / config.data.name / VERSION


def files_of(folder):
    """All that a preparation leaves, without the file that TFDS dates."""
    paths = [*folder.glob("*.array_record-*"), folder / PREPARED, folder / "features.json"]
    return {path.name: path.read_bytes() for path in sorted(paths)}


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    config = make_config(data=tmp_path_factory.mktemp("data"), **sources)
    return config, run(config)


# ---- Prepared ------------------------------------------------------------------------------------


def test_records_are_the_posteriors_and_features_of_their_bucket(prepared):
    config, _ = prepared
    data = open_captions("captioned", config.data.dir, "train")
    assert data.shapes == ((8, 32), (16, 16), (32, 8))
    assert data.image_shape == (8, 8, 4)
    assert [len(bucket) for bucket in data.buckets] == [5, 13, 4]
    experiment = Experiment(config)
    buckets = Buckets(16, BUCKETS)
    encoder = experiment.load_text_encoder()
    for number, bucket in enumerate(data.buckets):
        index = [i for i in range(COUNT) if buckets.choose(*picture(i).size[::-1]) == number][1]
        pixels = np.asarray(crop_to(picture(index), buckets.sides(number)))
        mean, log_variance = experiment.autoencoder.encode(pixels[None] / np.float32(127.5) - 1)
        record = bucket[1]
        np.testing.assert_allclose(record["mean"], mean[0], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(record["log_variance"], log_variance[0], rtol=2e-3, atol=1e-3)
        features, mask, _ = encoder(texts(index))
        assert record["caption_lengths"].tolist() == mask.sum(axis=1).tolist()
        ours = caption_records.unpack(record, slice(None)).astype(np.float32)
        np.testing.assert_allclose(ours, features[mask], rtol=2**-8)
        raw = bucket.records[1]
        assert [caption.decode() for caption in raw["captions"]] == texts(index)
        assert (raw["width"], raw["height"]) == picture(index).size
    assert data.text == encoder.identity() | {"dtype": "float32", "width": 16}
    assert data.scaling_factor == 0.5 and data.shift_factor == 0.1
    assert data.deviation().shape == (4,)


def test_a_killed_preparation_goes_on_to_the_same_bytes(prepared, sources, tmp_path, monkeypatch):
    config = make_config(data=tmp_path, **sources)
    encoded = []

    def make_failing_encoder(*arguments, **settings):
        encode = make_encoder(*arguments, **settings)

        def encode_or_fail(images):
            encoded.append(images.shape)
            if len(encoded) == 4:
                raise KeyboardInterrupt
            return encode(images)

        return encode_or_fail

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_encoder", make_failing_encoder)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    out = tmp_path / "captioned" / VERSION
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("captioned-*")}
    assert sorted(written) == [
        "captioned-train_16x16.array_record-00000-of-00003",
        "captioned-train_8x32.array_record-00000-of-00001",
    ]
    with pytest.raises(FileNotFoundError, match="is not finished; run the --mode=prepare"):
        open_captions("captioned", str(tmp_path), "train")

    # The sizes of the images are not read again, nor is a finished shard written again.
    monkeypatch.setattr(prepare, "survey_images", None)
    run(config)
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    assert files_of(out) == files_of(prepared[1])


def test_two_processes_write_what_one_writes(prepared, sources, tmp_path):
    config = make_config(data=tmp_path, **sources)
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh()
    plan = prepare.plan_captions(experiment, epath.Path(tmp_path) / "captioned")
    for process in (1, 0):
        splits = []
        for split, images in plan.splits.items():
            shards = Shards(
                epath.Path(tmp_path) / "captioned" / VERSION,
                "captioned",
                split,
                len(images),
                config.prepare.shard_records,
                process,
                2,
            )
            prepare.enter_folder(shards, images, plan.about)
            prepare.write_shards(
                shards,
                images,
                plan.features,
                plan.encode,
                batch_size=config.prepare.batch_size,
                num_threads=1,
                add=plan.add,
            )
            splits.append(shards)
    assert {len(shards.finished()) for shards in splits} == {1, 3}
    finish_splits(splits, plan.features, plan.about)
    assert files_of(splits[0].folder) == files_of(prepared[1])


def test_pixels_int8_and_broken_images(sources, tmp_path, caplog):
    """Without an autoencoder; two images are broken, one in its header and one behind it."""
    folder = tmp_path / "images"
    shutil.copytree(sources["folder"], folder)
    (folder / "02.png").write_bytes(b"no picture")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:100])
    config = make_config(folder, tmp_path / "data", sources["text"])
    config.prepare.update(caption_dtype="int8", skip_broken=1)
    config.text.max_length = 6  # shorter than the captions
    with pytest.raises(ValueError, match="04.png: .*; prepare.skip_broken = 1: a larger number"):
        run(config)
    config.prepare.skip_broken = 0
    with pytest.raises(ValueError, match="^prepare.skip_broken = 0 leaves out fewer images than"):
        run(config)
    config.prepare.skip_broken = 2
    with caplog.at_level("INFO", "absl"):
        out = run(config)
    messages = [record.getMessage() for record in caplog.records]
    for text in (
        "20 records of",
        "1 images cannot be read and are left out",
        "image 2 of",
        f"1 images cannot be read and are left out; {out / PREPARED} names them",
        "images are with a caption that is cut to 6 tokens",
    ):
        assert any(text in message for message in messages), text
    data = open_captions("captioned", config.data.dir, "train")
    record = data.buckets[1][0]
    expected = crop_to(picture(0), (16, 16))
    np.testing.assert_array_equal(record["image"], np.asarray(expected))
    assert record["caption_features"].dtype == np.int8
    assert record["caption_lengths"].max() == 6
    features, mask, _ = Experiment(config).load_text_encoder()(texts(0))
    ours = caption_records.unpack(record, slice(None)).astype(np.float32)
    np.testing.assert_allclose(ours, features[mask], rtol=2**-8, atol=np.abs(features).max() / 250)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text.checkpoint": ""}, "^text.checkpoint is empty, but the model is told a caption"),
        ({"model.caption_channels": 8}, "^model.caption_channels = 8, but the features of text"),
        (
            {"prepare.buckets": ("15x16",)},
            r"^prepare.image_size = 16 makes pictures of \(15, 16\) pixels in the bucket 15x16",
        ),
        ({"prepare.buckets": ("1x1",)}, "^prepare.buckets must be"),
        ({"prepare.image_size": 20}, "^prepare.image_size must be a side in pixels that 16"),
        ({"prepare.split": "train"}, "^prepare.split = train is of TFDS data sets"),
        ({"prepare.source": "no/list.jsonl"}, "^prepare.source = 'no/list.jsonl': no such file"),
    ],
)
def test_what_cannot_be_prepared_is_told_before_anything_is_written(
    sources, tmp_path, change, message
):
    config = make_config(data=tmp_path / "data", **sources)
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config)
    assert not (tmp_path / "data").exists()


# ---- Trained on ----------------------------------------------------------------------------------


def check_data(config):
    Experiment(config).check_data()


def test_features_of_another_kind_are_refused_by_name(prepared, sources, tmp_path):
    def refused(message, **change):
        config = prepared[0].copy_and_resolve_references()
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in change.items()})
        with pytest.raises(ValueError, match=message):
            check_data(config)

    check_data(prepared[0])
    (tmp_path / "other").mkdir()
    other = write_text_encoder(tmp_path / "other", seed=1)
    pieces = tmp_path / "spiece.model"
    pieces.write_bytes(spiece_model(bos_id=3))
    kinds = "but the captions of data.name = captioned were encoded with"
    refused("^data.flip = True, but captions say left and right", data__flip=True)
    refused(f"^text.cleaning = lower, {kinds} cleaning = none", text__cleaning="lower")
    refused(f"^text.max_length = 19, {kinds} max_length = 20", text__max_length=19)
    refused(rf"^text.checkpoint \({other}\) = \w+, {kinds} weights", text__checkpoint=str(other))
    refused(rf"^text.tokenizer \({pieces}\) = \w+, {kinds} to", text__tokenizer=str(pieces))
    refused("^model.caption_length = 19, but the captions of", model__caption_length=19)
    refused("^model.caption_channels = 8, but the features of", model__caption_channels=8)
    refused("^data.split = 'test' is none of captioned", data__split="test")
    refused("^model.input_size and model.in_channels make", model__input_size=16)
    # A data set of class labels is none of captions, and the other way round.
    about = json.loads((prepared[1] / PREPARED).read_text())
    assert about["text"]["cleaning"] == "none" and about["buckets"] == list(BUCKETS)


def test_an_empty_text_checkpoint_is_enough_for_training(prepared):
    config = prepared[0].copy_and_resolve_references()
    config.text.checkpoint = ""
    check_data(config)


@pytest.fixture(scope="module")
def texts_alone(sources, tmp_path_factory):
    """A preparation that leaves the text encoder to training."""
    config = make_config(data=tmp_path_factory.mktemp("texts"), **sources)
    config.prepare.captions = "text"
    config.text.dtype = "bfloat16"
    return config, run(config)


def test_texts_alone_are_encoded_in_training(prepared, texts_alone):
    """The same pictures in the same order, with the features that would have been stored."""
    config, out = texts_alone
    assert json.loads((out / PREPARED).read_text())["text"] is None
    experiment = Experiment(config)
    experiment.check_data()
    rows = sharding.batch_sharding(experiment.mesh)
    batches = pipeline.DeviceIterator(experiment.batches(), rows)
    promised = [shapes_of(batch) for batch in experiment.batch_shapes()]
    for _, wanted in zip(range(3), iter(Experiment(prepared[0]).batches())):
        batch = experiment.encode_captions(next(batches))
        assert shapes_of(batch) in promised
        for name in ("mean", "caption_mask", "index"):
            np.testing.assert_array_equal(batch[name], wanted[name])
        ours = np.asarray(batch["caption"], np.float32)
        # Two layers in bfloat16.
        np.testing.assert_allclose(ours, wanted["caption"].astype(np.float32), atol=0.1)
        assert not ours[~wanted["caption_mask"]].any()
    # Another text encoder would be another run.
    features = experiment.decisive_fields()["text.features"]
    assert features == experiment.load_text_encoder().identity() | {"dtype": "bfloat16"}

    config = config.copy_and_resolve_references()
    config.text.checkpoint = ""
    with pytest.raises(ValueError, match="^text.checkpoint is empty, but the model is told"):
        Experiment(config).batches()


def shapes_of(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}
