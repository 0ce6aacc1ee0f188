"""Plans: real programs, compiled for TPUs that are not there, against hand arithmetic."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug, imagenet256_lit_s
from lit_jax import checkpoint, sharding
from lit_jax.costs import chips, hlo
from lit_jax.costs.hlo import Collective
from lit_jax.costs.tpu_schedule import topology_devices
from lit_jax.experiment import Experiment
from lit_jax.jobs import plan
from lit_jax.models import param_shapes
from lit_jax.models.autoencoder import AutoencoderKL
from lit_jax.models.dit import DiTConfig
from lit_jax.train_step import make_optimizer, state_shapes


def test_flops_of_xl_are_six_times_parameters_times_tokens():
    model = DiTConfig.of_size("XL")
    tokens = 256
    shapes = param_shapes(model)
    per_token = sum(checkpoint.parameter_count(shapes["blocks"][name]) for name in ("attn", "mlp"))
    by_hand = 6 * per_token * tokens + 3 * model.attention_flops((32, 32))
    assert 3 * model.forward_flops((32, 32)) == pytest.approx(by_hand, rel=0.01)
    assert 3 * model.forward_flops((32, 32)) == pytest.approx(
        0.711e12, rel=0.01
    )  # 119 Gflop of the paper, times 2 and 3


def tiny_config(**mesh):
    config = debug.get_config()
    config.model.update(
        size="Ti",
        depth=6,
        width=256,
        num_heads=2,
        input_size=32,
        patch_size=4,
        in_channels=1,
        num_classes=10,
        learn_sigma=True,
        conv_size=5,
        dtype="bfloat16",
    )
    config.train.update(batch_size=64, remat="dots")
    config.mesh.update(data=-1, **mesh)
    config.sample.update(batch_size=16, steps=4, cfg_scale=2.0)
    return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a small model, 4 chips for each of 2 copies of the parameters.

    The sampler is planned for another batch than the config's.
    """
    config = tiny_config(fsdp=4)
    workdir = tmp_path_factory.mktemp("plan")
    config.plan.programs = ("distill",)
    plan.run(config, workdir)
    programs = json.loads((workdir / "plan.json").read_text())["programs"]
    planner = plan.Planner(config, topology_devices("v5e:2x4"))
    sample = planner.estimate("sample", 8)
    return planner, programs | {"sample": dataclasses.asdict(sample)}


# ---- FLOPs, seconds, images/s, MFU ---------------------------------------------------------------

# Multiply-adds of one image of `tiny_config`, by hand: T = 64 tokens of width D = 256, two heads of
# H = 128, K = 5. A layer of the student:
#     modulation            6 D D             393,216
#     q, k, v, proj         4 T D D        16,777,216
#     state and read-out    2 T D H         4,194,304
#     convolution          25 T D             409,600
#     MLP                   8 T D D        33,554,432     together 55,328,768
# of the teacher, scores and read-out in place of the third and the fourth:
#                           2 T T D         2,097,152     together 52,822,016
# and once for each model:
#     patches of 16 pixels    16 T D          262,144
#     timestep          256 D + D D           131,072
#     modulation            2 D D             131,072
#     output of 2 x 16        32 T D          524,288     together 1,048,576
STUDENT = 2 * (6 * 55_328_768 + 1_048_576)  # FLOPs
TEACHER = 2 * (6 * 52_822_016 + 1_048_576)
ATTENTION = 2 * 6 * (4_194_304 + 409_600)
CHIPS = 8


def test_flops_are_those_of_the_layers_by_hand(planned):
    _, programs = planned
    step = programs["distill"]
    # Three passes of the student, one of the teacher; remat=dots repeats the attention.
    assert step["flops"] == 64 * (3 * STUDENT + TEACHER) / CHIPS == 21_072_707_584
    assert step["executed_flops"] == 64 * (3 * STUDENT + TEACHER + ATTENTION) / CHIPS
    # Four steps, with and without the label.
    sample = programs["sample"]
    assert sample["flops"] == sample["executed_flops"] == 8 * 4 * 2 * STUDENT / CHIPS


def test_a_small_model_is_described_in_units_that_show_it(planned):
    _, programs = planned
    for fields in programs.values():
        text = plan.describe(plan.Estimate(**fields))
        numbers = re.findall(r"\d[\d.,]*", text)
        assert len(numbers) > 15 and not [x for x in numbers if re.fullmatch(r"0\.0+", x)], text
    step = plan.describe(plan.Estimate(**programs["distill"]))
    assert "of 15.8 GiB a chip" in step and "a chip   21.1 GFLOP" in step


