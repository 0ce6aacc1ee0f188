"""GenEval: its prompts, the folder that its scorer reads, its rules, and the summary of a result.

GenEval: Ghosh et al., arXiv 2310.11513. Its scorer detects objects with Mask2Former and judges
colours with CLIP; it runs elsewhere. The prompts are made here as its authors made them, from one
seed: the text is theirs byte for byte. Its rules are here too, for pictures whose objects another
detector finds: digit scenes (digit_detector.py).
"""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMAGES_A_PROMPT = 4  # of the published numbers
SEED = 43
COLOURS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# COCO's objects in its order, as GenEval calls them. The first one, person, has no colour.
OBJECTS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
).split(",")


# ---- The prompts ---------------------------------------------------------------------------------


def prompts() -> list[str]:
    """The 553 lines of GenEval's evaluation_metadata.jsonl, each a JSON object with its prompt."""
    # A prompt that was drawn twice is kept once.
    return list(dict.fromkeys(json.dumps(each) for each in _drawn()))


def _drawn() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(SEED)
    count = len(OBJECTS)
    for i in rng.choice(count, size=80, replace=False):
        yield _task("single_object", f"{_article(OBJECTS[i])}", _item(i))
    for _ in range(100):
        a, b = rng.choice(count, size=2, replace=False)
        text = f"{_article(OBJECTS[a])} and {_article(OBJECTS[b])}"
        yield _task("two_object", text, _item(a), _item(b))
    for _ in range(100):
        i = rng.choice(count)
        n = int(rng.integers(2, 4, endpoint=True))
        plural = OBJECTS[i] + ("es" if OBJECTS[i].endswith("s") else "s")
        yield _task("counting", f"{NUMBERS[n]} {plural}", _item(i, n), exclude=_item(i, n + 1))
    for _ in range(100):
        i = rng.choice(count - 1) + 1
        colour = COLOURS[rng.choice(len(COLOURS))]
        text = f"{_article(colour)} {OBJECTS[i]}"
        yield _task("colors", text, _item(i, color=colour))
    for _ in range(100):
        a, b = rng.choice(count, size=2, replace=False)
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        text = f"{_article(OBJECTS[a])} {relation} {_article(OBJECTS[b])}"
        # The object that the relation starts from comes second, and refers to the first.
        yield _task("position", text, _item(b), _item(a, position=[relation, 0]))
    for _ in range(100):
        a, b = rng.choice(count - 1, size=2, replace=False) + 1
        first, second = (COLOURS[i] for i in rng.choice(len(COLOURS), size=2, replace=False))
        text = f"{_article(first)} {OBJECTS[a]} and {_article(second)} {OBJECTS[b]}"
        yield _task("color_attr", text, _item(a, color=first), _item(b, color=second))


def _task(tag: str, text: str, *include: dict, exclude: dict | None = None) -> dict[str, Any]:
    task: dict[str, Any] = {"tag": tag, "include": list(include)}
    if exclude:
        task["exclude"] = [exclude]
    return task | {"prompt": f"a photo of {text}"}


