"""Records of images with captions: how they are made, and how training reads them.

A record has the crop of its bucket, as pixels or as the posterior of an autoencoder, never
mirrored, for captions say left and right; the texts of its captions; and the text encoder's
features of their tokens, without padding. Without features, training makes them of the texts.
Each bucket is a split of its own, train_16x15.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import grain
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import Image

from lit_jax.data import digit_scenes
from lit_jax.data.buckets import MAX_RATIO, UNITS, Buckets, crop_to, shapes_of, split_of
from lit_jax.data.captions import CaptionedImages
from lit_jax.data.dataset import (
    PREPARED,
    Dataset,
    Reader,
    array_reader,
    channel_deviation,
    find_builder,
    first_line,
    records_of,
)
from lit_jax.data.raw_images import BrokenImageError, ImageSettings, decode, hash_of, upright_sides
from lit_jax.runtime import storage
from lit_jax.text import TextEncoder, TextSettings, Tokenizer, clean_prompt

Record = dict[str, Any]

# Records that `deviation` reads; with their captions they are large.
DEVIATION_RECORDS = 128

CAPTION_DTYPES = ("bfloat16", "int8")
# Captions that training cuts, and says so; --mode=prepare counts them all.
CUTS_SAID = 5

# From a record and the number of one of its captions to what a batch has of it.
ReadCaption = Callable[[Record, int], Record]


# ---- Sizes: which bucket an image is of ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Survey:
    """The size of each image, from its header, and why some are left out."""

    sizes: np.ndarray  # (N, 2) int32: height, width; (0, 0) for those in `broken` or `silent`
    broken: dict[str, str]  # {image: what is wrong with it}
    silent: int  # images without a caption

    def assign(self, buckets: Buckets) -> list[np.ndarray]:
        """The numbers of the images of each bucket, ascending."""
        chosen = np.full(len(self.sizes), -1)
        known = {}  # data sets have many images of the same size
        for index, (h, w) in enumerate(self.sizes.tolist()):
            if h and h <= MAX_RATIO * w:
                if (h, w) not in known:
                    known[h, w] = buckets.choose(h, w)
                chosen[index] = known[h, w]
        return [np.flatnonzero(chosen == bucket) for bucket in range(len(buckets.shapes))]

    def left_out(self) -> dict[str, int]:
        """{why: how many} of the images that are of no bucket."""
        h, w = self.sizes.T
        reasons = {
            "cannot be read": len(self.broken),
            "have no caption": self.silent,
            f"are taller than {MAX_RATIO} times their width": int((h > MAX_RATIO * w).sum()),
        }
        return {why: count for why, count in reasons.items() if count}

    def write(self, path: epath.Path, key: str) -> None:
        """Args: key: what the survey depends on."""
        file = io.BytesIO()
        # As text in the archive: NumPy would pickle an object.
        about = {"key": key, "broken": self.broken, "silent": self.silent}
        np.savez(file, sizes=self.sizes, about=np.array(json.dumps(about)))
        storage.replace_bytes(path, file.getvalue())

    @classmethod
    def read(cls, path: epath.Path, key: str) -> "Survey | None":
        """What `write` wrote; None: there is none, or one of other images."""
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:
                about = json.loads(str(file["about"]))
                if about["key"] != key:
                    return None
                return cls(file["sizes"], about["broken"], about["silent"])
        # A damaged file is made again.
        except Exception:
            return None


def survey_images(
    images: CaptionedImages,
    settings: ImageSettings,
    *,
    num_threads: int,
    skip_broken: int,
    advance: Callable[[int], None],
) -> Survey:
    """Reads the header and the captions of every image.

    Args: skip_broken: how many broken images may be left out.
    Raises: ValueError naming the first broken image above that.
    """

    def measure(index):
        try:
            file, captions = _open(images, index)
        except BrokenImageError as error:
            return {"broken": str(error), "name": error.name}
        with file:
            try:
                with Image.open(file) as image:
                    return {"sides": upright_sides(image, settings), "captions": len(captions)}
            except Exception as error:
                broken = _named(images, index, error)
                return {"broken": str(broken), "name": broken.name}

    # Of network disks: many small reads wait for each other's answers.
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=64)
    sizes = np.zeros((len(images), 2), np.int32)
    broken: dict[str, str] = {}
    silent = 0
    found = grain.MapDataset.source(range(len(images))).map(measure).to_iter_dataset(reading)
    for index, record in enumerate(found):
        if "broken" in record:
            broken[record["name"]] = record["broken"]
            check_broken(broken, skip_broken)
        elif not record["captions"]:
            silent += 1
        else:
            sizes[index] = record["sides"]
        advance(1)
    return Survey(sizes, broken, silent)


def check_broken(broken: Mapping[str, str], skip_broken: int) -> None:
    """Raises ValueError, naming the last image, where more are broken than may be left out."""
    if len(broken) > skip_broken:
        raise ValueError(
            f"skip_broken = {skip_broken} leaves out fewer images than are broken: "
            f"{list(broken.values())[-1]}"
        )


def _open(images, index):
    """The open file and the captions of an image. Raises: BrokenImageError; ValueError."""
    try:
        return images.read(index)
    except Exception as error:
        raise _named(images, index, error) from error


def _named(images: CaptionedImages, index: int, error: Exception) -> BrokenImageError:
    """The error of a broken image, with its name.

    Raises: ValueError for one of the disk: the image may be whole.
    """
    key = images.key(index)
    text = f"image {index} of {images.origin} cannot be read: {key}: {first_line(error)}"
    # A file that a list names and nobody has is as good as a broken one.
    if isinstance(error, OSError) and error.errno and not isinstance(error, FileNotFoundError):
        raise ValueError(text) from error
    # With its number: a list may name a file twice.
    return BrokenImageError(text, f"{index}: {key}")


@dataclasses.dataclass(frozen=True)
class BucketImages:
    """The images of one bucket, by number, cut when they are read.

    Record i is {"image" uint8 (h, w, channels), "captions" list of str, "height", "width" of the
    original, "id" str, "treated" list of str}.
    """

    images: CaptionedImages
    rows: np.ndarray  # the numbers of the bucket's images among all
    settings: ImageSettings  # its size is that of the bucket
    channels: int

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def split(self) -> str:
        return self.images.split

    @property
    def listing(self) -> str:
        return self.images.listing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Raises: BrokenImageError for an image that is no good, ValueError otherwise."""
        row = int(self.rows[index])
        file, captions = _open(self.images, row)
        with file:
            try:
                with Image.open(file) as image:
                    height, width = upright_sides(image, self.settings)
                    decoded, treated = decode(image, self.settings, self.channels)
                pixels = np.asarray(crop_to(decoded, self.settings.sides))
            except Exception as error:
                raise _named(self.images, row, error) from error
        return {
            "image": pixels.reshape(*self.settings.sides, self.channels),
            "captions": captions,
            "height": height,
            "width": width,
            "id": self.images.key(row),
            "treated": treated,
        }


