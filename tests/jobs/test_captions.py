"""Images with captions from end to end: prepared into buckets, and trained on."""

import pathlib

import numpy as np
import pytest
from etils import epath
from tiny_autoencoder import write_autoencoder
from tiny_captions import BUCKETS, COUNT, make_config, picture, texts, write_folder
from tiny_text import write_text_encoder

from lit_jax.data import caption_records
from lit_jax.data.buckets import Buckets, crop_to
from lit_jax.data.caption_records import open_captions
from lit_jax.data.shards import VERSION
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
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record-*"))}


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    config = make_config(data=tmp_path_factory.mktemp("data"), **sources)
    return config, run(config)


def test_records_are_the_posteriors_and_features_of_their_bucket(prepared, sources):
    config, out = prepared
    data = open_captions("captioned", config.data.dir, "train")
    assert data.shapes == ((8, 32), (16, 16), (32, 8))
    assert data.image_shape == (8, 8, 4)
    assert [len(bucket) for bucket in data.buckets] == [5, 13, 4]
    experiment = Experiment(config)
    buckets = Buckets(16, BUCKETS)
    encoder = experiment.text_encoder
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