@pytest.mark.parametrize(
    "text, expected",
    [
        (plan.binary(15.75 * chips.GiB), "15.8 GiB"),
        (plan.binary(1023), "0.999 KiB"),
        (plan.binary(0), "0 B"),
        (plan.binary(5000 * chips.GiB), "5,000 GiB"),
        (plan.decimal(21_072_707_584, "FLOP"), "21.1 GFLOP"),
        (plan.decimal(999.7e6, "B"), "1 GB"),
        (plan.decimal(0.000042, "s"), "42 us"),
        (plan.decimal(4321.0, "s"), "4,321 s"),
        (plan.decimal(0.0, "s"), "0 ns"),
    ],
)
def test_units_leave_three_digits(text, expected):
    assert text == expected


def test_what_rematerialisation_repeats_is_executed_and_no_use():
    config = tiny_config()
    planner = plan.Planner(config, topology_devices("v5e:2x4"))
    plain = 64 * 3 * STUDENT
    for remat, again in (("none", 0), ("dots", ATTENTION), ("full", STUDENT)):
        config.train.remat = remat
        assert planner.flops("plain", 64) == (plain, plain + 64 * again)
    config.sample.cfg_scale = 1.0  # no pass without the label
    assert planner.flops("sample", 8) == (8 * 4 * STUDENT,) * 2


def test_seconds_are_the_chips_rates_by_hand(planned):
    """A v5e: 197 TFLOP/s, 819 GB/s of memory, 200 GB/s over its links."""
    _, programs = planned
    for program in programs.values():
        seconds = program["seconds"]
        sent = sum(kind["wire_bytes"] for kind in program["collectives"].values())
        assert seconds["compute"] * 197e12 == pytest.approx(program["executed_flops"])
        assert seconds["memory"] * 819e9 == pytest.approx(program["traffic"])
        assert seconds["ici"] * 200e9 == pytest.approx(sent)
        assert seconds["dcn"] == 0.0
        assert sent > 0 and len(set(seconds.values())) == 4


@pytest.mark.parametrize("name, batch_size", [("distill", 64), ("sample", 8)])
def test_images_per_second_and_mfu_are_of_the_longest_time(planned, name, batch_size):
    _, programs = planned
    program = programs[name]
    longest = max(program["seconds"].values())
    assert program["batch_size"] == batch_size
    assert program["images_per_second"] == pytest.approx(batch_size / longest)
    # Of the whole slice: MFU x peak of eight chips = images/s x FLOPs of an image.
    per_image = {"distill": 3 * STUDENT + TEACHER, "sample": 8 * STUDENT}[name]
    useful = program["images_per_second"] * per_image
    assert program["mfu"] * 8 * 197e12 == pytest.approx(useful)


def test_the_roofline_of_round_numbers():
    """One second of computing, two of memory, three of links, four between the slices."""
    busy = dict(flops=459e12, traffic=2 * 2765e9, ici=3 * 600e9, dcn=4 * 6.25e9)
    seconds = plan.roofline(chips.TPUS["TPU v5"], **busy)
    assert seconds == pytest.approx({"compute": 1, "memory": 2, "ici": 3, "dcn": 4})


@pytest.mark.parametrize("longest", ["compute", "memory", "ici", "dcn"])
def test_the_bound_is_what_takes_longest(longest):
    seconds = {"compute": 1.0, "memory": 1.0, "ici": 1.0, "dcn": 1.0} | {longest: 2.0}
    estimate = plan.Estimate("plain", 8, True, 1.0, 2.0, seconds=seconds)
    assert estimate.bound == longest
    assert f"at least 2 s, bound by {longest} " in plan.describe(estimate)


def test_chips_of_a_slice_share_what_leaves_it():
    """Two slices of four chips; a sum of 800 bytes over all eight, a gather of 400 inside each."""
    total = Collective("all-reduce", 800, 8, crosses_slices=True, times=3, name="sum")
    inside = Collective("all-gather", 400, 4, crosses_slices=False, times=5, name="gather")
    # By a ring a chip sends 7/8 of the array twice, and 3/4 of it once.
    reduced = 3 * 2 * 700
    gathered = 5 * 300
    ici, dcn = plan.link_bytes([total, inside], slices=2)
    assert (ici, dcn) == (reduced + gathered, reduced / 4)
    assert plan.by_kind([total, inside, inside]) == {
        "all-reduce": {"runs": 3, "bytes": 2400, "wire_bytes": reduced},
        "all-gather": {"runs": 10, "bytes": 4000, "wire_bytes": 2 * gathered},
    }