# ---- Features ------------------------------------------------------------------------------------


def make_features(
    channels: int, encoded: bool, caption_width: int = 0, caption_dtype: str = "bfloat16"
) -> tfds.features.FeaturesDict:
    """What a record holds, whatever its bucket.

    Args:
      channels: of the pixels, or of the latents where they are `encoded`.
      caption_width: C of the text encoder; 0: of the captions, there are the texts alone.
      caption_dtype: one of CAPTION_DTYPES.
    """

    def tensor(*shape, dtype):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    features: dict[str, Any] = {}
    if encoded:
        features["mean"] = tensor(None, None, channels, dtype=np.float16)
        features["log_variance"] = tensor(None, None, channels, dtype=np.float16)
    else:
        features["image"] = tensor(None, None, channels, dtype=np.uint8)
    if caption_width:
        # NumPy has no bfloat16: its bits are stored as whole numbers.
        stored = np.uint16 if caption_dtype == "bfloat16" else np.int8
        features["caption_features"] = tensor(None, caption_width, dtype=stored)
        if caption_dtype == "int8":
            features["caption_scales"] = tensor(None, dtype=np.float32)
        features["caption_lengths"] = tensor(None, dtype=np.int32)
    features["captions"] = tfds.features.Sequence(tfds.features.Text())
    features["height"] = tfds.features.Scalar(np.int32)
    features["width"] = tfds.features.Scalar(np.int32)
    features["id"] = tfds.features.Text()
    return tfds.features.FeaturesDict(features)


