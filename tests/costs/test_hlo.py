"""Bytes and collectives read off the text of a program, against hand arithmetic."""

import dataclasses

import numpy as np
import pytest

from lit_jax.costs import hlo

# A loop of 28 that slices a stacked weight, multiplies, gathers and updates a stacked result; then
# a reduction over all.
MODULE = """
HloModule step, is_scheduled=true

%body_slice (p0: bf16[28,64,64], p1: s32[]) -> bf16[64,64] {
  %p0 = bf16[28,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %cast = bf16[64,64]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%body_update (q0: f32[28,8,64], q1: f32[8,64], q2: s32[]) -> f32[28,8,64] {
  %q0 = f32[28,8,64]{2,1,0:T(8,128)} parameter(0)
  %q1 = f32[8,64]{1,0:T(8,128)} parameter(1)
  %q2 = s32[]{:T(128)} parameter(2)
  %nil = s32[]{:T(128)} constant(0)
  %one = f32[1,8,64]{2,1,0:T(8,128)} bitcast(%q1)
  ROOT %update = f32[28,8,64]{2,1,0:T(8,128)} dynamic-update-slice(%q0, %one, %q2, %nil, %nil)
}

%body (state: (s32[], bf16[28,64,64], f32[28,8,64])) -> (s32[], bf16[28,64,64], f32[28,8,64]) {
  %state = (s32[]{:T(128)}, bf16[28,64,64]{2,1,0}, f32[28,8,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[28,64,64]{2,1,0} get-tuple-element(%state), index=1
  %y = f32[28,8,64]{2,1,0} get-tuple-element(%state), index=2
  %layer = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%body_slice
  %whole = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%layer), channel_id=1, replica_groups=[4,8]<=[32], dimensions={0}
  %row = f32[8,64]{1,0:T(8,128)} convolution(%whole, %layer), dim_labels=bf_io->bf, metadata={op_name="jit(train_step)/transpose(jvp(DiT))/while/body/closed_call/checkpoint/blocks/mlp/fc1/dot_general"}
  %out = f32[28,8,64]{2,1,0} fusion(%y, %row, %i), kind=kLoop, calls=%body_update
  ROOT %next = (s32[]{:T(128)}, bf16[28,64,64]{2,1,0}, f32[28,8,64]{2,1,0}) tuple(%i, %w, %out)
}

%condition (state.1: (s32[], bf16[28,64,64], f32[28,8,64])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[28,64,64]{2,1,0}, f32[28,8,64]{2,1,0}) parameter(0)
  %depth = s32[]{:T(128)} constant(28)
  %j = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%j, %depth), direction=LT
}

ENTRY %main (x: bf16[28,64,64], z: f32[28,8,64]) -> f32[28,8,64] {
  %x = bf16[28,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %z = f32[28,8,64]{2,1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %all = (s32[]{:T(128)}, bf16[28,64,64]{2,1,0}, f32[28,8,64]{2,1,0}) tuple(%start, %x, %z)
  %loop = (s32[]{:T(128)}, bf16[28,64,64]{2,1,0}, f32[28,8,64]{2,1,0}) while(%all), condition=%condition, body=%body
  %grads = f32[28,8,64]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %sum = f32[28,8,64]{2,1,0:T(8,128)} all-reduce(%grads), replica_groups=[8,4]<=[4,8]T(1,0), to_apply=%add
}
"""  # noqa: E501


def test_traffic_counts_a_loop_as_often_as_it_runs_and_a_slice_as_a_slice():
    layer, row, stacked = 64 * 64 * 2, 8 * 64 * 4, 28 * 8 * 64 * 4
    # The slice is read and written; of the product's operands one lies on the chip, S(1); the
    # update reads and writes a row.
    body = (2 * layer + 4) + (layer + row) + (2 * row + 4)
    collectives = 28 * 2 * (8 * layer) + 2 * stacked  # read and written once each
    assert hlo.Program(MODULE).traffic() == 28 * body + collectives


