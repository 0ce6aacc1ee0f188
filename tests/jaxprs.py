"""What a program will compute, read off its trace: nothing is compiled and nothing runs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def equations(fn: Callable, *args: Any) -> list[Any]:
    """All equations of fn(*args), those of loops, branches, inner programs and kernels too."""
    return list(_walk(jax.make_jaxpr(fn)(*args).jaxpr))


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)


def products(fn: Callable, *args: Any) -> list[Any]:
    """The matrix products and convolutions among the equations."""
    names = ("dot_general", "conv_general_dilated")
    return [e for e in equations(fn, *args) if e.primitive.name in names]


def assert_exact(fn: Callable, *args: Any) -> int:
    """Asserts that every product is of full precision and in float32.

    By default a TPU rounds float32 operands to bfloat16 and a GPU to TF32; a CPU does neither, so
    no value can show it here.
    Returns: how many products there are.
    """
    highest = jax.lax.Precision.HIGHEST
    found = products(fn, *args)
    for equation in found:
        assert equation.params["precision"] == (highest, highest), equation
        assert {v.aval.dtype.name for v in (*equation.invars, *equation.outvars)} == {"float32"}
    return len(found)
