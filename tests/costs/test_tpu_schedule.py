"""Estimates of TPU kernels by their compiler's schedule, and their command line."""

import dataclasses
import sys

import pytest

from lit_jax.costs import tpu_schedule
from lit_jax.kernels.linear_attention import Case


def test_a_loop_over_chunks_counts_as_often_as_it_turns_and_bands_move_more_than_the_floor():
    """LiT-S/2 at 1024 pixels on a v4: 4096 tokens are 16 chunks, in bands.

    v is read for the state and for the output.
    """
    cost = tpu_schedule.attention_costs(Case(384, 2, (64, 64)), 2, "v4:2x2x1")["forward"]
    assert len(cost.kernels) == 2
    assert cost.bundles == sum(kernel.bundles for kernel in cost.kernels) > 100
    assert cost.compute == pytest.approx(cost.bundles * 16 / 1.05e9)
    assert 5 / 4 < cost.memory / cost.floor < 6 / 4  # 5 arrays and the halos of the bands, for 4
    memory_bound = dataclasses.replace(cost, compute=0.0)
    assert memory_bound.ratio == cost.memory / cost.floor


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pixels=8"], "--pixels=8 is not a multiple of a token's 16"),
        (["--pixels=100"], "--pixels=100"),
        (["--width=1000", "--heads=3"], "--heads=3 does not divide --width=1000"),
        (["--tokens=-5"], "--tokens=-5"),
        (["--topology=v5e:3x7"], "topology = 'v5e:3x7'"),
        (["--topology=v5e:0x2"], "names 0 chips; it must be 1 to 16384"),
    ],
)
def test_bad_flags_of_the_estimate_are_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["tpu_schedule", *flags])
    with pytest.raises(SystemExit):
        tpu_schedule.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
