"""What a model that is told a caption is asked for: prompts, and which image is of which."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from lit_jax.data import digit_scenes
from lit_jax.evaluation import geneval
from lit_jax.text import TextFeatures

MAX_FILE_BYTES = 64 << 20
# Lines of GenEval's metadata that need no file.
BUILT_IN = {"geneval": geneval.prompts, digit_scenes.NAME: digit_scenes.metadata}


class Prompts(NamedTuple):
    """The prompts of a run of samples; image i is of prompt i // images_per_prompt."""

    texts: tuple[str, ...]
    images_per_prompt: int
    geneval: tuple[str, ...] | None = None  # the lines that GenEval's scorer reads

    @property
    def num_images(self) -> int:
        return len(self.texts) * self.images_per_prompt

    def of(self, index: np.ndarray) -> np.ndarray:
        """The numbers of the images' prompts."""
        return index // self.images_per_prompt

    def sha256(self) -> str:
        """Tells lists of prompts apart."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def choose_prompts(prompts: Sequence[str], prompt_file: str, images_per_prompt: int) -> Prompts:
    """The prompts of a config.

    Args:
      prompts: texts; empty where a file is named.
      prompt_file: one prompt a line; or GenEval's metadata, JSON lines; or "geneval" for its own,
        "digit_scenes" for those of the built-in data set.
    Raises: ValueError whose text starts with the argument's name; FileNotFoundError.
    """
    if prompt_file and prompts:
        raise ValueError(
            f"prompt_file = {prompt_file}, but there are {len(prompts)} prompts too; name one of "
            f"the two"
        )
    if prompt_file in BUILT_IN:
        lines = tuple(BUILT_IN[prompt_file]())
        return Prompts(_texts(lines, prompt_file), images_per_prompt, lines)
    if not prompt_file:
        if not prompts:
            raise ValueError(
                "prompts = (), but the model is told a caption; name prompts in brackets, or a "
                "prompt_file"
            )
        return Prompts(tuple(prompts), images_per_prompt)
    path = epath.Path(prompt_file)
    if not path.is_file():
        raise FileNotFoundError(f"prompt_file = {path}: no such file")
    if path.stat().length > MAX_FILE_BYTES:
        raise ValueError(f"prompt_file = {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        # Windows' editors put a mark before the text. str.splitlines cuts at marks within prompts.
        content = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file = {path} is no text in UTF-8: {error}") from error
    lines = tuple(line for line in content if line.strip())
    if not lines:
        raise ValueError(f"prompt_file = {path} has no prompts")
    if path.suffix == ".jsonl":
        return Prompts(_texts(lines, path), images_per_prompt, lines)
    return Prompts(lines, images_per_prompt)


def _texts(lines, path):
    """The prompts in lines of GenEval's metadata."""
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(
                f'prompt_file = {path}: line {number} is no JSON object with a "prompt": {error}'
            ) from error
        if not isinstance(text, str):
            raise ValueError(f"prompt_file = {path}: the prompt of line {number} is no text")
        texts.append(text)
    return tuple(texts)


def to_condition(found: TextFeatures, null_mask: str) -> dict[str, np.ndarray]:
    """The condition of captions from their features.

    Args: null_mask: which tokens the model sees of the null caption: "prompt", those of the
      prompt's mask, or "own", the one token of the empty prompt.
    Returns: {"caption": (n, S, C), "caption_mask": (n, S) bool} and, for "own", "null_mask".
    """
    condition = {"caption": found.features, "caption_mask": found.mask}
    if null_mask == "own":
        first = np.arange(found.mask.shape[1]) == 0
        condition["null_mask"] = np.broadcast_to(first, found.mask.shape)
    return condition
