"""Aspect buckets: the table, the choice, the crop, and the order of the batches."""

from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
from PIL import Image

from lit_jax.data.buckets import (
    TABLE,
    BucketOrder,
    Buckets,
    crop_to,
    name_of,
    shapes_of,
    split_of,
    stream_seeds,
)

# ---- The table, and the choice -------------------------------------------------------------------


def keys(shapes):
    """PixArt's names of the buckets: height over width with two decimals."""
    cent = Decimal("0.01")
    return [(Decimal(h) / Decimal(w)).quantize(cent, ROUND_HALF_EVEN) for h, w in shapes]


def test_the_table_has_40_aspects_of_about_one_area():
    assert len(TABLE) == len(set(TABLE)) == 40
    assert TABLE[0] == (8, 32) and TABLE[20] == (16, 16) and TABLE[-1] == (32, 8)
    assert keys(TABLE) == sorted(set(keys(TABLE)))
    # Tokens at 512 pixels: a sixteenth of the size is two of them wide.
    tokens = [4 * h * w for h, w in TABLE]
    assert (min(tokens), max(tokens)) == (924, 1024)


@pytest.mark.parametrize("names", [("all",), ("8x32", "16x16", "17x15", "32x8")])
def test_the_choice_is_the_nearest_key_and_the_first_of_two(names):
    buckets = Buckets(512, names)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 3000, (300, 2)).tolist(), *TABLE, (1000, 1)]
    for height, width in sizes:
        aspect = Decimal(height) / Decimal(width)
        distances = [abs(key - aspect) for key in keys(buckets.shapes)]
        assert buckets.choose(height, width) == distances.index(min(distances)), (height, width)
    # Midway between two keys: the wider one.
    assert name_of(Buckets(512, ("16x16", "32x8")).shapes[0]) == "16x16"
    assert Buckets(512, ("16x16", "32x8")).choose(250, 100) == 0


def test_sides_follow_the_size_and_the_order_is_the_tables():
    buckets = Buckets(1024, ("32x8", "16x16"))
    assert buckets.shapes == ((16, 16), (32, 8))
    assert [buckets.sides(b) for b in range(2)] == [(1024, 1024), (2048, 512)]


@pytest.mark.parametrize(
    "fields, message",
    [
        ((520, ("all",)), "^size must be a side in pixels that 16 divides; got 520"),
        (((512, 256), ("all",)), "^size must be"),
        ((512, ()), r"^names must be \('all',\), or names of different buckets"),
        ((512, ("16x16", "16x16")), "^names must be"),
        ((512, ("all", "16x16")), "^names must be"),
        ((512, ("10x10",)), "^names must be"),
        ((512, "16x16"), "^names must be"),
    ],
)
def test_what_no_buckets_are(fields, message):
    with pytest.raises(ValueError, match=message):
        Buckets(*fields)


def test_splits_are_named_by_their_buckets():
    assert split_of("train", (16, 15)) == "train_16x15"
    splits = ["train_32x8", "train_16x16", "train_9x9", "test_8x32", "train", "my_train_8x32"]
    assert shapes_of("train", splits) == [(16, 16), (32, 8)]


# ---- The crop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (33, 200), (7, 5), (64, 64), (37, 41)])
@pytest.mark.parametrize("sides", [(16, 64), (32, 32), (64, 16)])
def test_the_crop_is_filled_and_nothing_is_stretched(size, sides):
    """The image is a plane: its slopes in the crop are the scale, along both axes."""
    height, width = size
    h, w = sides
    scale = max(h / height, w / width)
    # Grey levels that the crop keeps apart, small enough for 8 bits.
    rows, columns = np.indices(size)
    for values, axis in ((rows, 0), (columns, 1)):
        step = 250 / max(values.max(), 1)
        image = Image.fromarray(np.rint(step * values).astype(np.uint8))
        crop = np.asarray(crop_to(image, sides), float)
        assert crop.shape == sides
        # Away from the edges, which the filter sees double.
        inner = crop[h // 4 : h - h // 4, w // 4 : w - w // 4]
        slope = np.gradient(inner, axis=axis).mean()
        across = np.gradient(inner, axis=1 - axis).mean()
        # A side of some pixels is rounded to a whole one: up to 1 in 16.
        assert slope == pytest.approx(step / scale, rel=0.07)
        assert abs(across) < 0.02 * step / scale
        # The middle stays in the middle.
        middle = crop[h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].mean()
        assert middle == pytest.approx(step * values.mean(), abs=1.5 + step / scale)


def test_an_image_of_the_buckets_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8)
    np.testing.assert_array_equal(crop_to(Image.fromarray(pixels), (16, 64)), pixels)


def test_no_side_is_rounded_below_the_crop():
    """Sides whose quotient is below the whole number that it should be, in floats."""
    for height, width in ((49, 49), (98, 49), (49, 147), (103, 103), (41, 82)):
        image = Image.new("L", (width, height), 255)
        for sides in ((49, 49), (64, 64), (103, 103)):
            assert np.asarray(crop_to(image, sides)).min() == 255


# ---- The order -----------------------------------------------------------------------------------


def batches_of(order, epochs):
    """Of each epoch, the (bucket, number) of its steps."""
    bounds = [order.steps_before(epoch) for epoch in range(epochs + 1)]
    return [[order.batch(step) for step in range(*pair)] for pair in zip(bounds, bounds[1:])]


@pytest.mark.parametrize("counts", [(40,), (3, 50, 17), (1, 1, 1, 1, 4), (7, 8, 9, 1000)])
def test_every_epoch_has_the_whole_batches_that_are_there(counts):
    """The oracle keeps a heap of records a bucket, and takes batches while there are enough."""
    order = BucketOrder(counts, 8, seed=3)
    heaps = [0] * len(counts)
    taken: Counter[int] = Counter()
    for batches in batches_of(order, 24):
        wanted: Counter[int] = Counter()
        for bucket, count in enumerate(counts):
            heaps[bucket] += count
            wanted[bucket], heaps[bucket] = divmod(heaps[bucket], 8)
        assert Counter(bucket for bucket, _ in batches) == +wanted
        for bucket, number in batches:
            assert number == taken[bucket]  # each bucket's stream goes on without a gap
            taken[bucket] += 1


def test_the_order_is_a_function_of_seed_and_step():
    order = BucketOrder((30, 50, 17), 4, seed=0)
    steps = [order.batch(step) for step in range(100)]
    assert [BucketOrder((30, 50, 17), 4, seed=0).batch(step) for step in (77, 3, 24)] == [
        steps[77],
        steps[3],
        steps[24],
    ]
    other = BucketOrder((30, 50, 17), 4, seed=1)
    assert [other.batch(step) for step in range(100)] != steps
    # The buckets are mixed, and each epoch is another order.
    first, second, *_ = batches_of(order, 4)
    assert [bucket for bucket, _ in first] != sorted(bucket for bucket, _ in first)
    assert [bucket for bucket, _ in first][:20] != [bucket for bucket, _ in second][:20]


def test_a_late_step_costs_no_walk_through_the_epochs():
    order = BucketOrder((1, 2, 3), 384, seed=0)  # fewer records than a batch: many epochs a step
    assert order.batch(10**9)[0] in range(3)


def test_every_bucket_has_a_seed_of_its_own():
    seeds = stream_seeds(7, 40)
    assert len(set(seeds)) == 40 and all(0 <= seed < 2**32 for seed in seeds)
    assert stream_seeds(7, 40) == seeds != stream_seeds(8, 40)
