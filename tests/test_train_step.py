"""The one train step: distillation, plain training, dropout, EMA, accumulation, the mesh.

Also: steps that are not finite. Where a test is about the step alone, the step is compiled for a
model of one parameter. Where it is about the models in the step, it is compiled for small real
models.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from oracles import assert_close

from lit_jax import checkpoint, inherit, sharding
from lit_jax.diffusion import GaussianDiffusion
from lit_jax.models import param_shapes
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.train_step import (
    OptimizerSettings,
    StepSettings,
    TrainState,
    images_to_model,
    make_optimizer,
    make_train_step,
    new_state,
    state_shapes,
)

PROCESS = GaussianDiffusion()
OPTIMIZER = dict(
    learning_rate=1e-2,
    b1=0.9,
    b2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,
    schedule="constant",
    warmup=0,
    steps=100,
)
STEP = dict(ema_decay=0.9)
RNG = jax.random.key(7)


# The optimizer. -----------------------------------------------------------------------------------


def adamw_oracle(
    x,
    gradients,
    *,
    learning_rate,
    b1,
    b2,
    epsilon,
    weight_decay,
    clip_norm,
    schedule,
    warmup,
    steps,
):
    """AdamW step by step in float64, written from the paper's equations."""
    x, m, v, path = np.array(x, np.float64), 0.0, 0.0, []
    for n, g in enumerate(gradients):
        norm = np.sqrt((g**2).sum())
        if clip_norm and norm > clip_norm:
            g = g * clip_norm / norm
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rate = learning_rate
        if n < warmup:
            rate *= (n + 1) / warmup
        elif schedule == "cosine":
            rate *= 0.5 * (1 + np.cos(np.pi * (n - warmup) / (steps - warmup)))
        x = x - rate * (
            m / (1 - b1 ** (n + 1)) / (np.sqrt(v / (1 - b2 ** (n + 1))) + epsilon)
            + weight_decay * x
        )
        path.append(x)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(weight_decay=0.1),
        dict(clip_norm=1.0),
        dict(warmup=3),
        dict(warmup=1),
        dict(schedule="cosine", steps=8),
        dict(schedule="cosine", warmup=4, steps=8, b2=0.95, epsilon=1e-3),
    ],
)
def test_the_optimizer_follows_its_equations(change):
    fields = OPTIMIZER | change
    optimizer = make_optimizer(OptimizerSettings(**fields))
    gradients = np.random.default_rng(0).standard_normal((8, 5))
    x = jnp.array(np.linspace(-1, 1, 5), jnp.float32)
    state, expected = optimizer.init(x), adamw_oracle(x, gradients, **fields)
    for g, wanted in zip(gradients, expected):
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, x)
        x = optax.apply_updates(x, updates)
        assert_close(x, wanted, factor=16)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(schedule="linear"), "schedule must be one of constant, cosine; got 'linear'"),
        (dict(warmup=100), "^warmup = 100 is not shorter than steps = 100"),
    ],
)
def test_impossible_optimizers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**OPTIMIZER | change)


# A model of one parameter. ------------------------------------------------------------------------


class WithTextEncoder(DiTConfig):
    text_encoder_name = "text"


@flax.struct.dataclass
class Scalar:
    """Predicts w times one function of (t, label, drop) in every pixel; without a variance head."""

    function: str = flax.struct.field(pytree_node=False)
    config: DiTConfig = flax.struct.field(pytree_node=False, default=DiTConfig(1, 4, 1))

    def apply(self, variables, x, t, condition, drop):
        w = variables["params"]["w"]
        label = condition["label"]
        value = {
            "null": drop.astype(jnp.float32),
            "t": t.astype(jnp.float32),
            "one": jnp.ones(len(label)),
            "three": jnp.where(label == 3, jnp.inf, 1.0),
        }[self.function]
        return w * jnp.broadcast_to(value[:, None, None, None], x.shape)


def scalar_step(model, w=1.0, teacher=None, **change):
    """A step and a state for a `Scalar`, or that of a function, on a mesh of one device."""
    model = Scalar(model) if isinstance(model, str) else model
    optimizer = OptimizerSettings(**OPTIMIZER)
    settings = StepSettings(**STEP | change)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    train_step = make_train_step(model, teacher, PROCESS, optimizer, settings, mesh)
    return train_step, fresh_state({"w": np.float32(w)}, make_optimizer(optimizer))


