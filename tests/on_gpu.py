"""Runs the GPU kernels on the GPU at hand, and compares them with float64.

    python tests/on_gpu.py

It is not part of the suite, which has no GPU. Small cases are compared with the T x T oracle of
tests/kernels/test_linear_attention.py, element by element; whole batches of XL/2 with XLA's form in
float32 by the norm of the error. Two runs must give the same bits. The last line says how many
cases are wrong, and the status is 1 if any is.
"""

import functools
import os
import pathlib
import sys

# XLA's form is not timed here, and its float32 products take minutes to tune.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "kernels")]

import jax
import jax.numpy as jnp
import numpy as np
from test_linear_attention import check, make_inputs

from lit_jax.kernels.linear_attention import linear_attention

NAMES = ("out", "dq", "dkv", "dconv_kernel", "dconv_bias")
# Batch, grid, heads, columns of a head, convolution: every way in which a case is cut up.
SMALL = (
    (1, (16, 16), 2, 288, 5),
    (2, (24, 16), 1, 96, 5),
    (1, (8, 32), 2, 64, 3),
    (2, (8, 16), 1, 192, 0),
    (1, (16, 32), 1, 256, 3),
)
# Images of 256, 512 and 1024 pixels; about 32,768 tokens in all.
WHOLE = ((128, 16), (32, 32), (8, 64))
EXACT_TOKENS = 4096  # of XLA's form at once
# bfloat16 has 8 bits: operands and results are rounded to 2^-9 of their size, S and phi once more.
MOST_ERROR = 2.0**-7


def both(implementation, num_heads, grid, do, *inputs):
    """The output and the gradients, a list of arrays."""
    op = functools.partial(
        linear_attention, num_heads=num_heads, grid=grid, implementation=implementation
    )
    out, vjp = jax.vjp(op, *inputs)
    return [out, *jax.tree.leaves(vjp(do))]


def exact(grid, do, q, kv, *filters):
    """What `both` gives by XLA's form in float32, some images at a time: fewer take less tuning."""
    function = jax.jit(functools.partial(both, "xla", 4, grid))
    images = EXACT_TOKENS // q.shape[1]
    parts = []
    for first in range(0, len(q), images):
        arrays = [x[first : first + images] for x in (do, q, kv)] + list(filters)
        # Float32 operands mean float32 products.
        parts.append(jax.device_get(function(*(x.astype(jnp.float32) for x in arrays))))
    by_image, summed = zip(*((part[:3], part[3:]) for part in parts))
    return [
        *(np.concatenate(arrays) for arrays in zip(*by_image)),
        *(np.sum(arrays, axis=0, dtype=np.float64) for arrays in zip(*summed)),
    ]


def whole_batch(B: int, side: int) -> bool:
    """Prints the errors of XL/2's kernels on a whole batch; returns whether they are small."""
    grid = (side, side)
    *inputs, do = make_inputs(B=B, num_heads=4, head_width=288, grid=grid, K=5, dtype="bfloat16")
    fused = jax.jit(functools.partial(both, "pallas_gpu", 4, grid))
    found = jax.device_get(fused(do, *inputs))
    again = jax.device_get(fused(do, *inputs))
    wanted = exact(grid, do, *inputs)
    right = True
    for name, ours, twice, theirs in zip(NAMES, found, again, wanted):
        ours = np.asarray(ours, np.float32)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        same = np.array_equal(ours, np.asarray(twice, np.float32))
        right &= bool(error < MOST_ERROR and same)
        bits = "" if same else ", and two runs differ"
        print(f"B = {B}, {side} x {side}, {name}: relative error {error:.2e}{bits}", flush=True)
    return right


def main() -> None:
    print(jax.devices()[0].device_kind, "JAX", jax.__version__, flush=True)
    wrong = 0
    for B, grid, N, H, K in SMALL:
        inputs = make_inputs(B=B, num_heads=N, head_width=H, grid=grid, K=K, dtype="bfloat16")
        try:
            # As for the interpreted kernels: operands are rounded once each.
            check(inputs, factor=4.0, num_heads=N, grid=grid, implementation="pallas_gpu")
            said = "agrees with the oracle"
        except AssertionError as error:
            wrong += 1
            said = f"IS WRONG: {error}"
        print(f"B = {B}, grid {grid}, {N} heads of {H}, K = {K}: {said}", flush=True)
    for B, side in WHOLE:
        wrong += not whole_batch(B, side)
    print(f"{wrong} cases are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
