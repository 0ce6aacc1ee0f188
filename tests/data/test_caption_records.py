"""Records of images with captions: how features are stored, drawn and padded."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_captions import make_buckets
from tiny_text import CAPTIONS, spiece_model

from lit_jax import sharding
from lit_jax.data import pipeline
from lit_jax.data.caption_records import (
    choose_caption,
    count_cut_captions,
    pack,
    stored_caption,
    tokens_of_caption,
    unpack,
)
from lit_jax.text import TextSettings, Tokenizer

READ = functools.partial(stored_caption, max_length=5)


def features(n=40, C=512):
    """Tokens of very different size, each with a channel that is far larger than the others."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((n, C)) * np.exp(rng.standard_normal((n, 1)))
    values[:, 7] *= 6
    values[3] = 0
    return values.astype(np.float32)


def relative_error(ours, theirs):
    difference = ours.astype(np.float64) - theirs
    return np.linalg.norm(difference) / np.linalg.norm(theirs)


def test_bfloat16_is_stored_as_it_is():
    values = features().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(unpack(pack(values, "bfloat16"), slice(5, 9)), values[5:9])
    # Half a unit of the last of 8 bits at most.
    assert relative_error(unpack(pack(features(), "bfloat16"), slice(None)), features()) < 2**-9


def test_int8_is_within_half_a_step_of_each_tokens_scale():
    values = features()
    record = pack(values, "int8")
    assert record["caption_features"].dtype == np.int8
    ours = unpack(record, slice(None)).astype(np.float64)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    # The result is rounded to bfloat16.
    assert (np.abs(ours - values) <= 0.5001 * step + 2**-8 * np.abs(values)).all()
    assert not ours[3].any()
    size = sum(field.nbytes for field in record.values())
    assert size == pytest.approx(pack(values, "bfloat16")["caption_features"].nbytes / 2, rel=0.01)


# ---- Captions in training ------------------------------------------------------------------------


def drawn(ratio, lengths=(3, 2, 4), count=3000):
    """How often each caption is drawn; each token is of its caption's number."""
    values = np.repeat(np.arange(len(lengths)), lengths)[:, None] * np.ones((1, 4))
    record = pack(values.astype(np.float32), "bfloat16")
    record |= {"caption_lengths": np.array(lengths, np.int32), "index": np.int64(0)}
    rng = np.random.default_rng(0)
    counts = np.zeros(len(lengths))
    for _ in range(count):
        chosen = choose_caption(record, rng, ratio=ratio, read=READ)
        assert set(chosen) == {"caption", "caption_mask", "index"}
        mask = chosen["caption_mask"]
        which = int(chosen["caption"][0, 0])
        # All its tokens and no other, and zeros behind them.
        assert mask.tolist() == [i < lengths[which] for i in range(5)]
        assert (chosen["caption"][mask] == which).all() and not chosen["caption"][~mask].any()
        counts[which] += 1
    return counts / count


def test_the_first_caption_has_its_ratio_and_the_others_share_the_rest():
    # Five standard deviations.
    bound = 5 * 0.5 / 3000**0.5
    np.testing.assert_allclose(drawn(0.5), [0.5, 0.25, 0.25], atol=bound)
    np.testing.assert_allclose(drawn(0.8), [0.8, 0.1, 0.1], atol=bound)


def test_ends_of_the_ratio_and_an_only_caption():
    assert drawn(1.0, count=50).tolist() == [1, 0, 0]
    assert drawn(0.0, count=50)[0] == 0
    assert drawn(0.0, lengths=(2,), count=50).tolist() == [1]


@pytest.mark.parametrize("stored", [(1, 5), (-1, 5), (6,), (5,)])
def test_lengths_that_are_not_the_features_are_refused(stored):
    data = make_buckets(lengths=stored, tokens=4)
    with pytest.raises(ValueError, match=r"record 2 of split train_16x16 has captions of \["):
        data.buckets[1][2]


# ---- Batches of one bucket -----------------------------------------------------------------------


