"""GenEval: its prompts, the folder that its scorer reads, and the summary of what it writes.

GenEval: Ghosh et al., arXiv 2310.11513. Its scorer detects objects with Mask2Former and judges
colours with CLIP; it runs elsewhere. The prompts are made here as its authors made them, from one
seed: the text is theirs byte for byte.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

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


# ---- The scores ----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """A summary of the scorer's results, in shares of 1."""

    tasks: dict[str, float]  # of images that are right
    prompts: dict[str, float]  # of prompts with an image that is right
    overall: float  # mean of the tasks, as GenEval reports it
    standard_error: float  # of the overall, images taken as independent
    images: int

    def table(self) -> str:
        """A line for each task, then the overall score."""
        lines = [f"{'task':<16}{'images':>8}{'prompts':>9}"]
        for name, share in self.tasks.items():
            lines.append(f"{name:<16}{share:>8.3f}{self.prompts[name]:>9.3f}")
        lines.append(f"{'overall':<16}{self.overall:>8.3f} +- {self.standard_error:.3f}")
        return "\n".join(lines)


def summarise(path: epath.PathLike) -> Scores:
    """The scores of a result file of GenEval's scorer, JSON lines with "tag" and "correct".

    Raises: ValueError naming the line that is none, or the tasks that are missing.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"geneval = {path}: no such file")
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    by_prompt: dict[str, dict[str, bool]] = {task: {} for task in TASKS}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            task, correct, prompt = (result[name] for name in ("tag", "correct", "prompt"))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is no result of GenEval's scorer, a JSON object with tag, "
                f"correct and prompt: {error}"
            ) from error
        if task not in right or not isinstance(correct, bool) or not isinstance(prompt, str):
            raise ValueError(
                f"{path}: line {number} has tag {task!r:.40} and correct {correct!r:.40}; tags are "
                f"{', '.join(TASKS)}, correct is true or false"
            )
        right[task].append(correct)
        by_prompt[task][prompt] = by_prompt[task].get(prompt, False) or correct
    if missing := [task for task in TASKS if not right[task]]:
        raise ValueError(f"{path} has no result of {', '.join(missing)}: the score needs all tasks")
    tasks = {task: float(np.mean(found)) for task, found in right.items()}
    variances = [share * (1 - share) / len(right[task]) for task, share in tasks.items()]
    return Scores(
        tasks=tasks,
        prompts={task: float(np.mean(list(found.values()))) for task, found in by_prompt.items()},
        overall=float(np.mean(list(tasks.values()))),
        standard_error=float(np.sqrt(sum(variances)) / len(TASKS)),
        images=sum(map(len, right.values())),
    )
