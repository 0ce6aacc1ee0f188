"""Plans: the numbers read off compiled programs, against hand arithmetic."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import debug, imagenet256_lit_s
from lit_jax import checkpoint, sharding
from lit_jax.costs import hlo
from lit_jax.experiment import Experiment
from lit_jax.jobs import plan
from lit_jax.models.autoencoder import AutoencoderKL
from lit_jax.models.dit import DiTConfig, param_shapes
from lit_jax.train_step import make_optimizer, state_shapes

# A loop of 28 that slices a stacked weight, multiplies, gathers and updates a stacked result; then a reduction over all.
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
  %row = f32[8,64]{1,0:T(8,128)} convolution(%whole, %layer), dim_labels=bf_io->bf
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
"""


def test_traffic_counts_a_loop_as_often_as_it_runs_and_a_slice_as_a_slice():
    layer, row, stacked = 64 * 64 * 2, 8 * 64 * 4, 28 * 8 * 64 * 4
    # The slice is read and written; of the product's operands one lies on the chip, S(1); the update reads and writes a row.
    body = (2 * layer + 4) + (layer + row) + (2 * row + 4)
    collectives = 28 * 2 * (8 * layer) + 2 * stacked  # read and written once each
    assert hlo.Program(MODULE).traffic() == 28 * body + collectives


def test_collectives_are_counted_with_their_groups_and_the_slices_they_cross():
    gather, reduce = hlo.Program(MODULE).collectives(slices=2)
    assert dataclasses.astuple(gather)[:5] == ("all-gather", 8 * 64 * 64 * 2, 8, False, 28)
    assert dataclasses.astuple(reduce)[:5] == ("all-reduce", 28 * 8 * 64 * 4, 4, True, 1)
    assert (
        gather.wire_bytes == 28 * gather.size * 7 / 8
        and reduce.wire_bytes == 2 * reduce.size * 3 / 4
    )


# One gather that runs beside two fusions, and two sums of which each chip keeps a part: the compiler's forms of them.
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
"""


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
        np.testing.assert_array_equal(hlo._groups(text), rows)
    for text in (
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}",
        "replica_groups=mesh['a'=8] {'a':(1)2}",
    ):
        np.testing.assert_array_equal(hlo._groups(text), rows.T)


def test_flops_of_xl_are_six_times_parameters_times_tokens():
    model = DiTConfig.of_size("XL")
    tokens = 256
    shapes = param_shapes(model)
    per_token = sum(checkpoint.parameter_count(shapes["blocks"][name]) for name in ("attn", "mlp"))
    by_hand = 6 * per_token * tokens + 3 * plan.attention_flops(model, (32, 32))
    assert 3 * model.forward_flops((32, 32)) == pytest.approx(by_hand, rel=0.01)
    assert 3 * model.forward_flops((32, 32)) == pytest.approx(
        0.711e12, rel=0.01
    )  # 119 Gflop of the paper, times 2 and 3


def tiny_config(**mesh):
    config = debug.get_config()
    config.model.update(size="Ti", depth=6, width=256, num_heads=2, input_size=32, dtype="bfloat16")
    config.train.update(batch_size=64, remat="dots")
    config.mesh.update(data=-1, **mesh)
    config.sample.update(batch_size=16)
    return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a small model, 4 chips for each of 2 copies of the parameters."""
    config, workdir = tiny_config(fsdp=4), tmp_path_factory.mktemp("plan")
    config.plan.programs = ("distill", "sample")
    plan.run(config, workdir)
    planner = plan.Planner(config, plan.topology_devices("v5e:2x4", 1))
    return planner, json.loads((workdir / "plan.json").read_text())["programs"]


def test_memory_is_what_the_arrays_take_by_hand(planned):
    planner, programs = planned
    shapes = state_shapes(
        planner.model, make_optimizer(Experiment(tiny_config()).optimizer_settings)
    )
    held = sum(
        np.prod(h.shard_shape(s.shape)) * s.dtype.itemsize
        for s, h in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(sharding.fsdp_sharding(shapes, planner.mesh))
        )
    )
    parameters = checkpoint.parameter_count(shapes.params)
    assert held == pytest.approx(
        4 * 4 * parameters / 4, rel=0.05
    )  # params, EMA, two moments; float32; four chips
    teacher = 2 * checkpoint.parameter_count(planner.teacher_params) / 4
    # What is small is padded: a stack of six biases fills eight rows of a tile.
    for name, by_hand in (("distill", held + teacher), ("sample", 4 * parameters / 4)):
        assert by_hand < programs[name]["arguments"] < 1.15 * by_hand, name