def batches(data=None, rows=None, **settings):
    settings = {"batch_size": 4, "seed": 0, "caption_ratio": 0.5, "num_threads": 2} | settings
    data = data or make_buckets()
    return iter(pipeline.make_bucket_batches(data, rows=rows, read_caption=READ, **settings))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def join(parts):
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def test_a_batch_is_of_one_bucket_and_every_record_comes_as_often():
    data = make_buckets(counts=(3, 9, 4))
    seen = np.zeros((3, 9), int)
    for batch in take(batches(data), 16):  # four epochs
        h, w = batch["image"].shape[1:3]
        bucket = [b.image_shape[:2] for b in data.buckets].index((h, w))
        for image, index, caption in zip(batch["image"], batch["index"], batch["caption"]):
            assert (image == index).all()
            assert caption[0, 0] // 10 == index  # the caption is of the image
            seen[bucket, index] += 1
    assert seen.tolist() == [[4] * 3 + [0] * 6, [4] * 9, [4] * 4 + [0] * 5]


def test_the_batches_are_a_function_of_the_seed():
    ours = take(batches(num_threads=0), 8)
    jax.tree.map(np.testing.assert_array_equal, ours, take(batches(num_threads=4), 8))
    other = take(batches(seed=1), 8)
    assert any(a["index"].tolist() != b["index"].tolist() for a, b in zip(ours, other))
    # A record's caption is drawn anew each time.
    captions = {}
    for batch in ours:
        for index, caption in zip(batch["index"], batch["caption"]):
            key = (batch["image"].shape[1:], int(index))
            captions.setdefault(key, set()).add(int(caption[0, 0]))
    assert any(len(found) == 2 for found in captions.values())


def test_other_processes_read_the_same_global_batches_also_after_a_resume():
    whole = take(batches(), 9)
    iterator = batches(rows=np.arange(4))
    take(iterator, 5)
    state = iterator.get_state()
    for count in (2, 4):
        parts = [batches(rows=rows) for rows in np.arange(4).reshape(count, -1)]
        for wanted in whole[:4]:
            ours = join([next(part) for part in parts])
            jax.tree.map(np.testing.assert_array_equal, ours, wanted)
        for part in parts:
            part.set_state(state)
        for wanted in whole[5:]:
            ours = join([next(part) for part in parts])
            jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_shapes_are_promised_and_the_state_is_that_of_the_batch_in_hand():
    data = make_buckets()
    rows = sharding.batch_sharding(sharding.make_mesh(2, 2, jax.devices()[:4]))
    promised = [
        {name: (x.shape, x.dtype) for name, x in shapes.items()}
        for shapes in pipeline.bucket_shapes(data, 4, rows, READ)
    ]
    iterator = pipeline.DeviceIterator(batches(data), rows)
    expected = take(batches(data), 8)
    for step, wanted in enumerate(expected[:6]):
        state = iterator.state
        batch = next(iterator)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} in promised
        jax.tree.map(np.testing.assert_array_equal, dict(batch), wanted)
        if step == 3:
            resumed = pipeline.DeviceIterator(batches(data), rows, state)
            np.testing.assert_array_equal(next(resumed)["index"], wanted["index"])
    assert len({str(shapes) for shapes in promised}) == 3


def test_more_rows_than_records_are_refused():
    with pytest.raises(ValueError, match="^batch_size = 17 exceeds the 16 records of told, split"):
        batches(batch_size=17)


def test_texts_that_training_will_cut_are_counted_and_named(tmp_path, caplog):
    (tmp_path / "spiece.model").write_bytes(spiece_model())
    tokenizer = Tokenizer(tmp_path / "spiece.model")
    short, long = "a cat", CAPTIONS[0]
    length = int(tokenizer([short], 20).mask.sum())
    settings = TextSettings(max_length=length)
    records = [
        {"captions": [short], "treated": []},
        {"captions": [short, long], "treated": []},
        {"broken": "a.png", "treated": []},
    ]
    count_cut_captions(records, tokenizer, settings)
    said = f"with a caption that training cuts to {length} tokens"
    assert [record["treated"] for record in records] == [[], [said], []]
    # Training says so too; the batch has what is left.
    with caplog.at_level("WARNING", "absl"):
        for which in (0, 1):
            read = tokens_of_caption(records[1], which, tokenizer=tokenizer, settings=settings)
            assert read["caption_mask"].sum() == length
    (message,) = [record.getMessage() for record in caplog.records]
    cut = int(tokenizer([long], length).cut[0])
    assert f"the last {cut} tokens of a caption are cut, text.max_length is {length}" in message