# ---- Memory and collectives ----------------------------------------------------------------------


def test_memory_is_what_the_arrays_take_by_hand(planned):
    planner, programs = planned
    shapes = state_shapes(
        planner.model, make_optimizer(Experiment(tiny_config()).optimizer_settings)
    )
    shardings = sharding.fsdp_sharding(shapes, planner.mesh)
    state = sum(
        np.prod(h.shard_shape(s.shape)) * s.dtype.itemsize
        for s, h in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings))
    )
    parameters = checkpoint.parameter_count(shapes.params)
    # Parameters, EMA, two moments; float32; four chips.
    assert state == pytest.approx(4 * 4 * parameters / 4, rel=0.05)
    teacher = 2 * checkpoint.parameter_count(planner.teacher_params) / 4
    # What is small is padded: a stack of six biases fills eight rows of a tile.
    for name, by_hand in (("distill", state + teacher), ("sample", 4 * parameters / 4)):
        assert by_hand < programs[name]["arguments"] < 1.15 * by_hand, name


def test_a_captioned_model_with_came_is_planned_by_bucket():
    """Parameters, EMA and one moment, where AdamW has two; the factors are vectors.

    The program is lowered, not compiled: the recipes' own plans are in docs/text_to_image.md.
    """
    config = tiny_config(fsdp=4)
    with config.model.unlocked():
        config.model.update(
            family="pixart", num_classes=None, timestep_freq_shift=None, mlp_norm_epsilon=None,
            depth=2, cross_heads=4, caption_channels=64, caption_length=20, position_base=8,
        )  # fmt: skip
    config.optimizer.update(name="came", warmup=12)
    config.train.steps = 100
    planner = plan.Planner(plan.of_bucket(config, "8x32"), topology_devices("v5e:2x4"))
    lowered = planner.lower("distill", 64)
    state, teacher, batch, _ = (
        sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in lowered.args_info[0]
    )
    parameters = checkpoint.parameter_count(param_shapes(planner.model.config))
    assert 3 * 4 * parameters < state < 1.01 * 3 * 4 * parameters
    assert teacher == 2 * 2 * checkpoint.parameter_count(planner.teacher_params)
    # 16 x 64 pixels, the number of the image, features of 20 tokens and their mask.
    assert batch == 64 * (16 * 64 + 4 + 20 * 64 * 2 + 20)
    once = planner.model.config.forward_flops((16, 64))
    frozen = planner.teacher.config.forward_flops((16, 64))
    assert planner.flops("distill", 64)[0] == pytest.approx(64 * (3 * once + frozen))


@pytest.mark.parametrize("kind", ["int8_weights", "int8"])
def test_a_sampler_in_int8_is_planned_with_its_own_weights(kind):
    """Lowered and compiled for the slice: int8 is what it holds, and what it multiplies."""
    config = tiny_config(fsdp=4)
    config.model.update(depth=2, implementation="xla")
    config.sample.quantize = kind
    planner = plan.Planner(config, topology_devices("v5e:2x4"))
    lowered = planner.lower("sample", 8)
    weights = jax.tree.leaves(lowered.args_info[0][0])
    # Of each layer q, k, v, proj and the two of the MLP.
    whole = sum(np.prod(leaf.shape) for leaf in weights if leaf.dtype == np.int8)
    assert whole == 2 * 12 * 256**2
    products = re.findall(r"dot_general.*xi8>, .*xi8>.* -> .*xi32>", lowered.as_text())
    # q, kv, proj, fc1 and fc2, in each of two branches: with guidance and without.
    assert len(products) == (10 if kind == "int8" else 0)
    estimate = planner.estimate("sample", 8)
    rest = checkpoint.parameter_count(planner.state.params) - whole
    by_hand = (whole + 4 * rest) / 4
    assert estimate.fits and by_hand < estimate.arguments < 1.3 * by_hand


def test_the_step_writes_the_new_state_over_the_old(planned):
    """What is not donated, or donated and not reused, is there twice: here only the metrics are."""
    _, programs = planned
    assert programs["distill"]["outputs"] < 1e-3 * programs["distill"]["arguments"]


