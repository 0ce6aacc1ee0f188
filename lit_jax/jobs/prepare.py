"""Writes the data set that training reads: cropped images or their latents, and their conditions.

Any TFDS image data set or folder of class folders becomes a TFDS data set of ArrayRecord
shards, without TensorFlow: posterior mean and log-variance of each image and of its
mirror, float16 and unscaled, or the cropped pixels when no autoencoder is configured.
For a model that is told captions, images go into aspect buckets, each a split, without
mirrors and with the text encoder's features.
Records keep the order of the images. An interrupted run goes on where it stopped.
"""

import dataclasses
import functools
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorflow_datasets.proto import tf_example_pb2

from lit_jax import conditions, sampling, sharding
from lit_jax.data import caption_records, teacher_images
from lit_jax.data.buckets import Buckets, name_of, split_of
from lit_jax.data.caption_records import (
    BucketImages,
    Survey,
    add_caption_features,
    check_broken,
    count_cut_captions,
    survey_images,
)
from lit_jax.data.captions import CaptionedImages, is_list, open_captioned
from lit_jax.data.dataset import PREPARED
from lit_jax.data.encoding import Encode, Record, encode_batches, make_encoder, make_features
from lit_jax.data.raw_images import (
    BrokenImageError,
    ImageSettings,
    RawImages,
    find_folder,
    open_images,
    own_pixel_limit,
)
from lit_jax.data.shards import VERSION, Shards, finish_splits, read_about, write_about
from lit_jax.experiment import Experiment
from lit_jax.runtime import storage, workdir_lock
from lit_jax.runtime.progress import progress
from lit_jax.settings import naming

Images = RawImages | BucketImages | teacher_images.TeacherImages

