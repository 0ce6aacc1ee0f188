"""How the TPU kernels cut a case up, without compiling anything."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from lit_jax.costs import tpu_schedule
from lit_jax.kernels import linear_attention_tpu_plan
from lit_jax.kernels.linear_attention import Case
from lit_jax.kernels.linear_attention_tpu_plan import make_plan, refusal
from lit_jax.models.architecture import SIZES

RESOLUTIONS = (256, 512, 1024, 2048)  # pixels


@pytest.mark.parametrize("mebibytes", [16, 64, 128])  # of a core of v4; v5p, TPU7x; v5e, v6e
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_no_array_is_padded_at_the_resolutions_of_the_models(monkeypatch, size, mebibytes):
    monkeypatch.setattr(linear_attention_tpu_plan, "vmem_bytes", lambda: mebibytes * 2**20)
    _, width, _, num_heads = SIZES[size]
    for pixels in RESOLUTIONS:
        side = pixels // tpu_schedule.PIXELS_PER_TOKEN
        for backward in (False, True):
            plan = make_plan(Case(width, num_heads, (side, side)), backward=backward)
            assert (plan.bands * plan.band_rows, plan.w) == (side, side), plan
            assert plan.bands == 1 or pixels > (256 if mebibytes == 16 else 512), plan


@pytest.mark.parametrize(
    "width,num_heads,grid,K,dtype",
    [
        (1152, 4, (3, 4096), 5, "bfloat16"),  # wide rows
        (1152, 4, (4096, 4096), 5, "bfloat16"),
        (1152, 1, (1, 4096), 7, "bfloat16"),
        (1152, 4, (128, 128), 5, "float32"),  # XL at 2048 px
        (1152, 4, (128, 128), 7, "bfloat16"),
        (2304, 8, (128, 128), 5, "bfloat16"),  # wide models
        (3072, 16, (128, 128), 5, "bfloat16"),
        (1024, 16, (128, 128), 7, "bfloat16"),
    ],
)
def test_no_grid_and_no_number_of_heads_is_refused_in_16_mebibytes(
    width, num_heads, grid, K, dtype
):
    assert not refusal(Case(width, num_heads, grid, K, dtype=jnp.dtype(dtype)))


def test_registers_of_more_sublanes_are_refused(monkeypatch):
    """No TPU has them yet; there its kernels would write to the wrong rows."""
    case = Case(1152, 4, (16, 16))
    with tpu_schedule.on_chip("tpu7x:2x2x1"):
        assert not refusal(case)
        info = dataclasses.replace(pltpu.get_tpu_info(), num_sublanes=16)
        monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
        assert "of 8 sublanes; this TPU's have 16" in refusal(case)