def add_caption_features(
    records: list[Record], encoder: TextEncoder, caption_dtype: str
) -> list[Record]:
    """The records with the features of all their captions' tokens, one caption after another.

    Those of broken images stay as they are.
    """
    good = [record for record in records if "broken" not in record]
    prompts = [caption for record in good for caption in record["captions"]]
    if not prompts:
        return records
    features, mask, cut = encoder(prompts)
    lengths = mask.sum(axis=1, dtype=np.int32)
    start = 0
    for record in good:
        rows = slice(start, start + len(record["captions"]))
        start = rows.stop
        # Row by row of the mask: one caption's tokens stand behind the other's.
        record |= pack(features[rows][mask[rows]], caption_dtype)
        record["caption_lengths"] = lengths[rows]
        if not np.isfinite(features[rows].astype(np.float32)).all():
            raise ValueError(f"the features of the captions of {record['id']} are not finite")
        if cut[rows].any():
            most = encoder.settings.max_length
            record["treated"].append(f"with a caption that is cut to {most} tokens")
    return records


def count_cut_captions(
    records: list[Record], tokenizer: Tokenizer, settings: TextSettings
) -> list[Record]:
    """The records of texts as they are; those with a caption that training will cut say so."""
    for record in (record for record in records if "broken" not in record):
        cleaned = [clean_prompt(text, settings.cleaning) for text in record["captions"]]
        if tokenizer(cleaned, settings.max_length).cut.any():
            most = settings.max_length
            record["treated"].append(f"with a caption that training cuts to {most} tokens")
    return records


def pack(features: np.ndarray, dtype: str) -> Record:
    """The fields of features (n, C) in a record.

    int8: each token is divided by its own scale, the largest of its values by 127.
    """
    if dtype == "bfloat16":
        return {"caption_features": features.astype(ml_dtypes.bfloat16).view(np.uint16)}
    values = features.astype(np.float32)
    scales = np.abs(values).max(axis=1) / 127
    # A token of zeros has no scale.
    divisors = np.where(scales > 0, scales, 1)
    rounded = np.rint(values / divisors[:, None]).astype(np.int8)
    return {"caption_features": rounded, "caption_scales": scales}


def unpack(record: Mapping[str, Any], rows: slice) -> np.ndarray:
    """Some of the features that `pack` stored, (n, C) bfloat16."""
    stored = record["caption_features"][rows]
    if "caption_scales" not in record:
        return stored.view(ml_dtypes.bfloat16)
    values = stored * record["caption_scales"][rows, None]
    return values.astype(ml_dtypes.bfloat16)