def test_nothing_is_replicated_by_accident(planned):
    planner, programs = planned
    layers = planner.model.config.depth
    parameters = checkpoint.parameter_count(planner.state.params)
    found = programs["distill"]["collectives"]
    # Each layer's weights are gathered on the way forward and back, the teacher's once; matrices in
    # bfloat16.
    assert found["all-gather"]["bytes"] <= 1.05 * (2 + 1) * 2 * parameters
    assert found["all-gather"]["runs"] >= layers
    # What is left of it: rows of the condition meet the split weights outside the blocks.
    assert found["all-to-all"]["bytes"] < 0.005 * 4 * parameters
    # Gradients are summed once, and scattered: over the four chips that share them first, then what
    # each keeps over the two copies. (The compiler sums those whose parts are no whole tiles in
    # full: here two of six matrices, none of XL's.)
    sums = [entry for kind, entry in found.items() if "reduce" in kind]
    assert sum(entry["bytes"] for entry in sums) <= 3 * parameters
    assert sum(entry["wire_bytes"] for entry in sums) <= 3 * parameters
    # No array on a chip is larger than the activations that remat=dots saves of the chip's eight
    # images, all layers stacked.
    saved = layers * 8 * 64 * 4 * 256 * 2
    largest = max(size for size, _, _ in programs["distill"]["largest"])
    assert largest <= max(saved, 4 * parameters / 4)


def test_a_weights_gradient_is_one_product_and_one_sum():
    """Left to itself the compiler makes a loop of parts, of which each reads the activations."""
    mesh = sharding.make_mesh(1, 8, topology_devices("v5e:2x4"))
    rows = sharding.batch_sharding(mesh)
    shapes = [(256, 1024, width) for width in (1152, 4608)]
    x, do = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=rows) for s in shapes)
    split = sharding.fsdp_sharding(jax.ShapeDtypeStruct((1152, 4608), jnp.float32), mesh)

    def moved(options):
        def gradient(x, do):
            return jnp.einsum("btd,btf->df", x, do)

        compiled = jax.jit(gradient, out_shardings=split, compiler_options=options)
        return hlo.Program(compiled.lower(x, do).compile().as_text()).traffic()

    once = 32 * 1024 * (1152 + 4608) * 2
    assert moved(sharding.compiler_options(mesh)) < 1.2 * once < moved({})


def test_the_programs_are_those_that_a_tpu_would_run():
    """Not what this machine's CPU would pick; a name in the config stands."""
    devices = topology_devices("v5e:2x4")

    def implementations(**model):
        config = tiny_config(fsdp=4)
        config.model.update(model)
        planner = plan.Planner(config, devices)
        return planner.model.implementation, planner.teacher.implementation

    # 256 tokens: the flash kernel takes 128 and more.
    assert implementations(patch_size=2) == ("pallas_tpu", "pallas_tpu")
    assert implementations(implementation="xla") == ("xla", "xla")
    assert implementations(conv_size=9)[0] == "xla"  # no kernel offers it
    message = "model.implementation = pallas_gpu runs on gpu devices, these are tpu devices"
    with pytest.raises(ValueError, match=message):
        implementations(implementation="pallas_gpu")


def test_a_plan_comes_before_the_weights():
    """LiT-S from DiT-XL: without the file the teacher has the config's size, and that is told."""
    config = imagenet256_lit_s.get_config()
    config.teacher.checkpoint = "nowhere/DiT-XL-2-256x256.pt"
    planner = plan.Planner(config, topology_devices("v5e:2x4"))
    student, teacher = planner.model.config, planner.teacher.config
    assert (student.width, teacher.width, teacher.depth) == (384, 1152, 28)
    heading = planner.heading()
    assert (
        "nowhere/DiT-XL-2-256x256.pt is not there (yet): "
        "the teacher planned is a DiT of 28 layers of width 1152" in heading
    )
    # DiT-XL/2, less the 256 x 1152 of the position table.
    assert "teacher 674,834,720 (pallas_tpu)" in heading


def test_cores_that_are_devices_are_not_counted_as_chips():
    config = tiny_config(fsdp=8)
    config.plan.topology = "tpu7x:2x2x1"
    config.model.update(depth=2, width=64, implementation="xla")
    config.sample.cfg_scale = 1.0
    planner = plan.Planner(config, topology_devices("tpu7x:2x2x1"))
    assert "tpu7x:2x2x1, 4 chips of 2 cores, each of them a device of JAX, " in planner.heading()
    estimate = planner.estimate("sample", 8)
    assert estimate.capacity < 96 * chips.GiB and " GiB a core (" in plan.describe(estimate)
    assert estimate.seconds["memory"] * 3.69e12 == pytest.approx(estimate.traffic)