def fresh_state(params, optimizer):
    """A state as the training job makes it, in one program.

    So no two leaves share memory, which a donated state needs. It lies where a step leaves it, on a
    mesh of one device: elsewhere the second step would be another program.
    """
    where = sharding.replicated(sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
    return jax.jit(lambda p: new_state(p, optimizer), out_shardings=where)(params)


def make_images(count, size=2, channels=1, label=None):
    rng = np.random.default_rng(count)
    return {
        "image": rng.integers(0, 256, (count, size, size, channels), np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32)
        if label is None
        else np.full(count, label, np.int32),
    }


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_labels_are_dropped_at_the_rate_asked_for(rate):
    """With w = 1000 the squared error is 1e6 times the share of null labels.

    The noise adds 1 to it.
    """
    train_step, state = scalar_step("null", w=1000.0, dropout=rate)
    where = state.params["w"].sharding
    B = 4096
    shares = []
    for _ in range(4):
        state, metrics = train_step(state, None, make_images(B), RNG)
        shares.append(float(metrics["mse"]) / 1e6)
        state = state.replace(params=jax.device_put({"w": np.float32(1000.0)}, where))
    deviation = np.sqrt(rate * (1 - rate) / (4 * B))
    # The noise adds 1e-6, and its product with the constant 2e-3 / sqrt(pixels) of the share: 2e-5.
    assert abs(np.mean(shares) - rate) < 5 * deviation + 4e-5
    if rate:
        assert len(set(shares)) == 4  # other labels each step


def test_timesteps_are_uniform_over_the_whole_schedule():
    train_step, state = scalar_step("t", w=1.0)
    where = state.params["w"].sharding
    B, squares = 4096, []
    for _ in range(4):
        state, metrics = train_step(state, None, make_images(B), RNG)
        squares.append(float(metrics["mse"]))
        state = state.replace(params=jax.device_put({"w": np.float32(1.0)}, where))
    expected = np.mean(np.arange(1000.0) ** 2)
    deviation = np.std(np.arange(1000.0) ** 2) / np.sqrt(4 * B)
    assert abs(np.mean(squares) - expected) < 5 * deviation


def test_the_draws_depend_on_the_step_and_the_seed_alone():
    train_step, state = scalar_step("t")
    batch, losses = make_images(64), {}
    for name, number, rng in (
        ("first", 0, 7),
        ("again", 0, 7),
        ("next step", 1, 7),
        ("other seed", 0, 8),
    ):
        start = jax.tree.map(jnp.copy, state).replace(step=jnp.int32(number))
        _, metrics = train_step(start, None, batch, jax.random.key(rng))
        losses[name] = float(metrics["loss"])
    assert losses["first"] == losses["again"]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("warmup", [False, True])
def test_the_ema_matches_the_oracle(warmup):
    train_step, state = scalar_step(
        "one", w=5.0, ema_warmup=warmup, ema_decay=0.9 if not warmup else 0.35
    )
    ema = 5.0
    for number in range(8):
        state, _ = train_step(state, None, make_images(16), RNG)
        decay = (
            min(0.35, (1 + number) / (10 + number)) if warmup else 0.9
        )  # the bound is reached at step 4
        ema = decay * ema + (1 - decay) * float(state.params["w"])
        assert float(state.ema_params["w"]) == pytest.approx(ema, rel=1e-6)
    assert float(state.params["w"]) < 4.95


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    train_step, state = scalar_step("three", dropout=0.0)
    good, bad = make_images(8, label=1), make_images(8, label=3)
    state, _ = train_step(state, None, good, RNG)
    for run, batch in enumerate([bad, bad, good, bad]):
        before = jax.device_get(state)
        state, metrics = train_step(state, None, batch, RNG)
        after = jax.device_get(state)
        finite = batch is good
        assert np.isfinite(metrics["loss"]) == finite
        assert after.step == before.step + 1
        assert after.skipped == [1, 2, 2, 3][run] and after.skipped_in_a_row == [1, 2, 0, 1][run]
        for part in ("params", "ema_params", "opt_state"):
            same = jax.tree.map(np.array_equal, getattr(before, part), getattr(after, part))
            assert jax.tree.all(same) != finite, part


class Root(Scalar):
    """Predicts the square root of w, whose slope at 0 is infinite."""

    def apply(self, variables, x, t, condition, drop):
        root = jnp.sqrt(variables["params"]["w"])
        return jnp.broadcast_to(root, x.shape)


@pytest.mark.parametrize(
    "model, w, finite",
    [
        (Root(""), 0.0, ["loss"]),
        # The gradient is twice w, the loss its square. The newest JAX squares the gradient for
        # its norm in float32, and overflows there too.
        ("one", 1e20, ["grad_norm"]),
    ],
)
def test_either_of_loss_and_gradient_makes_a_step_a_bad_one(model, w, finite):
    train_step, state = scalar_step(model, w=w)
    before = jax.device_get(state)
    state, metrics = train_step(state, None, make_images(8), RNG)
    assert {name for name in ("loss", "grad_norm") if np.isfinite(metrics[name])} <= {*finite}
    assert state.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)


