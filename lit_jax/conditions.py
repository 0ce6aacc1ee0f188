"""What a model is told of an image besides x and t, and which condition image number i gets.

A condition is a dict of arrays with a leading batch axis. With it goes `drop`, (B,) bool: the rows
for which the model uses its own "nothing" (DiT's null class). So the samplers, the train step and
the data know of no null.

    {"label": (B,) int32}                  a class-conditional DiT or LiT
    {"caption": (B, S, C),                 a PixArt or its LiT: features of the text encoder,
     "caption_mask": (B, S) bool}          and which of them are tokens
    {"caption_ids": (B, S) int32,          a PixArt that is trained with its text encoder
     "caption_mask": (B, S) bool}
"""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Condition = dict[str, jax.Array]

LABEL_MODES = ("random", "balanced")
# Sampling step s folds s into an image's key. The label of the image takes a number far from those.
LABEL_STREAM = 2**31 - 1


# "random", "balanced", or the numbers of classes.
Labels = str | tuple[int, ...]


def choose_labels(asked: Any, num_classes: int, names: Sequence[str] = ()) -> Labels:
    """What a user asks for, as `for_images` takes it.

    Args:
      asked: "random", "balanced", a class by its number or name, or a list of classes.
      names: of the classes, in their order; (): they are known by number alone.
    Raises: ValueError for what is no class, with those that are like it.
    """
    if isinstance(asked, str) and asked in LABEL_MODES:
        return asked
    each = list(asked) if isinstance(asked, list | tuple) else [asked]
    if not each:
        raise ValueError("labels = (), which names no class")
    # The first of classes that share a name.
    numbers = {name: number for number, name in reversed(list(enumerate(names)))}
    chosen = []
    for label in each:
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < num_classes:
            chosen.append(label)
        # Classes may be named by numbers, such as years.
        elif str(label) in numbers and not isinstance(label, bool):
            chosen.append(numbers[str(label)])
        else:
            close = difflib.get_close_matches(str(label), [*LABEL_MODES, *numbers])
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            named = "" if names else ", whose names the checkpoint does not tell"
            raise ValueError(
                f"labels = {label!r}, but it must be random, balanced, or classes of the "
                f"{num_classes}{named}: numbers from 0 to {num_classes - 1}"
                f"{', or names' if names else ''}{hint}"
            )
    return tuple(chosen)


def for_images(
    model_config: Any, index: np.ndarray, *, seed: int, labels: Labels
) -> dict[str, np.ndarray]:
    """The condition of images by number; image i's depends on (seed, i) alone.

    Args:
      model_config: the architecture, which knows the number of classes.
      index: (n,) numbers of the images.
      labels: "random", uniform from (seed, i) as in DiT's protocol; "balanced": i modulo the
        number of classes; or the numbers of classes, which follow each other.
    Returns: {"label": (n,) int32}.
    Raises: ValueError for another word.
    """
    num_classes = model_config.num_classes  # the null class is never asked for
    if not isinstance(labels, str):
        return {"label": np.asarray(labels, np.int32)[index % len(labels)]}
    if labels == "balanced":
        return {"label": (index % num_classes).astype(np.int32)}
    if labels != "random":
        raise ValueError(f"labels must be one of {', '.join(LABEL_MODES)}; got {labels!r}")

    # From the image's own key, not from one generator: image i is the same in any batch.
    def label(i):
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), LABEL_STREAM)
        return jax.random.randint(rng, (), 0, num_classes)

    return {"label": np.asarray(jax.vmap(label)(jnp.asarray(index)), np.int32)}


def check_dataset(model_config: Any, dataset: Any) -> None:
    """Raises ValueError where the records' conditions are not those that the model is told."""
    wanted = set(model_config.condition_shapes(1))
    # Of texts, the tokens are as good as the features that are made of them.
    has_texts = "caption" in dataset.condition_fields and not dataset.text
    if has_texts and "caption_ids" in wanted:
        return
    if wanted != set(dataset.condition_fields):
        raise ValueError(
            f"the model is told {', '.join(sorted(wanted))} of an image, but the records of "
            f"{dataset.name} have {', '.join(sorted(dataset.condition_fields))}"
        )
    # Texts become features of whatever kind the model is told.
    if "caption" in wanted and dataset.text:
        _check_captions(model_config, dataset)
    # JAX would clamp a label outside the table without a word.
    if "label" in wanted and dataset.num_classes != model_config.num_classes:
        raise ValueError(
            f"num_classes = {model_config.num_classes}, but the data set {dataset.name} has "
            f"{dataset.num_classes} classes"
        )


def _check_captions(model_config: Any, dataset: Any) -> None:
    width = dataset.text["width"]
    if width != model_config.caption_channels:
        raise ValueError(
            f"caption_channels = {model_config.caption_channels}, but the features of the "
            f"captions of {dataset.name} have {width} channels"
        )
    longest = dataset.text["max_length"]
    if longest > model_config.caption_length:
        raise ValueError(
            f"caption_length = {model_config.caption_length}, but the captions of "
            f"{dataset.name} have up to {longest} tokens"
        )


def count_classes(model_config: Any) -> int:
    """How many labels the model knows, without the null; 0: it is told no label."""
    return getattr(model_config, "num_classes", 0)
