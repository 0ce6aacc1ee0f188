"""Images with captions of three aspects, and a config that prepares and trains on them."""

import jax
import numpy as np
from PIL import Image
from tiny_text import CAPTIONS, CONFIG

from configs import debug
from lit_jax.data.buckets import split_of
from lit_jax.data.caption_records import BucketedDataset, CaptionDataset, pack
from lit_jax.experiment import Experiment
from lit_jax.models import param_shapes
from lit_jax.porting.write import export_diffusers

# (height, width) in pixels, of a nominal size of 16: one for each of these buckets, and near them.
BUCKETS = ("8x32", "16x16", "32x8")
SIDES = ((8, 33), (17, 15), (40, 11))
COUNT = 22


def texts(index):
    """Two captions of an image, and of every fifth one alone."""
    return [CAPTIONS[index % len(CAPTIONS)]] + ([f"a cat {index % 3}"] if index % 5 else [])


def picture(index):
    """A random image; most are of the square bucket."""
    h, w = SIDES[(1, 0, 1, 2, 1)[index % 5]]
    pixels = np.random.default_rng(index).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels)


def write_folder(folder, count=COUNT):
    """NAME.png with NAME.txt beside it."""
    for index in range(count):
        picture(index).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text("\n".join(texts(index)) + "\n")
    return folder


def make_config(folder, data, text="", autoencoder=""):
    config = debug.get_config()
    with config.model.unlocked():
        config.model.update(
            family="pixart",
            input_size=8 if autoencoder else 16,
            patch_size=2,
            in_channels=4 if autoencoder else 3,
            num_classes=None,
            timestep_freq_shift=None,
            mlp_norm_epsilon=None,
            cross_heads=2,
            caption_channels=CONFIG.width,
            caption_length=20,
            position_base=4,
        )
    config.data.update(name="captioned", dir=str(data), flip=False, num_threads=2, prefetch=2)
    config.autoencoder.checkpoint = str(autoencoder)
    config.text.update(checkpoint=str(text), max_length=20, batch_size=8, dtype="float32")
    config.prepare.update(
        source=f"{folder}/", image_size=16, buckets=BUCKETS, batch_size=8, shard_records=5
    )
    config.student.init = "random"
    config.train.update(batch_size=8, steps=4, preview_every=0, remat="none")
    config.report.update(num_images=0, read_labels=False)
    return config


def write_transformer(config, folder):
    """Puts a teacher of the student's size beside a text encoder; returns that folder.

    It is then a pipeline of diffusers, whose file has no null caption.
    """
    architecture = Experiment(config).default_teacher().config
    # diffusers knows one number of heads.
    architecture = architecture.with_heads(architecture.cross_heads)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    export_diffusers(params, folder / "transformer", architecture)
    return folder


def make_buckets(counts=(3, 9, 4), lengths=(2, 1), tokens=None, **about):
    """Three buckets in memory; image i has its number in every pixel.

    Caption k of image i has 10 i + k in all its channels.
    """
    about = {
        "autoencoder": None,
        "caption_dtype": "bfloat16",
        "text": {"width": 4, "max_length": 5, "cleaning": "none", "tokenizer": "t", "weights": "w"},
    } | about
    buckets = []
    shapes = ((8, 32), (16, 16), (32, 8))
    for shape, count in zip(shapes, counts):
        sides = (shape[0] // 8, shape[1] // 8, 3)
        records = []
        for i in range(count):
            words = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0)) + 10 * i
            values = np.tile(words[:tokens, None], 4).astype(np.float32)
            record = pack(values, "bfloat16") | {"image": np.full(sides, i, np.uint8)}
            records.append(record | {"caption_lengths": np.array(lengths, np.int32)})
        split = split_of("train", shape)
        buckets.append(CaptionDataset("told", split, records, sides, about))
    return BucketedDataset("told", "train", tuple(buckets), shapes)