@flax.struct.dataclass
class Witness(Scalar):
    """Appends what the model is given to `seen`."""

    seen: list = flax.struct.field(pytree_node=False, default_factory=list)

    def apply(self, variables, x, t, condition, drop):
        jax.debug.callback(lambda *given: self.seen.append(given), x, t, drop)
        return super().apply(variables, x, t, condition, drop)


@pytest.mark.parametrize("number", [0, 5])
def test_each_draw_has_its_own_part_of_the_steps_key(number):
    """In this order. Two draws of one key would be tied: a latent's own noise, say, to t's.

    A run that goes on finds the same keys, with a newer version too.
    """
    model = Witness("one")
    train_step, state = scalar_step(model, dropout=0.5)
    shape = (64, 2, 2, 1)
    zeros = np.zeros(shape, np.float16)
    batch = {"mean": zeros, "log_variance": zeros, "label": np.zeros(64, np.int32)}
    train_step(state.replace(step=jnp.int32(number)), None, batch, RNG)
    jax.effects_barrier()
    ((x_t, t, drop),) = model.seen

    keys = jax.random.split(jax.random.fold_in(RNG, number), 4)
    expected_t = PROCESS.draw_t(keys[0], 64)
    noise = jax.random.normal(keys[1], shape)
    x_start = jax.random.normal(keys[3], shape)  # of mean 0 and variance 1
    np.testing.assert_array_equal(t, expected_t)
    np.testing.assert_array_equal(drop, jax.random.bernoulli(keys[2], 0.5, (64,)))
    assert_close(x_t, PROCESS.perturb(x_start, expected_t, noise))


@pytest.mark.parametrize("sees_dropped", [False, True])
def test_the_teacher_sees_the_labels_it_should(sees_dropped):
    """Student and teacher are the same function of the label.

    They differ where the teacher still sees a label that the student does not see.
    """
    train_step, state = scalar_step(
        "null", teacher=Scalar("null"), dropout=0.5, teacher_sees_dropped=sees_dropped
    )
    _, metrics = train_step(state, {"w": np.float32(1.0)}, make_images(4096), RNG)
    assert float(metrics["kd_noise"]) == pytest.approx(
        0.0 if sees_dropped else 0.5, abs=5 * 0.5 / 64
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(variance_target="sigma"), "variance_target must be one of raw, log_variance; got"),
        (dict(dropout=1.0), "dropout must be in .0, 1.; got 1.0"),
        (dict(accumulation=0), "accumulation must be at least 1; got 0"),
        (
            dict(denoising_weight=0.0, noise_weight=0.0, variance_weight=0.0),
            "^denoising_weight = 0, and so are all other weights",
        ),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        StepSettings(**change)


def test_what_was_inherited_has_a_rate_of_its_own():
    moved = {}
    for inherited in ((), ("w",)):
        optimizer = OptimizerSettings(**OPTIMIZER | dict(inherited_rate=0.25, weight_decay=0.1))
        settings = StepSettings(**STEP, inherited=inherited)
        mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
        step = make_train_step(Scalar("one"), None, PROCESS, optimizer, settings, mesh)
        state = fresh_state({"w": np.float32(-4.0)}, make_optimizer(optimizer))
        state, _ = step(state, None, make_images(8), RNG)
        moved[inherited] = float(state.params["w"]) + 4.0
    # Adam's first step is the rate; weight decay is a tenth of w, times the rate.
    assert moved[()] == pytest.approx(1e-2 * 1.4, rel=1e-3)
    assert moved["w",] == pytest.approx(moved[()] / 4, rel=1e-3)


