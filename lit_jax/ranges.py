"""What a setting may hold, in words and as a test: settings check themselves with it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Range(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


# NaN holds in none of them.
AT_LEAST_0 = Range("at least 0", lambda x: x >= 0)
AT_LEAST_1 = Range("at least 1", lambda x: x >= 1)
UNIT = Range("in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_1 = Range("in [0, 1)", lambda x: 0 <= x < 1)
NOT_NEGATIVE = Range("a finite number, at least 0", lambda x: 0 <= x < math.inf)
POSITIVE = Range("a finite number above 0", lambda x: 0 < x < math.inf)


def between(low: int, high: int) -> Range:
    return Range(f"in [{low:,}, {high:,}]", lambda x: low <= x <= high)


# Sides of images and latents. One of the largest size is a gigabyte in float32.
MOST_PIXELS = 16_384


def _are_sides(size: Any) -> bool:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    return all(isinstance(side, int) and 1 <= side <= MOST_PIXELS for side in pair)


SIDES = Range(f"a side in [1, {MOST_PIXELS:,}], or (height, width)", _are_sides)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that is a pair, or the side of a square."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


# Choices are compared, not hashed: a config may hold a list where a word belongs.
def one_of(*choices: Any) -> Range:
    """Any of the choices; an empty word among them stands for a default and is not told."""
    words = ", ".join(str(choice) for choice in choices if choice != "")
    return Range(f"one of {words}", lambda x: x in choices)


def check(settings: Any, **ranges: Range) -> None:
    """Raises ValueError for the first field of `settings` whose value is not in its range."""
    for name, (words, holds) in ranges.items():
        value = getattr(settings, name)
        if not holds(value):
            raise ValueError(f"{name} must be {words}; got {value!r}")
