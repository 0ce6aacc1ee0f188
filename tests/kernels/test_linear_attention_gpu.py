"""The GPU kernels against a float64 oracle, interpreted, and compiled for an H100 without one.

Mosaic GPU's interpreter runs barriers, copies and products on a CPU, and finds races. It takes no
notice of layouts, so what it accepts may not compile: the second part compiles. On a GPU itself
`python tests/on_gpu.py` compares the kernels with the same oracle.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations
from test_linear_attention import case_of, check, make_inputs

from lit_jax.kernels import linear_attention_gpu_plan
from lit_jax.kernels.linear_attention import linear_attention
from lit_jax.kernels.linear_attention_gpu_plan import refusal
from lit_jax.models.blocks import REMAT_POLICIES


def check_interpreted(inputs, num_heads, grid):
    """Compares the output and all gradients with the oracle; a race raises."""
    kwargs = dict(num_heads=num_heads, grid=grid, implementation="pallas_gpu", interpret=True)
    # Operands are rounded once each; these errors do not grow with the sums.
    check(inputs, factor=4.0, **kwargs)


@pytest.mark.parametrize(
    "B, grid, N, H, K, blocks",
    [
        # One block walks all patches; the state's last group holds columns and the mean.
        (1, (24, 16), 1, 96, 5, 1),
        # Each patch and each tile of tokens has its own block; patches lie beside each other.
        (1, (8, 32), 2, 64, 3, linear_attention_gpu_plan.BLOCKS),
        # Two slices a head, two images, no convolution.
        (2, (8, 16), 1, 192, 0, 1),
    ],
)
def test_values_and_gradients_match_the_oracle_without_a_race(
    monkeypatch, B, grid, N, H, K, blocks
):
    monkeypatch.setattr(linear_attention_gpu_plan, "BLOCKS", blocks)
    inputs = make_inputs(B=B, num_heads=N, head_width=H, grid=grid, K=K, dtype="bfloat16")
    check_interpreted(inputs, N, grid)


def test_rows_and_keys_of_zero_features_match_the_oracle():
    q, kv, *rest = make_inputs(B=1, num_heads=1, head_width=64, grid=(8, 16), K=0, dtype="bfloat16")
    q = q.at[:, 3].set(-1.0).at[:, 7].set(0.0)  # phi(q) is epsilon in these rows
    kv = kv.at[..., :64].set(-jnp.abs(kv[..., :64]))  # phi(k) is epsilon everywhere
    check_interpreted((q, kv, *rest), 1, (8, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float32"), "offers bfloat16; got float32"),
        (dict(head_width=72), "multiple of 64 or 96 columns, at most 288; got 72"),
        (dict(head_width=320), "multiple of 64 or 96 columns, at most 288; got 320"),
        (dict(grid=(12, 16)), r"multiple of 8 rows and of 16 columns; got \(12, 16\)"),
        (dict(grid=(8, 24)), r"multiple of 8 rows and of 16 columns; got \(8, 24\)"),
        (dict(K=7), "convolutions of 3 or 5; got 7"),
    ],
)
def test_a_case_that_is_not_offered_is_refused_by_name(change, message):
    arguments = dict(head_width=64, grid=(8, 16), K=5, dtype="bfloat16", num_heads=1, B=1)
    arguments |= change
    *inputs, _ = jax.eval_shape(lambda: make_inputs(**arguments))
    case = case_of(inputs, num_heads=1, grid=arguments["grid"])
    assert re.search(message, refusal(case))


@pytest.mark.parametrize("policy, forward", [("dots", 1), ("full", 2)])
def test_remat_dots_keeps_what_the_forward_kernels_wrote(policy, forward):
    *inputs, do = make_inputs(B=1, num_heads=1, head_width=64, grid=(8, 16), K=3, dtype="bfloat16")
    op = functools.partial(linear_attention, num_heads=1, grid=(8, 16), implementation="pallas_gpu")

    def layer(*inputs):
        return jnp.square(op(*inputs))  # as a projection's, its gradient needs the output

    def both(*inputs):
        return jax.vjp(jax.checkpoint(layer, policy=REMAT_POLICIES[policy]), *inputs)[1](do)

    calls = [str(e.params.get("name")) for e in equations(both, *inputs)]
    found = {name: calls.count(f"linear_attention_{name}") for name in ("state", "out", "dq", "dv")}
    assert found == {"state": forward, "out": forward, "dq": 1, "dv": 1}


# ---- Compiled for an H100, on a machine without one --------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What XL/2's two passes compile to, with and without a loop over splits of the tokens."""
    folder = tmp_path_factory.mktemp("hopper")
    helper = pathlib.Path(__file__).parents[1] / "hopper_compiler.py"
    ran = subprocess.run(
        [sys.executable, helper, folder], capture_output=True, text=True, check=False
    )
    assert not ran.returncode, ran.stderr[-3000:]
    return json.loads((folder / "kernels.json").read_text())


@pytest.mark.cuda
def test_kernels_compile_for_an_h100_without_spills_serialised_products_or_cut_swizzles(compiled):
    assert sorted(compiled["kernels"]) == [
        f"linear_attention_{name}"
        for name in ("dfilter", "dk", "dq", "dstate", "dv", "out", "state")
    ]
    for name, kernel in compiled["kernels"].items():
        assert kernel["spilled_bytes"] == 0, name
        assert kernel["warnings"] == [], name
        assert kernel["cut_swizzles"] == [], name
        assert kernel["registers"] * kernel["threads"] <= 65536, name
    assert compiled["launches"] == 7
    # In a scan over layers neither rematerialisation nor XLA runs a forward kernel again.
    assert compiled["launches_of_a_layer"] == 7
    # The state and the sums of the filter's gradient: nothing else is set aside.
    assert compiled["temporaries"] < 64e6