@flax.struct.dataclass
class TwoScalars(Scalar):
    """Predicts the sum of a Scalar's w and the one parameter of its text encoder."""

    config: DiTConfig = flax.struct.field(pytree_node=False, default=WithTextEncoder(1, 4, 1))

    def apply(self, variables, x, t, condition, drop):
        w = variables["params"]["w"] + variables["params"]["text"]["w"]
        return Scalar("one").apply({"params": {"w": w}}, x, t, condition, drop)


def test_a_text_encoder_in_training_has_a_rate_of_its_own():
    optimizer = OptimizerSettings(**OPTIMIZER | dict(text_rate=0.2))
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    step = make_train_step(TwoScalars("one"), None, PROCESS, optimizer, StepSettings(**STEP), mesh)
    params = {"w": np.float32(-2.0), "text": {"w": np.float32(-2.0)}}
    state, _ = step(fresh_state(params, make_optimizer(optimizer)), None, make_images(8), RNG)
    # Adam's first step is the rate.
    assert float(state.params["w"]) == pytest.approx(-2.0 + 1e-2, rel=1e-4)
    assert float(state.params["text"]["w"]) == pytest.approx(-2.0 + 2e-3, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rate_and_norms_are_in_the_metrics(schedule):
    """Against AdamW's first steps by hand: every element moves by the rate."""
    optimizer = OptimizerSettings(**OPTIMIZER | dict(schedule=schedule, warmup=2, steps=10))
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    settings = StepSettings(**STEP)
    step = make_train_step(Scalar("three"), None, PROCESS, optimizer, settings, mesh)
    state = fresh_state({"w": np.float32(-4.0)}, make_optimizer(optimizer))
    good, bad = make_images(8, label=1), make_images(8, label=3)
    rates = []
    for batch in (good, bad, good, good):
        before = float(state.params["w"])
        state, metrics = step(state, None, batch, RNG)
        rates.append(float(metrics["learning_rate"]))
        assert float(metrics["param_norm"]) == pytest.approx(abs(before))
        if batch is good:
            moved = float(state.params["w"]) - before
            # Adam divides a gradient by its own running size: a constant sign moves by the rate.
            assert float(metrics["update_norm"]) == pytest.approx(abs(moved), rel=1e-4)
            assert abs(moved) == pytest.approx(rates[-1], rel=0.2)
    # A skipped step does not advance the warm-up.
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2])


def test_uint8_becomes_minus_one_to_one():
    pixels = images_to_model({"image": np.array([0, 51, 255], np.uint8)}, RNG)
    np.testing.assert_allclose(pixels, [-1.0, -0.6, 1.0], atol=1e-7)


# Small real models. -------------------------------------------------------------------------------

SIZE = 8
PIXELS = dict(in_channels=1, num_classes=10)
STUDENT = DiT(DiTConfig(2, 32, 2, attention="linear", **PIXELS), dtype=jnp.float32)
TEACHER = DiT(DiTConfig(1, 48, 3, patch_size=4, **PIXELS), dtype=jnp.float32)


def random_params(model, seed):
    """Random parameters everywhere, as large as at init; a fresh model's output would be zero."""
    shapes = param_shapes(model.config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def start():
    """Parameters of student and teacher, in host memory."""
    return random_params(STUDENT, 0), random_params(TEACHER, 10)


@functools.cache
def compiled(data, fsdp, **change):
    """(train_step, place, put, split) on a mesh.

    `place` makes a state there of parameters in host memory, `put` puts a batch there, and `split`
    splits of a state all that can be: a step leaves small arrays whole, so that the next one would
    be another program.
    """
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    fields = OptimizerSettings(**OPTIMIZER | dict(clip_norm=1.0))
    teacher = change.pop("teacher", TEACHER)
    settings = StepSettings(**STEP | change)
    train_step = make_train_step(STUDENT, teacher, PROCESS, fields, settings, mesh)
    optimizer = make_optimizer(fields)
    shardings = sharding.fsdp_sharding(state_shapes(STUDENT, optimizer), mesh, min_size=64)

    def place(params):
        params = jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), params, shardings.params)
        return jax.jit(
            lambda p: new_state(p, optimizer), out_shardings=shardings, donate_argnums=0
        )(params)

    def put(batch):
        return {
            name: jax.device_put(value, sharding.batch_sharding(mesh))
            for name, value in batch.items()
        }

    def split(state):
        return jax.device_put(state, shardings)

    return train_step, place, put, split


