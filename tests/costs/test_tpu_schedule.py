"""Estimates of TPU kernels by their compiler's schedule, and their command line."""

import dataclasses
import sys

import pytest

from lit_jax.costs import tpu_schedule
from lit_jax.kernels.linear_attention import Case

# Of a kernel: a loop of its first step, a loop of three turns with one of two inside,
# and the last step of a grid.
SCHEDULE = """
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %s2 = sphi %s1 } /* Start region 1 :: phi copy :: iteration index, stage = 0 */
   0x2   : > { %9 = sbr.rel (%p3) target = $region8 }
   0x3   : > { %10 = sbr.rel (!%p4) target = $region3 }
   0x4 LB: >> { %s5 = sadd.s32 1, %s4 } /* Start region 2 */
   0x5   : >> { %p6 = scmp.ge.s32.totalorder %s5, 9 /* loop exit test */ }
   0x6   : >> { %11 = sbr.rel (!%p6) target = $region2 }
   0x7   : >> {}
   0x8   : >> {}
   0x9   : >> {}
   0xa   : >> {}
   0xb PF: > { %v7 = vld } /* Start region 3 */
   0xc LB: >> { %v8 = vld } /* Start region 4 :: Start region 7 */
   0xd LB: >>> { %v9 = vld } /* Start region 5 */
   0xe   : >>> { %p10 = scmp.ge.s32.totalorder %s9, 2 /* loop exit test */ }
   0xf   : >>> { %12 = sbr.rel (!%p10) target = $region5 }
  0x10   : >>> {}
  0x11   : >>> {}
  0x12   : >>> {}
  0x13   : >>> {}
  0x14   : >> { %p11 = scmp.ge.s32.totalorder %s10, 3 /* loop exit test */ }
  0x15   : >> { %13 = sbr.rel (!%p11) target = $region4 }
  0x16   : >> {}
  0x17   : >> {}
  0x18   : >> {}
  0x19   : >> {}
  0x1a   : > { %14 = dma.vmem_to_hbm /* to the
output */ }
  0x1b PF: > { %p12 = scmp.ge.s32.totalorder %s12, 34 /* loop exit test */ } /* Start region 8 */
  0x1c   : > { %15 = sbr.rel (!%p12) target = $region1 }
"""


def test_a_loop_counts_as_often_as_it_turns_and_those_of_the_first_step_once():
    turns = tpu_schedule.bundle_turns(SCHEDULE)
    assert turns == [1] * 12 + [3] + [6] * 7 + [3] * 6 + [1] * 3


def test_chunks_are_counted_by_the_schedule_and_bands_move_more_than_the_floor():
    """LiT-S/2 at 1024 pixels on a v4: 4096 tokens are 16 chunks, in bands.

    v is read for the state and for the output.
    """
    cost = tpu_schedule.attention_costs(Case(384, 2, (64, 64)), 2, "v4:2x2x1")["forward"]
    assert len(cost.kernels) == 2
    assert cost.bundles == cost.bands * sum(kernel.bundles for kernel in cost.kernels)
    assert cost.bundles > 16 * 1000  # of a chunk, in both kernels
    assert cost.compute == pytest.approx(cost.bundles / 1.05e9)  # a core has one of the two images
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