# A row of a stack is replaced, and another one gathered by a SparseCore, as for TPU7x.
IRONWOOD = """
HloModule step, is_scheduled=true

%retile (r: bf16[12,64,128]) -> bf16[12,64,128] {
  %r = bf16[12,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %tiles = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} copy(%r)
}

%replace (a: bf16[12,64,128], b: bf16[1,64,128], c: s32[]) -> bf16[12,64,128] {
  %a = bf16[12,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %b = bf16[1,64,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  %seen = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} fusion(%a), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  ROOT %put = bf16[12,64,128]{2,1,0:T(16,128)(2,1)} dynamic-update-slice(%seen, %b, %c, %c, %c)
}

%gather (g: bf16[1,8,128]) -> bf16[1,64,128] {
  %g = bf16[1,8,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %whole = bf16[1,64,128]{2,1,0:T(16,128)(2,1)} all-gather(%g), channel_id=1, replica_groups=mesh['x'=8] {'x'}, dimensions={1}
}

%sparse_core (h: bf16[1,8,128]) -> bf16[1,64,128] {
  %h = bf16[1,8,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %program = bf16[1,64,128]{2,1,0:T(16,128)(2,1)} custom-call(%h), custom_call_target="x", called_computations={%gather}
}

ENTRY %main (x: bf16[12,64,128], y: bf16[1,8,128], z: s32[]) -> bf16[12,64,128] {
  %x = bf16[12,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %y = bf16[1,8,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %z = s32[]{:T(128)} parameter(2)
  %begun = ((), (), s32[8192]{0:T(1024)}) async-start(), async_execution_thread="sparsecore", calls=%sparse_core
  %told = ((bf16[1,8,128]{2,1,0}), bf16[1,64,128]{2,1,0}, s32[8192]{0:T(1024)}) async-update(%begun, %y)
  %row = bf16[1,64,128]{2,1,0:T(16,128)(2,1)} async-done(%told)
  ROOT %out = bf16[12,64,128]{2,1,0:T(16,128)(2,1)} fusion(%x, %row, %z), kind=kLoop, calls=%replace
}
"""  # noqa: E501


def test_a_sparse_cores_collective_and_a_row_under_other_tiles_are_seen():
    row = 64 * 128 * 2
    program = hlo.Program(IRONWOOD)
    (gather,) = program.collectives()
    assert (gather.kind, gather.size, gather.group) == ("all-gather", row, 8)
    # The row is read and written, its number read; the collective reads and writes once.
    assert program.movers() == {"collectives": 2 * row, "fusion": 2 * row + 4}


def test_bytes_are_told_by_the_part_of_the_model_that_moves_them():
    layer, row, stacked = 64 * 64 * 2, 8 * 64 * 4, 28 * 8 * 64 * 4
    program = hlo.Program(MODULE)
    assert program.movers() == {
        "collectives": 28 * 2 * (8 * layer) + 2 * stacked,
        "fusion": 28 * (2 * layer + 2 * row + 8),
        "backward DiT/blocks/mlp/fc1": 28 * (layer + row),
    }
    assert list(program.movers())[0] == "collectives"  # the most comes first


@pytest.mark.parametrize(
    "op_name, expected",
    [
        ("jvp(DiT)/while/body/closed_call/blocks/add", "forward DiT/blocks"),
        (
            "jvp(teacher)/DiT/final_layer/linear/dot_general",
            "forward teacher/DiT/final_layer/linear",
        ),
        ("jvp(teacher/DiT)/blocks/norm1/LayerNorm_0/mul", "forward teacher/DiT/blocks/norm1"),
        (
            "transpose(jvp(DiT))/while/body/closed_call/checkpoint/rematted_computation/mul",
            "recomputed DiT",
        ),
        (
            "transpose(jvp(DiT))/while/body/checkpoint/blocks/attn/shard_map/kernel/pallas_call",
            "backward DiT/blocks/attn/kernel",
        ),
        ("transpose(jvp())/mul", "backward elsewhere"),
        ("update/jit(_where)/select_n", "update"),
        ("add", "elsewhere"),
    ],
)
def test_a_part_is_the_path_of_modules_and_the_pass(op_name, expected):
    attributes = f'kind=kLoop, metadata={{op_name="jit(train_step)/{op_name}"}}'
    instruction = hlo.Instruction("x", "f32[1]", "fusion", (), attributes, False)
    assert hlo.part_of(instruction) == expected


def test_collectives_are_counted_with_their_groups_and_the_slices_they_cross():
    gather, reduce = hlo.Program(MODULE).collectives(slices=2)
    assert dataclasses.astuple(gather)[:5] == ("all-gather", 8 * 64 * 64 * 2, 8, False, 28)
    assert dataclasses.astuple(reduce)[:5] == ("all-reduce", 28 * 8 * 64 * 4, 4, True, 1)
    assert gather.wire_bytes == 28 * gather.size * 7 / 8
    assert reduce.wire_bytes == 2 * reduce.size * 3 / 4