def everywhere(tree, data=1, fsdp=1):
    """On every device of the mesh: where a step's program finds the teacher and its key."""
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    return jax.device_put(tree, sharding.replicated(mesh))


BATCH = make_images(16, size=SIZE)
NORMS = {"grad_norm", "param_norm", "update_norm", "learning_rate"}


def run(steps, params, teacher_params, data=2, fsdp=4, batch=BATCH, **change):
    """The host state after so many steps, and each step's metrics."""
    train_step, place, put, split = compiled(data, fsdp, **change)
    state, history = place(params), []
    teacher_params, rng = everywhere((teacher_params, RNG), data, fsdp)
    inputs = put(batch)
    for _ in range(steps):
        # Nothing goes between host and device in a step but what the caller puts there.
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, teacher_params, inputs, rng)
        state = split(state)
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


def test_the_loss_falls_on_one_repeated_batch_and_its_terms_add_up(start):
    state, history = run(40, *start, data=1, fsdp=1)
    assert set(history[0]) == {"loss", "mse", "vb", "kd_noise", "kd_variance"} | NORMS
    for metrics in history:
        total = (
            metrics["mse"]
            + metrics["vb"]
            + 0.5 * metrics["kd_noise"]
            + 0.05 * metrics["kd_variance"]
        )
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    for name in (
        "loss",
        "mse",
        "vb",
    ):  # not the distance to the teacher: that of this test is random, and mse pulls away
        first, last = (
            np.mean([metrics[name] for metrics in part]) for part in (history[:5], history[-5:])
        )
        assert last < 0.7 * first, name
    assert state.step == 40 and state.skipped == 0


def test_layers_alone_are_regressed_where_nothing_else_has_a_weight(start):
    """On several devices: the one term falls, and attention alone moves."""
    alone = dict(noise_weight=0.0, variance_weight=0.0, denoising_weight=0.0, attention_weight=2.0)
    teacher = DiT(DiTConfig(2, 32, 4, **PIXELS), dtype=jnp.float32)
    params = start[0]
    state, history = run(12, params, random_params(teacher, 5), teacher=teacher, **alone)
    assert set(history[0]) == {"loss", "kd_attention"} | NORMS
    assert history[0]["loss"] == pytest.approx(2.0 * history[0]["kd_attention"])
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    before = flatten_dict(params, sep="/")
    for path, leaf in flatten_dict(state.params, sep="/").items():
        assert ("blocks/attn/" in path) == (leaf != before[path]).any(), path


def test_features_are_one_more_term_and_can_be_the_only_one(start):
    """Along the student's own path: what is before its attentions moves too."""
    teacher = DiT(DiTConfig(2, 32, 4, **PIXELS), dtype=jnp.float32)
    params, frozen = start[0], random_params(teacher, 5)
    alone = dict(noise_weight=0.0, variance_weight=0.0, denoising_weight=0.0, feature_weight=2.0)
    state, history = run(12, params, frozen, teacher=teacher, **alone)
    assert history[0]["loss"] == pytest.approx(2.0 * history[0]["kd_features"])
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    moved = state.params["x_embedder"]["proj"]["kernel"]
    assert (moved != params["x_embedder"]["proj"]["kernel"]).all()
    _, ((_, *_, both)) = run(3, params, frozen, teacher=teacher, feature_weight=0.25)
    plain = both["mse"] + both["vb"] + 0.5 * both["kd_noise"] + 0.05 * both["kd_variance"]
    assert both["loss"] == pytest.approx(plain + 0.25 * both["kd_features"], rel=1e-5)