# ---- Reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class CaptionDataset(Dataset):
    """The records of one bucket.

    {"mean", "log_variance" float16 (h, w, C) or "image" uint8 (h, w, C), "caption_features",
    "caption_lengths", "caption_scales" where there are such, "index"}; or, without features,
    "captions", texts. `choose_caption` makes the model's condition of them.
    """

    condition_fields = ("caption", "caption_mask")
    kind = "CaptionDataset"

    about: dict[str, Any]  # what prepared.json says

    @property
    def autoencoder(self) -> dict[str, Any] | None:
        """Of what encoded the images; None: they are pixels."""
        return self.about["autoencoder"]

    @property
    def text(self) -> dict[str, Any] | None:
        """What made the features, see `TextEncoder.identity`, with "width"; None: no features."""
        return self.about["text"]

    @property
    def scaling_factor(self) -> float:
        return self.autoencoder["scaling_factor"] if self.autoencoder else 1.0

    @property
    def shift_factor(self) -> float:
        return self.autoencoder["shift_factor"] if self.autoencoder else 0.0

    def readers(self) -> dict[str, Reader]:
        readers: dict[str, Reader] = {}
        if self.autoencoder:
            readers["mean"] = array_reader(np.float16, self.image_shape)
            readers["log_variance"] = array_reader(np.float16, self.image_shape)
        else:
            readers["image"] = array_reader(np.uint8, self.image_shape)
        if not self.text:
            return readers | {"captions": read_texts}
        readers["caption_features"] = np.asarray
        if self.about["caption_dtype"] == "int8":
            readers["caption_scales"] = np.asarray
        readers["caption_lengths"] = np.asarray
        return readers

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        if not self.text:
            return record
        lengths = record["caption_lengths"]
        shape = (int(lengths.sum()), self.text["width"])
        bad_length = lengths.min(initial=0) < 0 or lengths.max(initial=0) > self.text["max_length"]
        scales = record.get("caption_scales", np.zeros(shape[0]))
        # A slice beyond the end would be a shorter caption, without a word.
        if bad_length or record["caption_features"].shape != shape or len(scales) != shape[0]:
            raise ValueError(
                f"{self.name}: record {index} of split {self.split} has captions of "
                f"{lengths.tolist()[:8]} tokens, but features {record['caption_features'].shape}"
            )
        return record


@dataclasses.dataclass(frozen=True, repr=False)
class BucketedDataset:
    """Several buckets of images with captions, which is what training reads."""

    condition_fields = CaptionDataset.condition_fields

    name: str
    split: str
    buckets: tuple[CaptionDataset, ...]
    shapes: tuple[tuple[int, int], ...]  # of each, in sixteenths of the nominal size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the square bucket, whether it has images or not."""
        h, _, C = self.buckets[0].image_shape
        side = h * UNITS // self.shapes[0][0]
        return side, side, C

    @property
    def autoencoder(self) -> dict[str, Any] | None:
        return self.buckets[0].autoencoder

    @property
    def text(self) -> dict[str, Any] | None:
        return self.buckets[0].text

    @property
    def scaling_factor(self) -> float:
        return self.buckets[0].scaling_factor

    @property
    def shift_factor(self) -> float:
        return self.buckets[0].shift_factor

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def deviation(self) -> np.ndarray:
        """As `LatentDataset.deviation`, of some latents of the largest bucket."""
        bucket = max(self.buckets, key=len)
        records = [bucket[i] for i in range(min(DEVIATION_RECORDS, len(bucket)))]
        mean = np.stack([record["mean"] for record in records])  # (n, h, w, C)
        log_variance = np.stack([record["log_variance"] for record in records])
        return channel_deviation(mean, log_variance) * self.scaling_factor

    def fingerprint(self) -> str:
        """As `Dataset.fingerprint`, with the text encoder."""
        buckets = ", ".join(bucket.fingerprint() for bucket in self.buckets)
        if not self.text:
            return f"{buckets}, captions as texts"
        made_by = " ".join(str(self.text[name])[:12] for name in sorted(self.text))
        return f"{buckets}, captions by {made_by}"

    def content(self) -> str:
        """As `Dataset.content`."""
        return hash_of([bucket.content() for bucket in self.buckets])