# What folders did that were begun before these were fields.
BEFORE = {"background": "", "exif_orientation": False}


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Prepares split data.split of data.name in data.dir; the workdir is not used.

    Processes share the folder: shard s is written by process s modulo their number, and
    process 0 writes the metadata.

    Raises: ValueError or FileNotFoundError for images that cannot be read, for a folder
      that holds another preparation, and when a finished shard is not what was written.
    """
    # ---- What is asked for -----------------------------------------------------------------------
    experiment = Experiment(config)
    prepare = config.prepare
    target = config.data
    check_target(config)

    # ---- Images and models -----------------------------------------------------------------------
    # Each process encodes its shards alone, whatever mesh the config has for training.
    local = jax.local_devices()
    shared_by = config.mesh.fsdp if config.mesh.fsdp > 0 else len(local)
    experiment.mesh = sharding.make_mesh(-1, math.gcd(shared_by, len(local)), local)
    # The batch is a process's own: bits of what a network computes follow the size of its batch,
    # and more processes must write the same bytes.
    with naming("prepare"):
        sharding.check_batch(prepare.batch_size, experiment.mesh)
    folder = epath.Path(target.dir) / target.name / VERSION
    # Beside the folder, which TFDS reads: another split may be prepared in it.
    place = folder.parent
    if prepare.source == teacher_images.SOURCE:
        plan = plan_teacher(experiment)
    elif experiment.is_told_captions:
        plan = plan_captions(experiment, place)
    else:
        plan = plan_classes(experiment)

    # ---- The folder: new, or of an interrupted run -----------------------------------------------
    splits = {
        Shards(
            folder=folder,
            name=target.name,
            split=split,
            num_records=len(images),
            size=prepare.shard_records,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ): images
        for split, images in plan.splits.items()
    }
    with workdir_lock.lock_folder(place, f"the data set {place}", "another data.name"):
        for shards, images in splits.items():
            enter_folder(shards, images, plan.about)

        # ---- The shards of this process that are missing -----------------------------------------
        broken = dict(plan.broken)
        written = 0
        start = time.monotonic(), time.process_time()
        for shards, images in splits.items():
            written += write_shards(
                shards,
                images,
                plan.features,
                plan.encode,
                batch_size=prepare.batch_size,
                num_threads=target.num_threads,
                skip_broken=prepare.skip_broken,
                also_broken=frozenset(broken),
                add=plan.add,
            )
            broken |= shards.skipped()
        if written:
            seconds = time.monotonic() - start[0]
            core_seconds = time.process_time() - start[1]
            logging.info(
                "this process wrote %d records: %.2f a second, %.2f a core second",
                written,
                written / seconds,
                written / core_seconds,
            )

        # ---- All shards, read back and described -------------------------------------------------
        for shards in splits:
            shards.verify()
        multihost_utils.sync_global_devices("shards verified")
        # Each process counted its own.
        for shards in splits:
            broken |= shards.skipped()
        if len(broken) > prepare.skip_broken:
            raise ValueError(
                f"{len(broken)} images cannot be read, prepare.skip_broken = "
                f"{prepare.skip_broken}; the first: {next(iter(broken.values()))}"
            )
        if jax.process_index() == 0:
            finish_splits(list(splits), plan.features, plan.about)
            logging.info(
                "%s: %d records of %s in %d verified shards; train on it with data.name=%s",
                folder,
                sum(map(len, splits.values())) + len(plan.broken) - len(broken),
                prepare.source,
                sum(shards.count for shards in splits),
                target.name,
            )
            for why, count in plan.left_out.items():
                logging.warning("%d images %s and are left out", count, why)
            for text in plan.broken.values():
                logging.warning("%s", text)
            if count := len(broken) - len(plan.broken):
                text = "%d images cannot be read and are left out; %s names them"
                logging.warning(text, count, folder / PREPARED)
        # No process ends, and no training begins, before the metadata is there.
        multihost_utils.sync_global_devices("prepared")


# ---- What is prepared ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """The images of each split that is written, and what is made of them."""

    splits: Mapping[str, Images]
    features: tfds.features.FeaturesDict  # of a record
    encode: Encode
    about: dict[str, Any]  # by the keys of prepared.json, which folders that are there have
    add: Callable[[list[Record]], list[Record]] = lambda records: records
    # Images of no split: {name: what is wrong with it}, and {why: how many} of them all.
    broken: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


def image_settings(experiment: Experiment) -> ImageSettings:
    """How a file becomes pixels: with as many channels as the autoencoder takes."""
    autoencoder = experiment.autoencoder
    channels = autoencoder.module.in_channels if autoencoder else 0
    return dataclasses.replace(experiment.image_settings, channels=channels)


def directory_field(config: ConfigDict) -> str:
    """The field that says where prepare.source is looked for."""
    return "prepare.dir" if config.prepare.dir else "data.dir"


def plan_classes(experiment: Experiment) -> Plan:
    """Images with labels, one square or rectangle for all."""
    config = experiment.config
    prepare = config.prepare
    target = config.data
    autoencoder = experiment.autoencoder
    settings = image_settings(experiment)
    with naming("prepare", name="prepare.source", directory=directory_field(config)):
        images = open_images(
            prepare.source,
            prepare.dir or target.dir,
            prepare.split or target.split,
            settings,
            classes=conditions.count_classes(experiment.model_config),
        )
    factor = autoencoder.module.factor if autoencoder else 1
    if any(side % factor for side in settings.sides):
        raise ValueError(
            f"prepare.image_size = {settings.size} is not a multiple of the "
            f"{factor} pixels of a latent of "
            f"autoencoder.checkpoint = {config.autoencoder.checkpoint}"
        )
    return Plan(
        splits={target.split: images},
        features=make_features(images, autoencoder),
        encode=make_encoder(autoencoder, experiment.mesh),
        about={"crop": "adm", **images.about(), "autoencoder": experiment.autoencoder_identity},
    )


def plan_teacher(experiment: Experiment) -> Plan:
    """Images that the teacher draws, as many as sample.num_images, as config.sample says."""
    config = experiment.config
    if experiment.is_told_captions:
        raise ValueError(
            f"prepare.source = teacher draws images of classes, but model.family = "
            f"{config.model.family} is told captions; name images with captions"
        )
    if not config.teacher.checkpoint:
        raise ValueError(
            "prepare.source = teacher, but teacher.checkpoint is empty; name the model whose "
            "images are written"
        )
    checkpoint = experiment.teacher_checkpoint
    teacher = experiment.teacher
    assert checkpoint is not None and teacher is not None
    names = checkpoint.class_names
    index = np.arange(config.sample.num_images)
    labels = experiment.conditions(index, experiment.labels(names))["label"]
    autoencoder = experiment.autoencoder
    h, w = experiment.sample_size
    factor = experiment.autoencoder_factor
    sampler = experiment.sampler(teacher, config.prepare.batch_size)
    images = teacher_images.TeacherImages(
        np.asarray(labels),
        conditions.count_classes(experiment.model_config),
        names or None,
        settings=dataclasses.replace(experiment.image_settings, size=(h * factor, w * factor)),
        channels=autoencoder.module.in_channels if autoencoder else teacher.config.in_channels,
        protocol=sampling.protocol(
            experiment.sampler_settings,
            input_size=experiment.sample_size,
            seed=config.seed,
            dtype=config.teacher.dtype,
            weights=checkpoint.report.checksum,
            autoencoder=experiment.autoencoder_identity,
            labels=str(config.sample.labels),
        ),
    )
    encode = make_encoder(autoencoder, experiment.mesh, batch_size=config.prepare.batch_size)
    params = experiment.load_teacher()
    return Plan(
        splits={config.data.split: images},
        features=make_features(images, autoencoder),
        encode=teacher_images.make_drawer(sampler, params, images.labels, encode),
        about={"crop": "none", **images.about(), "autoencoder": experiment.autoencoder_identity},
    )


def plan_captions(experiment: Experiment, folder: epath.Path) -> Plan:
    """Images with captions, a split for each aspect bucket that has images.

    Args: folder: where the sizes of the images are kept for an interrupted run.
    """
    config = experiment.config
    prepare = config.prepare
    target = config.data
    model = experiment.model_config

    # ---- Buckets, images, autoencoder, text encoder ----------------------------------------------
    settings = image_settings(experiment)
    with naming("prepare", size="prepare.image_size", names="prepare.buckets"):
        nominal: Any = settings.size  # of the square; two sides are refused
        buckets = Buckets(nominal, tuple(prepare.buckets))
    with naming("prepare", name="prepare.source", directory=directory_field(config)):
        # Paths of a list start beside it, unless the user says where.
        directory = prepare.dir or ("" if is_list(prepare.source) else target.dir)
        images = open_captioned(prepare.source, directory, prepare.split or target.split)
    autoencoder = experiment.autoencoder
    # A token of the model is a patch of latents.
    multiple = model.patch_size * (autoencoder.module.factor if autoencoder else 1)
    for bucket, shape in enumerate(buckets.shapes):
        if any(side % multiple for side in buckets.sides(bucket)):
            raise ValueError(
                f"prepare.image_size = {settings.size} makes pictures of "
                f"{buckets.sides(bucket)} pixels in the bucket {name_of(shape)}, which are no "
                f"multiples of the {multiple} pixels of a token"
            )
    encoder = experiment.load_text_encoder() if prepare.captions == "features" else None

    # ---- The sizes of the images, and their buckets ----------------------------------------------
    survey = read_sizes(experiment, images, settings, folder)
    splits = {}
    for bucket, rows in enumerate(survey.assign(buckets)):
        if len(rows):
            cut = dataclasses.replace(settings, size=buckets.sides(bucket))
            split = split_of(target.split, buckets.shapes[bucket])
            splits[split] = BucketImages(images, rows, cut, settings.channels or 3)
    left_out = {**images.left_out, **survey.left_out()}
    if not splits:
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise ValueError(f"prepare.source = {prepare.source} leaves no image: {reasons}")

    channels = autoencoder.module.latent_channels if autoencoder else settings.channels or 3
    add: Callable[[list[Record]], list[Record]]
    if encoder:
        add = functools.partial(
            add_caption_features, encoder=encoder, caption_dtype=prepare.caption_dtype
        )
    elif config.text.tokenizer or config.text.checkpoint:
        add = functools.partial(
            count_cut_captions, tokenizer=experiment.tokenizer, settings=experiment.text_settings
        )
    else:  # nobody knows yet what a token is
        add = list
    return Plan(
        splits=splits,
        features=caption_records.make_features(
            channels,
            autoencoder is not None,
            encoder.config.width if encoder else 0,
            prepare.caption_dtype,
        ),
        # Each bucket compiles a program, and must not compile one more for its last batch.
        encode=make_encoder(
            autoencoder,
            experiment.mesh,
            mirrored=False,
            batch_size=prepare.batch_size,
        ),
        add=add,
        about={
            "crop": "bucket",
            "image_size": buckets.size,
            "buckets": list(buckets.names),
            "background": settings.background,
            "exif_orientation": settings.exif_orientation,
            "autoencoder": experiment.autoencoder_identity,
            "text": encoder
            and encoder.identity() | {"dtype": config.text.dtype, "width": encoder.config.width},
            "caption_dtype": prepare.caption_dtype,
        },
        broken=survey.broken,
        left_out=left_out,
    )


def read_sizes(
    experiment: Experiment, images: CaptionedImages, settings: ImageSettings, folder: epath.Path
) -> Survey:
    """The sizes of all images; process 0 reads them, once, into a file of the folder."""
    config = experiment.config
    path = folder / f"sizes-{config.data.split}.npz"
    key = f"{images.listing} {len(images)} {settings.exif_orientation}"
    if jax.process_index() == 0 and Survey.read(path, key) is None:
        with own_pixel_limit(), progress("reading sizes of", len(images)) as advance:
            with naming("prepare"):
                survey = survey_images(
                    images,
                    settings,
                    num_threads=config.data.num_threads,
                    skip_broken=config.prepare.skip_broken,
                    advance=advance,
                )
        folder.mkdir(parents=True, exist_ok=True)
        survey.write(path, key)
    multihost_utils.sync_global_devices("sizes read")
    found = Survey.read(path, key)
    if found is None:
        raise ValueError(f"{path} is missing; do all processes see the same folder?")
    with naming("prepare"):
        # An earlier run, which read them, may have left out more.
        check_broken(found.broken, config.prepare.skip_broken)
    return found


# ---- What is refused before anything is read -----------------------------------------------------


def check_target(config: ConfigDict) -> None:
    """Raises ValueError for a data set that cannot be written, or not be opened later."""
    prepare = config.prepare
    target = config.data
    if storage.is_object_store(target.dir):
        raise ValueError(
            f"data.dir = {target.dir} is no local folder, and ArrayRecord files are written "
            f"to local folders only; prepare into one and copy it there, training reads gs://"
        )
    name_is_good = re.fullmatch(r"[a-z][a-z0-9_]*", target.name)
    split_is_good = re.fullmatch(r"[a-z]\w*", target.split)
    if not name_is_good or not split_is_good:
        raise ValueError(
            f"data.name = {target.name!r} and data.split = {target.split!r} name what is "
            f"written: letters, digits and _ only, a lower-case letter first"
        )
    # realpath: a link to data.dir is the same folder.
    same_folder = os.path.realpath(prepare.dir or target.dir) == os.path.realpath(target.dir)
    if prepare.source == target.name and same_folder:
        raise ValueError(
            f"data.name = {target.name} is what is written, and also prepare.source; give "
            f"it another name"
        )
    check_name(target.name, epath.Path(target.dir))
    if "/" in prepare.source:
        storage.user_path(prepare.source, "prepare.source")
    if prepare.split:
        is_file = is_list(prepare.source) or prepare.source.endswith(".tar")
        with naming("prepare", name="prepare.source", directory=directory_field(config)):
            if is_file or find_folder(prepare.source, prepare.dir or target.dir) is not None:
                raise ValueError(
                    f"prepare.split = {prepare.split} is of TFDS data sets; prepare.source = "
                    f"{prepare.source} is {'a file' if is_file else 'an image folder'}, all of "
                    f"which becomes data.split = {target.split}"
                )


def check_name(name: str, directory: epath.Path) -> None:
    """Raises ValueError where TFDS would open another data set by the name to be written."""
    try:
        tfds.builder_cls(name)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    else:
        raise ValueError(
            f"data.name = {name} is the name of a data set of TFDS itself, which training "
            f"would look for instead; give it another name, {name}_prepared for instance"
        )

    # TFDS opens the highest version that it finds.
    versions = [path.name for path in (directory / name).glob("*") if path.is_dir()]
    others = sorted(version for version in versions if version != VERSION)
    if others:
        raise ValueError(
            f"data.name = {name}: {directory / name} holds {', '.join(others[:3])} beside "
            f"the version {VERSION} that is written, and training could open another; "
            f"use another data.name"
        )


# ---- What goes into the folder -------------------------------------------------------------------


def enter_folder(shards: Shards, images: Images, about: dict[str, Any]) -> None:
    """Notes in the folder what is prepared there, or checks it against an earlier note.

    Args: about: what is true of all splits of the data set.
    Raises: ValueError naming the first difference.
    """
    plan = {
        "source": images.name,
        "source_split": images.split,
        "source_list": images.listing,
        "records": len(images),
        "shard_records": shards.size,
    }
    folder = shards.folder
    found = read_about(folder)
    # A run that was killed in its first moment leaves half of the note.
    used = folder.exists() and any(path.suffix != ".part" for path in folder.iterdir())
    # Every process must have read the folder before process 0 writes there.
    multihost_utils.sync_global_devices("folder read")

    if found:
        before = {**BEFORE, **found, **found["splits"].get(shards.split, plan)}
        # Through JSON, as what was found: tuples are lists there.
        for name, value in json.loads(json.dumps(about | plan)).items():
            if before.get(name) != value:
                text = f"{name} = {before.get(name)}, this run has {value}"
                if name == "class_names":  # of which the folder keeps a checksum
                    few = ", ".join((getattr(images, "class_names", None) or ("none",))[:10])
                    text = f"other class names than those of this run, which are {few}"
                raise ValueError(
                    f"{folder} was begun with {text}; use another data.name or remove the folder"
                )
    elif used:
        raise ValueError(f"{folder} holds files but no {PREPARED}; use another data.name")

    splits = found.get("splits", {})
    # The source of a folder's first split, where each split has not its own.
    about = found | about
    if jax.process_index() == 0 and shards.split not in splits:
        folder.mkdir(parents=True, exist_ok=True)
        write_about(folder, about | {"splits": splits | {shards.split: plan}})
    multihost_utils.sync_global_devices("folder entered")


def write_shards(
    shards: Shards,
    images: Images,
    features: tfds.features.FeaturesDict,
    encode: Encode,
    *,
    batch_size: int,
    num_threads: int,
    skip_broken: int = 0,
    also_broken: frozenset[str] = frozenset(),
    add: Callable[[list[Record]], list[Record]] = lambda records: records,
) -> int:
    """Writes what is missing of this process's shards.

    Args:
      features: what a record holds.
      encode: makes their arrays of the images.
      batch_size: images encoded at once.
      num_threads: that read and crop images.
      skip_broken: how many broken images may be left out.
      also_broken: those of other splits, which count too.
      add: gives encoded records what is not of their pixels.
    Returns: how many images that were.
    Raises: ValueError naming the first broken image above that.
    """
    finished = shards.finished()
    tally = Tally(skip_broken, {*also_broken, *shards.skipped()})
    missing = [shard for shard in shards.mine if shard not in finished]
    if len(missing) < len(shards.mine):
        there = len(shards.mine) - len(missing)
        logging.info("%d of %d shards are there already", there, len(shards.mine))

    rows = [row for shard in missing for row in shards.rows(shard)]
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * batch_size)
    read = functools.partial(read_image, images)
    reader = grain.MapDataset.source(rows).map(read).to_iter_dataset(reading)
    # No batch has images of two shards: what a shard holds must not depend on where an
    # earlier run stopped.
    sizes = [
        len(shards.rows(shard)[start : start + batch_size])
        for shard in missing
        for start in range(0, len(shards.rows(shard)), batch_size)
    ]
    batches = map(add, encode_batches(iter(reader), sizes, encode))

    total = sum(len(shards.rows(shard)) for shard in shards.mine)
    # Images are held to prepare.max_pixels.
    bar = progress("preparing", total, total - len(rows))
    with own_pixel_limit(), bar as advance:
        for shard in missing:
            tally.skipped = {}
            count = len(shards.rows(shard))
            records = serialize(batches, count, features, advance, tally)
            shards.write(shard, records, tally.skipped)
    for words, count in sorted(tally.treated.items()):
        logging.info("%d images are %s", count, words)
    return len(rows)


@dataclasses.dataclass
class Tally:
    """What becomes of images besides the crop."""

    most: int  # broken images that may be left out
    names: set[str]  # of those that were
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # of this shard
    treated: Counter[str] = dataclasses.field(default_factory=Counter)

    def takes(self, record: dict[str, Any]) -> bool:
        """Notes a record; whether it is one of an image that is no broken one.

        Raises: ValueError for a broken image above the limit.
        """
        if "broken" not in record:
            self.treated.update(record.pop("treated"))
            return True
        self.names.add(record["name"])
        if len(self.names) > self.most:
            raise ValueError(
                f"{record['broken']}; prepare.skip_broken = {self.most}: a larger number "
                f"leaves out so many broken images"
            )
        self.skipped[record["name"]] = record["broken"]
        return False


def read_image(images: Images, index: int) -> dict[str, Any]:
    """Record `index`; of a broken image {"broken": what is wrong, "name": of which}."""
    try:
        return images[index]
    except BrokenImageError as error:
        return {"broken": str(error), "name": error.name}


def serialize(
    batches: Iterator[list[dict[str, Any]]],
    count: int,
    features: tfds.features.FeaturesDict,
    advance: Callable[[int], None],
    tally: Tally,
) -> Iterator[bytes]:
    """The records of the next `count` images as tf.train.Example messages.

    Tells `advance` of each batch, and `tally` of each image.
    """
    while count:
        batch = next(batches)
        for record in filter(tally.takes, batch):
            # Once more, with its fields in order, which TFDS leaves open: the same records
            # must make the same bytes, on every process and in every run.
            example = tf_example_pb2.Example.FromString(features.serialize_example(record))
            yield example.SerializeToString(deterministic=True)
        count -= len(batch)
        advance(len(batch))