def test_the_teacher_does_not_move(start):
    params, teacher = start
    kept = jax.tree.map(np.array, teacher)
    on_device, rng = everywhere((teacher, RNG))
    train_step, place, put, _ = compiled(1, 1)
    state = place(params)
    for _ in range(3):
        state, _ = train_step(state, on_device, put(BATCH), rng)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(on_device), kept)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), jax.device_get(state.params), params
    )
    assert jax.tree.all(moved)  # every leaf of the student does


def test_the_state_is_donated(start):
    params, teacher = start
    train_step, place, put, _ = compiled(1, 1)
    old = place(params)
    teacher, rng = everywhere((teacher, RNG))
    train_step(old, teacher, put(BATCH), rng)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def assert_same_run(one, other, *, reduction=100):
    """Asserts that two runs agree up to the rounding of sums in another order.

    It compares the metrics, and every parameter in units of the largest value of its array.
    """
    (state_a, history_a), (state_b, history_b) = one, other
    for a, b in zip(history_a, history_b, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    for name in ("params", "ema_params"):
        a, b = (checkpoint.flatten(getattr(state, name)) for state in (state_a, state_b))
        for path in a:
            assert_close(a[path], b[path], reduction=reduction, what=path)


@pytest.fixture(scope="module")
def reference(start):
    """Two steps on the mesh of eight devices."""
    return run(2, *start)


def test_one_device_equals_eight(start, reference):
    # Adam divides by the root of its second moment. Where a gradient is nothing but rounding, the
    # sign of the update is too. Parameters are about one and move by 1e-2 a step, so an update that
    # differs by a hundredth is 1e-4 of their size.
    assert_same_run(run(2, *start, data=1, fsdp=1), reference, reduction=1e5)


def test_accumulation_of_four_equals_one(start, reference):
    # Each microbatch normalises its own sums: the mean of four means instead of one.
    other = run(2, *start, data=1, fsdp=1, accumulation=4)
    assert_same_run(other, reference, reduction=1e5)


def test_distillation_weights_of_zero_are_plain_training(start, reference):
    params, teacher = start
    alone = dict(data=1, fsdp=1)
    weightless = run(2, params, teacher, **alone, noise_weight=0.0, variance_weight=0.0)
    plain = run(2, params, None, **alone, teacher=None)
    assert set(plain[1][0]) == {"loss", "mse", "vb"} | NORMS
    for a, b in zip(weightless[1], plain[1], strict=True):
        assert a["kd_noise"] > 0 and {name: a[name] for name in b} == pytest.approx(b, rel=1e-5)
    assert_same_run((weightless[0], plain[1]), plain, reduction=1e5)
    assert reference[1][1]["mse"] != pytest.approx(
        plain[1][1]["mse"], rel=1e-6
    )  # weights that are not zero do count


def test_save_restore_step_is_bitwise_the_uninterrupted_step(start, tmp_path):
    params, teacher = start
    train_step, place, put, _ = compiled(1, 1)
    teacher, rng = everywhere((teacher, RNG))
    state = place(params)
    for _ in range(2):
        state, _ = train_step(state, teacher, put(BATCH), rng)
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=1, keep_every=0)
    checkpoints.save(2, state.items(), data={"at": 2}, metadata={})
    # It donates what is still being written.
    state, metrics = train_step(state, teacher, put(BATCH), rng)
    checkpoints.wait()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place(params)
    )
    number, items, data, _ = checkpoints.restore(shapes.items())
    resumed, resumed_metrics = train_step(TrainState.from_items(items), teacher, put(BATCH), rng)
    checkpoints.close()
    assert number == 2 and data == {"at": 2} and int(resumed.step) == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(state))
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(resumed_metrics), jax.device_get(metrics)
    )


def test_a_student_inherits_and_then_trains_from_its_teacher():
    """A sharded student inherits: its step has a finite loss, and its new attention moves."""
    softmax = DiT(DiTConfig(2, 32, 2, **PIXELS), dtype=jnp.float32)
    teacher = random_params(softmax, 20)
    fresh = jax.tree.map(jnp.asarray, random_params(STUDENT, 30))
    merged, _ = inherit.merge_params(teacher, fresh)
    state, history = run(2, jax.device_get(merged), random_params(TEACHER, 10), data=1, fsdp=1)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in history)
    assert (
        state.params["blocks"]["attn"]["dwc"]["kernel"] != merged["blocks"]["attn"]["dwc"]["kernel"]
    ).any()
