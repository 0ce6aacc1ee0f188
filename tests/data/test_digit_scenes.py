"""Digit scenes: what captions say, what pictures show, and what is never trained on."""

import collections
import hashlib
import json

import numpy as np
import pytest

from lit_jax.data import digit_scenes
from lit_jax.data.caption_records import open_captions
from lit_jax.data.digit_scenes import Scene
from lit_jax.data.mnist_digits import load_digits
from lit_jax.text import Tokenizer

COLOURS = np.array(list(digit_scenes.COLOURS.values()), float)


def cells(picture):
    """The four cells of a picture, each (16, 16, 3) float64."""
    return [picture[y : y + 16, x : x + 16].astype(float) for y in (0, 16) for x in (0, 16)]


def shown(cell, digits):
    """(digit, colour) of a cell by exhaustive search, or None where it is black."""
    if not cell.any():
        return None
    # The colour of a picture is a multiple of the ink: their directions are one.
    total = cell.sum(axis=(0, 1))
    direction = COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)
    colour = int((direction @ (total / np.linalg.norm(total))).argmax())
    for digit, images in enumerate(digits):
        expected = np.rint(images[..., None].astype(float) * COLOURS[colour])
        if (np.abs(expected - cell).max(axis=(1, 2, 3)) <= 1).any():
            return digit, list(digit_scenes.COLOURS)[colour]
    raise AssertionError("the cell shows no digit of the split")


@pytest.mark.parametrize(
    "scene, caption, line",
    [
        (
            Scene("single_object", ((8, None),)),
            "an eight",
            {"include": [{"class": "eight", "count": 1}]},
        ),
        (
            Scene("two_object", ((1, None), (3, None))),
            "a one and a three",
            {"include": [{"class": "one", "count": 1}, {"class": "three", "count": 1}]},
        ),
        (
            Scene("counting", ((6, None),) * 3),
            "three sixes",
            {
                "include": [{"class": "six", "count": 3}],
                "exclude": [{"class": "six", "count": 4}],
            },
        ),
        (
            Scene("colors", ((2, "red"),)),
            "a red two",
            {"include": [{"class": "two", "count": 1, "color": "red"}], "seen": False},
        ),
        (
            Scene("position", ((2, None), (9, None)), "left of"),
            "a two left of a nine",
            {
                "include": [
                    {"class": "nine", "count": 1},
                    {"class": "two", "count": 1, "position": ["left of", 0]},
                ]
            },
        ),
        (
            Scene("color_attr", ((6, "red"), (8, "white"))),
            "a red six and a white eight",
            {
                "include": [
                    {"class": "six", "count": 1, "color": "red"},
                    {"class": "eight", "count": 1, "color": "white"},
                ]
            },
        ),
    ],
)
def test_a_scene_has_the_caption_and_the_metadata_of_its_task(scene, caption, line):
    assert scene.caption == caption
    expected = {"tag": scene.task, "prompt": caption, "seen": True} | line
    assert json.loads(scene.metadata()) == expected


def test_a_picture_shows_what_its_caption_says():
    """Cell by cell, found by comparison with every digit there is."""
    digits = digit_scenes.digit_images("test")
    rng = np.random.default_rng(0)
    for number in range(60):
        scene = digit_scenes.draw_scene(
            rng, digit_scenes.TASKS[number % 6], coloured=number % 4 == 0
        )
        picture = digit_scenes.compose(rng, scene, digits)
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        found = [shown(cell, digits) for cell in cells(picture)]
        there = [each for each in found if each]
        assert sorted(digit for digit, _ in there) == sorted(digit for digit, _ in scene.items)
        for digit, colour in scene.items:
            assert colour is None or (digit, colour) in there
        if not scene.relation:
            # In reading order.
            assert [digit for digit, _ in there] == [digit for digit, _ in scene.items]
        else:
            (a, _), (b, _) = scene.items
            rows, columns = np.divmod(
                [[each and each[0] for each in found].index(x) for x in (a, b)], 2
            )
            dx, dy = np.sign(np.diff(columns)[0]), np.sign(np.diff(rows)[0])
            offsets = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
            assert (dx, dy) == offsets[scene.relation]


def said(caption):
    """(digit, colour) of each digit that a caption names; the colour is None where none is."""
    *words, last = caption.split()
    if last in digit_scenes.PLURALS:
        return [(digit_scenes.PLURALS.index(last), None)] * digit_scenes.DIGITS.index(words[0])
    found, colour = [], None
    for word in (*words, last):
        if word in digit_scenes.COLOURS:
            colour = word
        elif word in digit_scenes.DIGITS:
            found.append((digit_scenes.DIGITS.index(word), colour))
            colour = None
    return found


@pytest.mark.parametrize("split, count", [("train", 90), ("test", 20)])
def test_a_record_is_the_picture_of_its_caption_from_digits_of_its_split(split, count):
    """And no record joins a colour and a digit that are held out, whatever its caption says."""
    scenes, digits = digit_scenes.Scenes(split), digit_scenes.digit_images(split)
    pairs = set()
    for number in range(count):
        record = scenes[number]
        (caption,) = record["captions"]
        there = [pair for cell in cells(record["image"]) if (pair := shown(cell, digits))]
        named = said(caption)
        assert sorted(digit for digit, _ in there) == sorted(digit for digit, _ in named), caption
        assert all(colour is None or (digit, colour) in there for digit, colour in named), caption
        pairs |= {(colour, digit) for digit, colour in there}
    assert not pairs & digit_scenes.UNSEEN and len(pairs) > 15


