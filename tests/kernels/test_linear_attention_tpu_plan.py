"""How the TPU kernels cut a case up, without compiling anything."""

import pytest

from lit_jax.costs import tpu_schedule
from lit_jax.kernels import linear_attention_tpu_plan
from lit_jax.kernels.linear_attention import Case
from lit_jax.kernels.linear_attention_tpu_plan import loop_turns, make_plan
from lit_jax.models.architecture import SIZES

RESOLUTIONS = (256, 512, 1024, 2048)  # pixels


@pytest.mark.parametrize("mebibytes", [16, 64, 128])  # of a v4; of a v5p core; of a v5e or v6e
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_no_array_is_padded_at_the_resolutions_of_the_models(monkeypatch, size, mebibytes):
    monkeypatch.setattr(linear_attention_tpu_plan, "vmem_bytes", lambda: mebibytes * 2**20)
    _, width, _, num_heads = SIZES[size]
    for pixels in RESOLUTIONS:
        side = pixels // tpu_schedule.PIXELS_PER_TOKEN
        for backward in (False, True):
            plan = make_plan(Case(width, num_heads, (side, side)), backward=backward)
            assert (plan.bands * plan.band_rows, plan.w) == (side, side), plan
            assert plan.bands == 1 or mebibytes == 16 or pixels > 512, plan


def test_the_turns_of_the_loops_are_those_of_the_plan():
    def turns(side):
        return loop_turns(Case(1152, 4, (side, side)), backward=True)

    with tpu_schedule.on_chip("v4:2x2x1"):  # bands of halved chunks
        assert turns(16) == 2
    with tpu_schedule.on_chip("v5e:2x2"):
        assert [turns(side) for side in (16, 32, 64)] == [1, 4, 16]