def open_captions(name: str, directory: epath.PathLike, split: str) -> BucketedDataset:
    """Opens the buckets of a split that --mode=prepare wrote for captions, or the digit scenes.

    Raises: FileNotFoundError when the data set is not prepared there; ValueError when it has no
      captions or no such split, or was not prepared to its end.
    """
    if name == digit_scenes.NAME:
        return _open_scenes(split)
    builder = find_builder(name, directory)
    features = builder.info.features
    path = epath.Path(builder.data_dir) / PREPARED
    if "captions" not in features or not path.exists():
        raise ValueError(
            f"name = {name!r} has {', '.join(features)}; a model that is told captions needs "
            f"what --mode=prepare makes of images with captions"
        )
    about = json.loads(path.read_text())
    begun = shapes_of(split, about["splits"])
    if not begun:
        raise ValueError(
            f"split = {split!r} is none of {name}, whose splits are "
            f"{', '.join(about['splits'])}; name one without its bucket"
        )
    found = []
    for shape in begun:
        bucket = split_of(split, shape)
        if "shards" not in about["splits"][bucket]:
            raise ValueError(
                f"name = {name!r}: its split {bucket} is not finished; run the --mode=prepare "
                f"that writes it again, it goes on where it stopped"
            )
        records = records_of(builder, bucket)
        picture = np.asarray(records[0]["mean" if about["autoencoder"] else "image"])
        h, w, _ = picture.shape
        if h * shape[1] != w * shape[0] or h * UNITS % shape[0]:
            raise ValueError(f"name = {name!r}: {bucket} holds pictures of {picture.shape}")
        found.append(CaptionDataset(name, bucket, records, picture.shape, about))
    return BucketedDataset(name, split, tuple(found), tuple(begun))


def _open_scenes(split):
    scenes = digit_scenes.Scenes(split)
    shape = (digit_scenes.SIDE, digit_scenes.SIDE, 3)
    about = {"autoencoder": None, "text": None}
    bucket = CaptionDataset(digit_scenes.NAME, split, scenes, shape, about)
    return BucketedDataset(digit_scenes.NAME, split, (bucket,), ((UNITS, UNITS),))


def read_texts(value: Any) -> np.ndarray:
    """The captions of a record, which are one at least."""
    texts = [text.decode() if isinstance(text, bytes) else str(text) for text in value]
    if not texts:
        raise ValueError("it has no captions")
    return np.array(texts)


# ---- Captions in training ------------------------------------------------------------------------


def choose_caption(
    record: Record, rng: np.random.Generator, *, ratio: float, read: ReadCaption
) -> Record:
    """A record with one of its captions.

    Args:
      ratio: the probability of the first caption; the others share the rest.
      read: `stored_caption` or `tokens_of_caption`.
    Returns: the picture, "index", and what `read` gives.
    """
    captions = record["captions"] if "captions" in record else record["caption_lengths"]
    which = 0
    if len(captions) > 1 and rng.random() >= ratio:
        which = int(rng.integers(1, len(captions)))
    picture = {name: x for name, x in record.items() if not name.startswith("caption")}
    return picture | read(record, which)


def stored_caption(record: Record, which: int, *, max_length: int) -> Record:
    """The stored features of a caption, padded to S = max_length tokens.

    Returns: {"caption" (S, C) bfloat16, "caption_mask" (S,) bool}.
    """
    lengths = record["caption_lengths"]
    start = int(lengths[:which].sum())
    tokens = unpack(record, slice(start, start + int(lengths[which])))
    caption = np.zeros((max_length, tokens.shape[1]), tokens.dtype)
    caption[: len(tokens)] = tokens
    return {"caption": caption, "caption_mask": np.arange(max_length) < len(tokens)}


def tokens_of_caption(
    record: Record, which: int, *, tokenizer: Tokenizer, settings: TextSettings
) -> Record:
    """The tokens of a caption, which become features on the devices.

    Returns: {"caption_ids" (S,) int32, "caption_mask" (S,) bool}, S of the settings.
    """
    cleaned = clean_prompt(str(record["captions"][which]), settings.cleaning)
    ids, mask, cut = tokenizer([cleaned], settings.max_length)
    if cut[0]:
        logging.log_first_n(
            logging.WARNING,
            "the last %d tokens of a caption are cut, text.max_length is %d: %.60s... (said of the "
            "first %d)",
            CUTS_SAID,
            cut[0],
            settings.max_length,
            cleaned,
            CUTS_SAID,
        )
    return {"caption_ids": ids[0], "caption_mask": mask[0]}