def test_the_step_writes_the_new_state_over_the_old(planned):
    """What is not donated, or donated and not reused, is held twice: here the metrics alone are new."""
    _, programs = planned
    assert programs["distill"]["outputs"] < 1e-3 * programs["distill"]["arguments"]


def test_nothing_is_replicated_by_accident(planned):
    planner, programs = planned
    layers, parameters = planner.model.depth, checkpoint.parameter_count(planner.state.params)
    found = programs["distill"]["collectives"]
    # Each layer's weights are gathered on the way forward and back, the teacher's once; matrices in bfloat16.
    assert found["all-gather"]["bytes"] <= 1.05 * (2 + 1) * 2 * parameters
    assert found["all-gather"]["runs"] >= layers
    # What is left of it: rows of the condition meet the split weights outside the blocks.
    assert found["all-to-all"]["bytes"] < 0.005 * 4 * parameters
    # Gradients are summed once, and scattered: over the four chips that share them first, then what each keeps over the two
    # copies. (The compiler sums those whose parts are no whole tiles in full: here two of six matrices, none of XL's.)
    assert (
        sum(entry["bytes"] for kind, entry in found.items() if "reduce" in kind) <= 3 * parameters
    )
    assert (
        sum(entry["wire_bytes"] for kind, entry in found.items() if "reduce" in kind)
        <= 3 * parameters
    )
    # No array on a chip is larger than the activations that remat=dots saves of its own 8 images, all layers stacked.
    tokens, width = 64, planner.model.width
    saved = layers * 8 * tokens * 4 * width * 2
    assert max(size for size, _, _ in programs["distill"]["largest"]) <= max(
        saved, 4 * parameters / 4
    )


def test_the_programs_are_those_that_a_tpu_would_run():
    """Not what this machine's CPU would pick; a name in the config stands."""
    config = tiny_config(fsdp=4)
    config.model.patch_size = 2  # 256 tokens: the flash kernel takes multiples of 128
    chips = plan.topology_devices("v5e:2x4", 1)
    planner = plan.Planner(config, chips)
    assert (planner.model.implementation, planner.teacher.implementation) == (
        "pallas_tpu",
        "pallas_tpu",
    )
    config.model.patch_size = 4  # 64 tokens
    config.model.implementation = "xla"
    planner = plan.Planner(config, chips)
    assert (planner.model.implementation, planner.teacher.implementation) == ("xla", "xla")
    config.model.update(implementation=None, conv_size=9)  # no kernel offers it
    assert plan.Planner(config, chips).model.implementation == "xla"
    config.model.update(conv_size=5, implementation="pallas_gpu")
    with pytest.raises(
        ValueError,
        match="model.implementation = pallas_gpu runs on gpu devices, these are tpu devices",
    ):
        plan.Planner(config, chips)


def test_a_plan_comes_before_the_weights():
    """LiT-S from DiT-XL: without the file the teacher is the size that the config states, and the heading says so."""
    config = imagenet256_lit_s.get_config()
    config.teacher.checkpoint = "nowhere/DiT-XL-2-256x256.pt"
    planner = plan.Planner(config, plan.topology_devices("v5e:2x4", 1))
    assert (planner.model.width, planner.teacher.width, planner.teacher.depth) == (384, 1152, 28)
    heading = planner.heading()
    assert (
        "nowhere/DiT-XL-2-256x256.pt is not there (yet): the teacher planned is a DiT of 28 layers of width 1152"
        in heading
    )
    assert (
        "teacher 674,834,720 (pallas_tpu)" in heading
    )  # DiT-XL/2, less the 256 x 1152 of the position table