def test_a_tenth_of_the_pairs_is_never_shown():
    """Neither named nor as a colour that the caption leaves open."""
    assert len(digit_scenes.UNSEEN) == 6
    rng = np.random.default_rng(1)
    digits = digit_scenes.digit_images("test")
    colours = set()
    for _ in range(60):
        picture = digit_scenes.compose(rng, Scene("counting", ((7, None),) * 4), digits)
        colours |= {shown(cell, digits)[1] for cell in cells(picture)}
    assert colours == set(digit_scenes.COLOURS) - {"yellow"}
    for _ in range(300):
        for task in ("colors", "color_attr"):
            assert digit_scenes.draw_scene(rng, task).is_seen
            scene = digit_scenes.draw_scene(rng, task, seen=False)
            assert {(colour, digit) for digit, colour in scene.items} & digit_scenes.UNSEEN


def test_a_scene_depends_on_split_and_number_alone():
    train, again, test = (
        open_captions(digit_scenes.NAME, "", split).buckets[0]
        for split in ("train", "train", "test")
    )
    for number in (0, 7, len(train) - 1):
        np.testing.assert_array_equal(train[number]["image"], again[number]["image"])
        assert train[number]["captions"] == again[number]["captions"]
    assert any((train[i]["image"] != test[i]["image"]).any() for i in range(3))
    assert train.fingerprint() != test.fingerprint()
    captions = [str(train[i]["captions"][0]) for i in range(200)]
    assert len(set(captions)) > 120
    with pytest.raises(ValueError, match="cannot be read"):
        train[len(train)]
    with pytest.raises(
        ValueError, match="split = 'validation', but digit_scenes has train and test"
    ):
        open_captions(digit_scenes.NAME, "", "validation")


def test_the_tasks_are_drawn_by_their_shares():
    scenes = digit_scenes.Scenes("train")
    words = [str(scenes[i]["captions"][0]) for i in range(600)]
    tasks = collections.Counter(
        "position" if any(name in text for name in digit_scenes.RELATIONS) else len(text.split())
        for text in words
    )
    # Two words: a digit, or a count; 3: a colour; 5 and 7: two digits. Five deviations each.
    assert abs(tasks["position"] - 180) < 56
    assert abs(tasks[2] - 120) < 49 and abs(tasks[3] - 60) < 37
    assert abs(tasks[5] - 60) < 37 and abs(tasks[7] - 180) < 56


def test_half_the_captions_of_places_name_colours_and_no_prompt_does():
    scenes = digit_scenes.Scenes("train")
    words = [str(scenes[i]["captions"][0]) for i in range(600)]
    # "a red two left of a blue nine" has 8 words. 45 of each are expected: five deviations.
    coloured = [text for text in words if " of a" in text and len(text.split()) == 8]
    plain = [text for text in words if " of a" in text and len(text.split()) == 6]
    assert abs(len(coloured) - 45) < 33 and abs(len(plain) - 45) < 33
    assert all(
        digit_scenes.draw_scene(np.random.default_rng(i), "position", coloured=True).is_seen
        for i in range(100)
    )
    assert not any(scene.relation and scene.items[0][1] for scene in digit_scenes.prompts())


def test_no_digit_is_trained_and_tested_with():
    images, labels, is_test = load_digits()
    assert is_test.sum() == 500 and len(images) == 5000
    for digit in range(10):
        train, test = (digit_scenes.digit_images(split)[digit] for split in ("train", "test"))
        assert (len(train), len(test)) == (450, 50)
        # The halves are of the same file: those that are equal would be the same digit.
        same = (train[:, None] == test[None]).all(axis=(2, 3))
        assert not same.any()


def test_the_prompts_are_thirty_of_each_task_and_always_the_same():
    prompts = digit_scenes.prompts()
    assert prompts == digit_scenes.prompts()
    # Those of every published table.
    lines = "\n".join(digit_scenes.metadata())
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("9850b7c1f6093010")
    assert collections.Counter(scene.task for scene in prompts) == dict.fromkeys(
        digit_scenes.TASKS, 30
    )
    unseen = collections.Counter(scene.task for scene in prompts if not scene.is_seen)
    assert unseen == {"colors": 6, "color_attr": 6}


def test_the_tokenizer_has_a_piece_for_every_word(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(digit_scenes.tokenizer_model())
    tokenizer = Tokenizer(path)
    texts = [scene.caption for scene in digit_scenes.prompts()]
    ids, mask, cut = tokenizer(texts, 20)
    assert [int(row.sum()) for row in mask] == [len(text.split()) + 1 for text in texts]
    assert not cut.any() and ids.max() < 64
    assert len(set(ids[mask].tolist())) > 30
    assert not any(tokenizer.unknown(text) for text in texts)
    assert tokenizer.unknown("a turquoise two and an elephant") == ["turquoise", "elephant"]