def _item(number: int, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": OBJECTS[number], "count": count} | more


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---- The folder ----------------------------------------------------------------------------------


def image_path(folder: epath.Path, prompt: int, image: int) -> epath.Path:
    """Where the scorer looks for an image of a prompt, both by number."""
    return prompt_folder(folder, prompt) / "samples" / f"{image:04d}.png"


def prompt_folder(folder: epath.Path, prompt: int) -> epath.Path:
    """The folder of a prompt: a number, for the scorer passes over every other name."""
    return folder / f"{prompt:05d}"


def write_metadata(folder: epath.Path, lines: list[str]) -> None:
    """Writes the prompt's line into each folder; the lines are those of `prompts`."""
    for number, line in enumerate(lines):
        place = prompt_folder(folder, number)
        place.mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(line)


# ---- The rules -----------------------------------------------------------------------------------

# A box must be this much of both sizes further along an axis before it counts as further at all.
POSITION_MARGIN = 0.1


class Detected(NamedTuple):
    """An object in a picture: its class, its box (left, top, right, bottom) and its colour."""

    name: str
    box: tuple[float, float, float, float]
    color: str


def is_correct(metadata: dict[str, Any], objects: Sequence[Detected]) -> bool:
    """Whether a picture with these objects is what a line of metadata asks for, by GenEval's rules.

    Each item of `include` needs `count` objects of its class, of which the first `count` are looked
    at: all must have its colour, and the relation of its position to all of the item that it refers
    to. No class of `exclude` may have `count` objects.

    Args: objects: the surest first.
    Raises: KeyError for metadata without "include", "class" or "count".
    """
    looked_at: list[list[Detected]] = []
    for item in metadata["include"]:
        found = [each for each in objects if each.name == item["class"]][: item["count"]]
        looked_at.append(found)
        if len(found) < item["count"]:
            return False
        if "color" in item and any(each.color != item["color"] for each in found):
            return False
        if "position" in item:
            relation, number = item["position"]
            pairs = itertools.product(found, looked_at[number])
            if not all(relation in relations(a.box, b.box) for a, b in pairs):
                return False
    return not any(
        sum(each.name == item["class"] for each in objects) >= item["count"]
        for item in metadata.get("exclude", [])
    )


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The names in RELATIONS that hold of a box to another one.

    The offset of the centres is shortened by POSITION_MARGIN of both boxes' sizes on each axis.
    What is left must be more than half of the whole offset's length.
    """
    a = np.reshape(np.asarray(box, float), (2, 2))  # corners by x, y
    b = np.reshape(np.asarray(other, float), (2, 2))
    offset = a.mean(axis=0) - b.mean(axis=0)
    margin = POSITION_MARGIN * (np.ptp(a, axis=0) + np.ptp(b, axis=0))
    left = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if not left.any():
        return set()
    x, y = left / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def judge(
    folder: epath.Path, detect: Callable[[np.ndarray], Sequence[Sequence[Detected]]]
) -> list[dict[str, Any]]:
    """The results of a GenEval folder, as its scorer writes them: a dict an image.

    Args: detect: from images (n, h, w, 3) uint8 to the objects of each.
    Raises: FileNotFoundError where there is no prompt's folder, or one has no image; ValueError
      naming the file that is no metadata or no picture.
    """
    folders = sorted(path for path in folder.iterdir() if path.name.isdigit())
    if not folders:
        raise FileNotFoundError(f"{folder}: no folder of a prompt, such as 00000")
    judged = []
    for place in folders:
        path = place / "metadata.jsonl"
        try:
            metadata = json.loads(path.read_text())
            prompt = metadata["prompt"]
            is_correct(metadata, ())
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no line of GenEval's metadata: {error}") from error
        files = sorted((place / "samples").glob("*.png"))
        if not files:
            raise FileNotFoundError(f"{place / 'samples'}: no image of {prompt!r}")
        found = detect(np.stack([_read_image(file) for file in files]))
        for file, result in zip(files, results([metadata] * len(files), found), strict=True):
            judged.append({"filename": str(file.relative_to(folder))} | result)
    return judged


def results(
    asked: Iterable[dict[str, Any]], found: Iterable[Sequence[Detected]]
) -> list[dict[str, Any]]:
    """A result for each picture: its tag, prompt, whether it is correct, and what is seen of it.

    Args: asked: the metadata of each. found: the objects of each.
    """
    return [
        {name: line[name] for name in ("tag", "prompt", "seen") if name in line}
        | {"correct": is_correct(line, objects)}
        for line, objects in zip(asked, found, strict=True)
    ]


def _read_image(path):
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"{path}: no picture: {error}") from error


# ---- The scores ----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """A summary of the results, in shares of 1."""

    tasks: dict[str, float]  # of images that are right
    prompts: dict[str, float]  # of prompts with an image that is right
    overall: float  # mean of the tasks, as GenEval reports it
    standard_error: float  # of the overall, images taken as independent
    images: int
    # Of images whose prompt joins what training never showed together, and of the other ones of
    # those tasks; only digit scenes tell.
    unseen: dict[str, float]
    seen: dict[str, float]

    def table(self) -> str:
        """A line for each task, then the overall score."""
        apart = "     seen   unseen" if self.unseen else ""
        lines = [f"{'task':<16}{'images':>8}{'prompts':>9}{apart}"]
        for name, share in self.tasks.items():
            parts = [part[name] for part in (self.seen, self.unseen) if name in part]
            apart = "".join(f"{part:>9.3f}" for part in parts).rjust(18 if parts else 0)
            lines.append(f"{name:<16}{share:>8.3f}{self.prompts[name]:>9.3f}{apart}")
        lines.append(f"{'overall':<16}{self.overall:>8.3f} +- {self.standard_error:.3f}")
        return "\n".join(lines)


def summarise(path: epath.PathLike) -> Scores:
    """The scores of a result file of GenEval's scorer, JSON lines with "tag" and "correct".

    Raises: ValueError naming the line that is none, or the tasks that are missing.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"geneval = {path}: no such file")
    found = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").strip().split("\n"), 1):
        try:
            result = json.loads(line)
            task, correct, prompt = (result[name] for name in ("tag", "correct", "prompt"))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is no result of GenEval's scorer, a JSON object with tag, "
                f"correct and prompt: {error}"
            ) from error
        if task not in TASKS or not isinstance(correct, bool) or not isinstance(prompt, str):
            raise ValueError(
                f"{path}: line {number} has tag {task!r:.40} and correct {correct!r:.40}; tags are "
                f"{', '.join(TASKS)}, correct is true or false"
            )
        found.append(result)
    try:
        return score(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def score(found: Iterable[dict[str, Any]]) -> Scores:
    """The scores of `results`.

    Raises: ValueError where a task has none.
    """
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    apart: dict[bool, dict[str, list[bool]]] = {True: {}, False: {}}  # by whether it was seen
    by_prompt: dict[str, dict[str, bool]] = {task: {} for task in TASKS}
    for result in found:
        task, correct, prompt = (result[name] for name in ("tag", "correct", "prompt"))
        right[task].append(correct)
        by_prompt[task][prompt] = by_prompt[task].get(prompt, False) or correct
        apart[result.get("seen") is not False].setdefault(task, []).append(correct)
    if missing := [task for task in TASKS if not right[task]]:
        raise ValueError(f"no result of {', '.join(missing)}: the score needs all tasks")
    tasks = {task: float(np.mean(found)) for task, found in right.items()}
    seen, unseen = (
        {task: float(np.mean(found)) for task, found in part.items() if task in apart[False]}
        for part in (apart[True], apart[False])
    )
    variances = [share * (1 - share) / len(right[task]) for task, share in tasks.items()]
    return Scores(
        tasks=tasks,
        prompts={task: float(np.mean(list(found.values()))) for task, found in by_prompt.items()},
        overall=float(np.mean(list(tasks.values()))),
        standard_error=float(np.sqrt(sum(variances)) / len(TASKS)),
        images=sum(map(len, right.values())),
        unseen=unseen,
        seen=seen,
    )