def test_the_heading_says_that_the_decoder_is_left_out_and_what_it_weighs():
    config = tiny_config()
    config.model.in_channels = 4
    chips = plan.topology_devices("v5e:2x4", 1)
    assert "decode" not in plan.Planner(config, chips).heading()  # pixels
    config.autoencoder.checkpoint = "sd-vae-ft-ema"
    assert "to decode them" in plan.Planner(config, chips).heading()
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), images)
    parameters = checkpoint.parameter_count(shapes)
    assert (
        f"{4 * parameters / plan.GiB:.2f} GiB for the {parameters:,} parameters" in plan.AUTOENCODER
    )


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_device_of_the_plan_is_a_chip_with_the_memory_that_the_compiler_lets_it_use(topology):
    chips = plan.topology_devices(topology, 1)
    assert len(chips) == 4
    huge = jax.ShapeDtypeStruct(
        (2**34,), np.float32, sharding=jax.sharding.SingleDeviceSharding(chips[0])
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x[::-1] + x).lower(huge).compile()
    needed, allowed = plan.memory_shortage(str(refused.value))
    assert needed >= 64 * plan.GiB
    assert allowed == pytest.approx(
        plan.chips.TPUS[chips[0].device_kind].memory, rel=1e-3
    )  # the text has two decimals


def test_both_refusals_of_the_compiler_are_understood():
    long = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.42G of 15.75G "
        "hbm. Exceeded hbm capacity by 2.67G."
    )
    short = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.42G) exceeds available HBM (15.75G). HLO module: jit_draw."
    )
    assert (
        plan.memory_shortage(long)
        == plan.memory_shortage(short)
        == (18.42 * plan.GiB, 15.75 * plan.GiB)
    )
    assert (
        plan.memory_shortage("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem") is None
    )


def test_a_real_program_that_does_not_fit_is_told_by_how_much(planned):
    estimate = planned[0].estimate("sample", 2**20)
    assert not estimate.fits and estimate.needs > estimate.capacity == 15.75 * plan.GiB


def test_the_program_does_not_grow_with_the_depth():
    """The blocks are one scanned body, the teacher's and the student's: so compile time does not grow either."""
    lines = []
    for depth in (2, 8):
        config = tiny_config(fsdp=4)
        config.model.update(depth=depth, width=64)
        planner = plan.Planner(config, plan.topology_devices("v5e:2x4", 1))
        lines.append(len(planner.lower("distill", 64).as_text().splitlines()))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("jump, needs, largest", [(0, 34, 1792), (2, 36, 1536)])
def test_a_program_that_does_not_fit_says_by_how_much_and_what_would(
    tmp_path, monkeypatch, capsys, jump, needs, largest
):
    """8 MiB an image, and `jump` GiB more above 512 images, as when the compiler changes its mind; six compilations."""

    def estimate(self, program, batch_size=0):
        batch_size = batch_size or 4096
        needs = 2 * plan.GiB + batch_size * 2**23 + jump * plan.GiB * (batch_size > 512)
        tried.append(batch_size)
        return plan.Estimate(
            program,
            batch_size,
            needs <= 16 * plan.GiB,
            needs,
            16 * plan.GiB,
            seconds={"compute": 1.0},
        )

    tried = []
    monkeypatch.setattr(plan.Planner, "estimate", estimate)
    config = tiny_config()
    config.plan.programs = ("plain",)
    with pytest.raises(
        ValueError,
        match=f"batch 4096 needs {needs}.00 GiB a chip of v5e:2x4, {needs - 16}.00 GiB more",
    ):
        plan.run(config, tmp_path)
    assert f"the largest batch found to fit is {largest}" in capsys.readouterr().out
    assert len(tried) <= plan.MAX_TRIES


def test_slices_split_the_data_axis_and_never_a_copy_of_the_parameters():
    mesh = sharding.make_mesh(-1, 8, plan.topology_devices("v5e:2x4", 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8}
    assert [{device.slice_index for device in row} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="mesh.data = 1 is not a multiple of the 2 slices"):
        sharding.make_mesh(1, 16, plan.topology_devices("v5e:2x4", 2))


def test_a_mesh_need_not_be_made_of_whole_axes_of_the_torus():
    """The same command on any slice: of 4 x 4 x 4, 8 takes one axis and half of the next."""
    mesh = sharding.make_mesh(-1, 8, plan.topology_devices("v5p:4x4x4", 1))
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8}
    for row in mesh.devices:  # neighbours: the eight that share a copy lie in a box of 8 chips
        assert np.prod(np.ptp([device.coords for device in row], axis=0) + 1) == 8


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e:3x7", "plan.topology = 'v5e:3x7'"),
        ("", "plan.topology is empty"),
        ("v3:2x2x1", "plan.topology = v3:2x2x1 is of TPU v3"),
    ],
)
def test_an_unknown_topology_is_one_clear_line(tmp_path, topology, message):
    config = tiny_config()
    config.plan.topology = topology
    with pytest.raises(ValueError, match=message):
        plan.run(config, tmp_path)