def test_the_heading_says_that_the_decoder_is_left_out_and_what_it_weighs():
    config = tiny_config()
    config.model.in_channels = 4
    config.autoencoder.checkpoint = "sd-vae-ft-ema"  # which is not read
    planner = plan.Planner(config, topology_devices("v5e:2x4"))
    assert "to decode them" in planner.heading()
    config.autoencoder.checkpoint = ""  # pixels
    assert "decode" not in planner.heading()
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), images)
    parameters = checkpoint.parameter_count(shapes)
    size = 4 * parameters / chips.GiB
    assert f"{size:.2f} GiB for the {parameters:,} parameters" in plan.AUTOENCODER


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_device_of_the_plan_has_the_memory_that_the_compiler_lets_it_use(topology):
    devices = topology_devices(topology)
    assert len(devices) == 4 * chips.TPUS[devices[0].device_kind].per_chip
    where = jax.sharding.SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((2**34,), np.float32, sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x[::-1] + x).lower(huge).compile()
    needed, allowed = plan.memory_shortage(str(refused.value))
    assert needed >= 64 * chips.GiB
    # The text has two decimals.
    assert allowed == pytest.approx(chips.TPUS[devices[0].device_kind].memory, rel=1e-3)


def test_both_refusals_of_the_compiler_are_understood():
    long = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 18.42G of 15.75G hbm. Exceeded hbm capacity by 2.67G."
    )
    short = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (18.42G) exceeds available HBM (15.75G). HLO module: "
        "jit_draw."
    )
    expected = (18.42 * chips.GiB, 15.75 * chips.GiB)
    assert plan.memory_shortage(long) == plan.memory_shortage(short) == expected
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"
    assert plan.memory_shortage(other) is None


def test_a_real_program_that_does_not_fit_is_told_by_how_much(planned):
    estimate = planned[0].estimate("sample", 2**20)
    assert not estimate.fits and estimate.needs > estimate.capacity == 15.75 * chips.GiB


def test_the_program_does_not_grow_with_the_depth():
    """The blocks are one scanned body: so compile time does not grow either."""
    lines = []
    for depth in (2, 8):
        config = tiny_config(fsdp=4)
        config.model.update(depth=depth, width=64, implementation="xla")
        planner = plan.Planner(config, topology_devices("v5e:2x4"))
        lines.append(len(planner.lower("distill", 64).as_text().splitlines()))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("jump, needs, largest", [(0, 34, 1792), (2, 36, 1536)])
def test_a_program_that_does_not_fit_says_by_how_much_and_what_would(
    tmp_path, monkeypatch, capsys, jump, needs, largest
):
    """8 MiB an image, and `jump` GiB more above 512, as when the compiler changes its mind."""

    def estimate(self, program, batch_size=0):
        batch_size = batch_size or 4096
        needs = 2 * chips.GiB + batch_size * 2**23 + jump * chips.GiB * (batch_size > 512)
        tried.append(batch_size)
        return plan.Estimate(
            program,
            batch_size,
            needs <= 16 * chips.GiB,
            needs,
            16 * chips.GiB,
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
    mesh = sharding.make_mesh(-1, 8, topology_devices("v5e:2x4", 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8}
    assert [{device.slice_index for device in row} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="^data = 1 is not a multiple of the 2 slices"):
        sharding.make_mesh(1, 16, topology_devices("v5e:2x4", 2))


def test_a_mesh_need_not_be_made_of_whole_axes_of_the_torus():
    """The same command on any slice: of 4 x 4 x 4, 8 takes one axis and half of the next."""
    mesh = sharding.make_mesh(-1, 8, topology_devices("v5p:4x4x4"))
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8}
    for row in mesh.devices:  # neighbours: the eight that share a copy lie in a box of 8 chips
        assert np.prod(np.ptp([device.coords for device in row], axis=0) + 1) == 8


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e:3x7", "plan.topology = 'v5e:3x7'"),
        ("", "plan.topology must name a TPU slice"),
        ("v3:2x2x1", "plan.topology = v3:2x2x1 is of TPU v3"),
    ],
)
def test_an_unknown_topology_is_one_clear_line(tmp_path, topology, message):
    config = tiny_config()
    config.plan.topology = topology
    with pytest.raises(ValueError, match=message):
        plan.run(config, tmp_path)


def test_a_bucket_is_planned_at_its_own_sides():
    """In cells of the model's input: 64 latents a side are sixteen units of four."""
    config = tiny_config()
    config.model.input_size = 64
    assert plan.of_bucket(config, "8x32").model.input_size == (32, 128)
    assert plan.of_bucket(config, "").model.input_size == 64
    with pytest.raises(ValueError, match="^plan.buckets must be .*got"):
        plan.of_bucket(config, "3x3")
