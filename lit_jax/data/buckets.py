"""Aspect buckets: the few shapes to which images of any shape are cut.

A batch has one shape, so all its images are of one bucket. The table is PixArt-Sigma's
(arXiv 2403.04692), of one area at every size.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lit_jax import ranges
from lit_jax.data.raw_images import resize
from lit_jax.ranges import Range

# Sides are counted in sixteenths of the nominal size: 64 pixels at 1024.
UNITS = 16
# Heights from the widest to the tallest, each with its widths.
_ROWS = (
    (8, (32, 31, 30, 29)),
    (9, (28, 27, 26)),
    (10, (25, 24)),
    (11, (23, 22, 21)),
    (12, (21, 20)),
    (13, (19, 18)),
    (14, (18, 17)),
    (15, (17, 16)),
    (16, (16, 15)),
    (17, (15, 14)),
    (18, (14, 13)),
    (19, (13,)),
    (20, (12,)),
    (21, (12,)),
    (22, (11,)),
    (23, (11,)),
    (24, (10,)),
    (25, (10,)),
    (26, (9,)),
    (27, (9,)),
    (28, (9,)),
    (29, (8,)),
    (30, (8,)),
    (31, (8,)),
    (32, (8,)),
)
TABLE = tuple((h, w) for h, widths in _ROWS for w in widths)
# Taller images are left out, as in PixArt-Sigma. Wide ones are not: it takes them all.
MAX_RATIO = 4.5

ALL = "all"


def _are_names(names) -> bool:
    if not isinstance(names, tuple | list) or not names:
        return False
    known = {name_of(shape) for shape in TABLE}
    return tuple(names) == (ALL,) or (set(names) <= known and len(set(names)) == len(names))


NAMES = Range("('all',), or names of different buckets such as ('16x16', '8x32')", _are_names)
NOMINAL = Range(
    f"a side in pixels that {UNITS} divides",
    lambda size: isinstance(size, int) and ranges.SIDES.holds(size) and size % UNITS == 0,
)


def name_of(shape: tuple[int, int]) -> str:
    """16x15 for (16, 15)."""
    return "{}x{}".format(*shape)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Some or all buckets of the table, at one size.

    Raises: ValueError whose text starts with the field's name.
    """

    size: int  # nominal: the side of the square bucket in pixels
    names: tuple[str, ...] = (ALL,)  # of those there are; ("all",): the whole table

    def __post_init__(self):
        ranges.check(self, size=NOMINAL, names=NAMES)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket in sixteenths of the size, in the table's order."""
        if tuple(self.names) == (ALL,):
            return TABLE
        return tuple(shape for shape in TABLE if name_of(shape) in self.names)

    def sides(self, bucket: int) -> tuple[int, int]:
        """(height, width) of bucket number `bucket` in pixels."""
        h, w = self.shapes[bucket]
        unit = self.size // UNITS
        return h * unit, w * unit

    def choose(self, height: int, width: int) -> int:
        """The number of the bucket whose aspect is nearest to that of an image."""
        # PixArt compares with aspects of two decimals, and takes the first of equals.
        keys = [round(h / w, 2) for h, w in self.shapes]
        distances = [abs(key - height / width) for key in keys]
        return distances.index(min(distances))


def crop_to(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """The middle of an image in (height, width) pixels, never stretched.

    It is scaled by bicubic interpolation until it covers them, and cut. Smaller images are
    enlarged.
    """
    h, w = sides
    # In whole numbers: a side that is rounded down by a pixel would not cover the crop.
    if h * image.width > w * image.height:
        image = resize(image, image.width * h // image.height, h, Image.Resampling.BICUBIC)
    else:
        image = resize(image, w, image.height * w // image.width, Image.Resampling.BICUBIC)
    left = (image.width - w) // 2
    top = (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


# ---- Order in training ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BucketOrder:
    """Which bucket the batch of a step is of, and which of the bucket's batches it is.

    It depends on the seed and the step alone. The records of a bucket are a stream of their own,
    without an end. An epoch takes from each stream the whole batches that its records fill; what
    is left over goes first in the next epoch. So after e epochs a bucket of n records has given
    floor(e * n / batch_size) batches: no record is left out, and none is seen more often than
    others. The batches of an epoch are in random order.
    """

    counts: tuple[int, ...]  # records of each bucket
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[int, int]:
        """(bucket, number of the batch in the stream of the bucket) of a step, from 0 on."""
        return _batch(self, step)

    def batches_before(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before an epoch."""
        return [epoch * count // self.batch_size for count in self.counts]

    def steps_before(self, epoch: int) -> int:
        """How many batches come before an epoch."""
        return sum(self.batches_before(epoch))


# Every row of a batch asks, and rows of several batches are read at once.
@functools.lru_cache(maxsize=4096)
def _batch(order: BucketOrder, step: int) -> tuple[int, int]:
    # After so many epochs the step is over: each bucket is behind by less than a batch.
    many = (step + 1 + len(order.counts)) * order.batch_size // sum(order.counts) + 1
    epoch = bisect.bisect_right(range(many + 1), step, key=order.steps_before) - 1
    buckets, numbers = _epoch(order, epoch)
    place = step - order.steps_before(epoch)
    return int(buckets[place]), int(numbers[place])


# Readers ahead of the step may be in the next epoch already.
@functools.lru_cache(maxsize=4)
def _epoch(order: BucketOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of an epoch's steps, and the numbers of their batches."""
    first = np.array(order.batches_before(epoch))
    counts = np.array(order.batches_before(epoch + 1)) - first
    buckets = np.repeat(np.arange(len(counts)), counts)
    # NumPy promises the raw bits of a generator for good, but not the order of a shuffle.
    bits = np.random.Philox(np.random.SeedSequence((order.seed, epoch)))
    buckets = buckets[np.argsort(bits.random_raw(len(buckets)), kind="stable")]

    numbers = np.empty_like(buckets)
    for bucket, start in enumerate(first):
        places = np.flatnonzero(buckets == bucket)
        numbers[places] = start + np.arange(len(places))
    return buckets, numbers


def stream_seeds(seed: int, count: int) -> list[int]:
    """A seed for the shuffling of each bucket."""
    return [int(np.random.SeedSequence((seed, b)).generate_state(1)[0]) for b in range(count)]


# ---- Splits --------------------------------------------------------------------------------------


def split_of(split: str, shape: tuple[int, int]) -> str:
    """The split of a data set that holds a bucket: train_16x15."""
    return f"{split}_{name_of(shape)}"


def shapes_of(split: str, splits: Sequence[str]) -> list[tuple[int, int]]:
    """The buckets of `split` among the splits of a data set, in the table's order."""
    found = [re.fullmatch(rf"{re.escape(split)}_(\d+x\d+)", name) for name in splits]
    names = {match[1] for match in found if match}
    return [shape for shape in TABLE if name_of(shape) in names]
