"""Compiles the TPU kernels for every chip, model size, resolution and pass.

Prints the table of docs/kernels_tpu.md. A cell has the kernel launches, MB of HBM for
neither arguments nor outputs, and seconds of compiling; or the compiler's first words.
The exit status is 1 if a program does not compile.

python -m docs.kernels_table         (about eight CPU minutes)
"""

import sys
import time
from typing import Any

from lit_jax.costs import tpu_schedule
from lit_jax.kernels.linear_attention import Case
from lit_jax.models.dit import SIZES

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
NAMES = ("S", "B", "L", "XL")
PIXELS = (256, 512, 1024, 2048)
TOKENS = 8192  # B * T


def main() -> int:
    """Returns the number of programs that do not compile."""
    columns = [(pixels, name) for pixels in PIXELS for name in tpu_schedule.PASSES]
    _write_row("chip", "size", *(f"{pixels} px {name}" for pixels, name in columns))
    sys.stdout.write("|---" * (2 + len(columns)) + "|\n")

    failures = 0
    for topology in TOPOLOGIES:
        for size in NAMES:
            _, width, _, num_heads = SIZES[size]
            cells = []
            for pixels, name in columns:
                side = pixels // tpu_schedule.PIXELS_PER_TOKEN
                case = Case(width=width, num_heads=num_heads, grid=(side, side))
                try:
                    cells.append(_compile(case, name, topology))
                # Whatever the compiler raises is the result of this cell.
                except Exception as error:
                    failures += 1
                    words = str(error).splitlines()[0][:80]
                    cells.append(f"{type(error).__name__}: {words}")
            _write_row(topology.split(":")[0], size, *cells)

    programs = len(TOPOLOGIES) * len(NAMES) * len(columns)
    sys.stdout.write(f"{programs} programs, {failures} failed\n")
    return failures


def _compile(case: Case, name: str, topology: str) -> str:
    started = time.monotonic()
    batch = max(1, TOKENS // case.tokens)
    program = tpu_schedule.attention_program(case, batch, name)
    compiled = tpu_schedule.compile_for(*program, topology)
    seconds = time.monotonic() - started

    text = compiled.as_text() or ""
    launches = text.count(f'custom_call_target="{tpu_schedule.KERNEL}"')
    memory: Any = compiled.memory_analysis()
    megabytes = memory.temp_size_in_bytes / 1e6
    return f"{launches}, {megabytes:.1f} MB, {seconds:.0f} s"


def _write_row(*cells) -> None:
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
