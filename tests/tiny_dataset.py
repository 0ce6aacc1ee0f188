"""Small data sets, in memory and as TFDS stores them."""

import io
import json
import os
import pathlib
import shutil

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from lit_jax.data.dataset import PREPARED, ImageDataset, open_dataset
from lit_jax.data.shards import Shards, write_about


def make_numbers(count=40, classes=10):
    """Images with their number in every pixel of the left half."""
    records = []
    for i in range(count):
        image = np.zeros((4, 6, 1), np.uint8)
        image[:, :3] = i
        records.append({"image": image, "label": i % classes})
    return ImageDataset("numbers", "train", records, (4, 6, 1), classes)


def put_digits(directory):
    """Puts mnist_digits into a TFDS directory of a test's own; returns `directory`.

    A session of tests writes them once, which takes three seconds.
    """
    once = pathlib.Path(os.environ["SESSION_FILES"]) / "tfds"
    open_dataset("mnist_digits", once, "train")
    shutil.copytree(once / "mnist_digits", pathlib.Path(directory) / "mnist_digits")
    return directory


def write_tfds(folder, features, examples, name=None, version="2.0.0"):
    """A TFDS data set in a folder `version` of `folder`, as tfds convert_format would leave it.

    Its name is that of the folder, or `name` where the folder is that of a config.
    """
    name = name or folder.name
    count = len(examples)
    shards = Shards(epath.Path(folder) / version, name, "train", count, count)
    shards.folder.mkdir(parents=True)
    split = {"source": name, "records": count, "shard_records": count}
    write_about(shards.folder, {"splits": {"train": split}})
    shards.write(0, (features.serialize_example(example) for example in examples))
    shards.finish(features, {"image_size": 0, "autoencoder": None})
    (shards.folder / PREPARED).unlink()


CIFAR10 = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
)


def write_cifar10(directory, count=64):
    """A CIFAR-10 of few images in the form of the real one; returns `directory`.

    Image i is of class i % 10; its left half has the value 3 i, its right half is black.
    """
    examples = []
    for i in range(count):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16] = 3 * i
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg")
        file.seek(0)
        examples.append({"id": f"train_{i:05d}", "image": file, "label": i % 10})
    folder = epath.Path(directory) / "cifar10"
    write_tfds(folder, CIFAR10, examples, version="3.0.2")
    # TFDS has a class of this name, which takes no other version than its own.
    about = folder / "3.0.2" / "dataset_info.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"version": "3.0.2"}))
    return directory