# A loop of the compiler's own: it counts by twos, and its fusion takes a slice inside another.
UNROLLED = """
HloModule gradient, is_scheduled=true

%take (t0: bf16[64,512], t1: s32[]) -> bf16[64,64] {
  %t1 = s32[]{:T(128)} parameter(1)
  %t0 = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %none = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[64,64]{1,0:T(8,128)(2,1)} dynamic-slice(%t0, %none, %t1), dynamic_slice_sizes={64,64}
}

%product (u0: bf16[64,32], u1: bf16[64,512], u2: s32[]) -> bf16[32,64] {
  %u0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %u1 = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(1)
  %u2 = s32[]{:T(128)} parameter(2)
  %same = bf16[64,512]{1,0:T(8,128)(2,1)} bitcast(%u1)
  %columns = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%same, %u2), kind=kLoop, calls=%take
  ROOT %dot = bf16[32,64]{1,0:T(8,128)(2,1)} convolution(%u0, %columns), dim_labels=fb_io->bf
}

%turn (s: (u32[], bf16[64,32], bf16[64,512], s32[])) -> (u32[], bf16[64,32], bf16[64,512], s32[]) {
  %s = (u32[]{:T(128)}, bf16[64,32]{1,0}, bf16[64,512]{1,0}, s32[]{:T(128)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%s), index=0
  %a = bf16[64,32]{1,0} get-tuple-element(%s), index=1
  %b = bf16[64,512]{1,0} get-tuple-element(%s), index=2
  %c = s32[]{:T(128)} get-tuple-element(%s), index=3
  %two = u32[]{:T(128)} constant(2)
  %after = u32[]{:T(128)} add(%n, %two)
  %made = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b, %c), kind=kOutput, calls=%product
  %stack = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %then = (u32[]{:T(128)}, bf16[64,32]{1,0}, bf16[64,512]{1,0}, s32[]{:T(128)}) tuple(%after, %a, %b, %c)
}

%less (r: (u32[], bf16[64,32], bf16[64,512], s32[])) -> pred[] {
  %r = (u32[]{:T(128)}, bf16[64,32]{1,0}, bf16[64,512]{1,0}, s32[]{:T(128)}) parameter(0)
  %m = u32[]{:T(128)} get-tuple-element(%r), index=0
  %eight = u32[]{:T(128)} constant(8)
  ROOT %go = pred[]{:T(512)} compare(%m, %eight), direction=LT
}

ENTRY %whole (v: (u32[], bf16[64,32], bf16[64,512], s32[])) -> (u32[], bf16[64,32], bf16[64,512], s32[]) {
  %v = (u32[]{:T(128)}, bf16[64,32]{1,0}, bf16[64,512]{1,0}, s32[]{:T(128)}) parameter(0)
  ROOT %w = (u32[]{:T(128)}, bf16[64,32]{1,0}, bf16[64,512]{1,0}, s32[]{:T(128)}) while(%v), condition=%less, body=%turn
}
"""  # noqa: E501


def test_the_compilers_own_loops_count_by_twos_and_slice_inside_fusions():
    # Four turns; the result lies on the chip. A sum of counters is three numbers of 4 bytes.
    turn = 64 * 32 * 2 + 64 * 64 * 2 + 4
    counter = 3 * 4
    assert hlo.Program(UNROLLED).traffic() == 4 * (turn + counter)


# One gather that runs next to two fusions, and two sums of which each chip keeps a part: the
# compiler's forms of them.
FUSED = """
HloModule step, is_scheduled=true

%start (a0: bf16[64,64]) -> bf16[256,64] {
  %a0 = bf16[64,64]{1,0} parameter(0)
  ROOT %g.1 = bf16[256,64]{1,0} all-gather(%a0), channel_id=5, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}
}

%go_on (b0: bf16[64,64]) -> bf16[256,64] {
  %b0 = bf16[64,64]{1,0} parameter(0)
  ROOT %g.2 = bf16[256,64]{1,0} all-gather(%b0), channel_id=5, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (c0: f32[64,64]) -> f32[16,64] {
  %c0 = f32[64,64]{1,0} parameter(0)
  %sum.1 = f32[64,64]{1,0} all-reduce(%c0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part.1 = f32[16,64]{1,0} slice(%sum.1), slice={[0:16], [0:64]}
}

%all-reduce-scatter.2 (d0: f32[32,64]) -> f32[8,64] {
  %d0 = f32[32,64]{1,0} parameter(0)
  %sum.2 = f32[32,64]{1,0} all-reduce(%d0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part.2 = f32[8,64]{1,0} slice(%sum.2), slice={[0:8], [0:64]}
}

ENTRY %main (x: bf16[64,64], y: f32[64,64], z: f32[32,64]) -> f32[8,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %z = f32[32,64]{1,0} parameter(2)
  %f1 = bf16[256,64]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[256,64]{1,0} fusion(%x), kind=kCustom, calls=%go_on
  %f3 = f32[16,64]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %f4 = f32[8,64]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.2
}
"""  # noqa: E501


def test_a_collective_counts_once_and_two_on_one_channel_count_twice():
    found = [(c.kind, c.size, c.group) for c in hlo.Program(FUSED).collectives()]
    assert found == [
        ("all-gather", 256 * 64 * 2, 4),
        ("reduce-scatter", 64 * 64 * 4, 4),
        ("reduce-scatter", 32 * 64 * 4, 4),
    ]


def test_replica_groups_are_read_in_each_of_their_forms():
    rows = np.arange(8).reshape(2, 4)
    for text in (
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=mesh['a'=2,'b'=4] {'b'}",
    ):
        np.testing.assert_array_equal(hlo.replica_groups(text), rows)
    for text in (
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}",
        "replica_groups=mesh['a'=8] {'a':(1)2}",
    ):
        np.testing.assert_array_equal(hlo.replica_groups(text), rows.T)
