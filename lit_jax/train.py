"""The main job: plain diffusion training, or the conversion of a pretrained DiT into a LiT when a teacher is named."""
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from lit_jax import checkpoint, data, generate, inherit, porting, records, sharding, step
from lit_jax.diffusion import make_diffusion
from lit_jax.models.dit import DiT, forward_flops, make_dit

# What a teacher or a source of weights must share with the student, whatever its size.
SHARED_FIELDS = ("in_channels", "num_classes", "learn_sigma")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains config.model until config.train.steps, resuming from the workdir's newest checkpoint.

    Leaves config.json, checkpoints/, metrics.jsonl, tensorboard/, previews/, samples.png and report.json in the workdir.
    Raises: ValueError or FileNotFoundError, before anything is written, for a config that cannot be run.
    """
    launched = time.monotonic()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_fields(config, mesh)
    model = student_from_config(config)
    teacher, teacher_source = open_teacher(config, model)
    source = data.open_source(config.data.name, config.data.dir, config.data.split)
    check_data(config, source)
    init_source = open_init_source(config, model, teacher_source)
    diffusion = make_diffusion()
    optimizer = step.make_optimizer(steps=config.train.steps, **config.optimizer)

    # Shapes, then shardings from shapes, then arrays: no full copy ever sits on one device.
    shapes = step.state_shapes(model, optimizer, config.model.input_size)
    shardings = sharding.fsdp_sharding(shapes, mesh)
    teacher_params = load_teacher(teacher, teacher_source, config.teacher.dtype, mesh) if teacher else None

    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
    checkpoints = checkpoint.Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep,
                                          keep_every=config.checkpoint.keep_every)
    restored = checkpoints.restore(step.with_sharding(shapes, shardings).items())
    if restored:
        first_step, items, data_state, _ = restored
        state = step.TrainState.from_items(items)
        logging.info("resumed from step %d of %s", first_step, workdir)
    else:
        first_step, data_state = 0, None
        state = new_student(config, model, optimizer, shardings, init_source, workdir)

    train_step = step.make_train_step(
        model, optimizer, diffusion, teacher=teacher, mesh=mesh, label_dropout=config.train.label_dropout,
        accumulation=config.train.accumulation, ema_decay=config.ema.decay, ema_warmup=config.ema.warmup, **config.distill)
    batches = data.DeviceIterator(
        data.make_batches(source, batch_size=config.train.batch_size, seed=config.seed, flip=config.data.flip,
                          num_threads=config.data.num_threads, prefetch=config.data.prefetch),
        sharding.batch_sharding(mesh), data_state)
    metadata = {"model": architecture(model, config), "data": config.data.name, "seed": config.seed}
    previews = Previews(config, model, teacher, diffusion, mesh, workdir)
    size = (config.model.input_size,) * 2
    flops = 3 * forward_flops(model, size) + (forward_flops(teacher, size) if teacher else 0)
    log = records.Records(workdir, total_steps=config.train.steps, images_per_step=config.train.batch_size,
                          flops_per_step=config.train.batch_size * flops)

    rng = jax.random.key(config.seed)
    for now in range(first_step + 1, config.train.steps + 1):
        state, metrics = train_step(state, teacher_params, next(batches), rng)
        if now == first_step + 1:
            jax.block_until_ready(metrics)
            logging.info("first step after %.1f s", time.monotonic() - launched)
            log.start(now)
        last = now == config.train.steps
        if now % config.train.log_every == 0 or last:
            written = log.write(now, read_metrics(metrics, state))
            if written["train/skipped_in_a_row"] >= config.train.stop_after_bad_steps:
                checkpoints.wait()
                raise ValueError(f"the loss or its gradient was not finite in {int(written['train/skipped_in_a_row'])} steps "
                                 f"in a row, up to step {now}; train.stop_after_bad_steps is "
                                 f"{config.train.stop_after_bad_steps}. The last checkpoint is step {checkpoints.latest_step()}")
        if now % config.checkpoint.every == 0 or last:
            checkpoints.save(now, state.items(), data=batches.state, metadata=metadata)
        if config.train.preview_every and (now % config.train.preview_every == 0 or last):
            picture = previews.draw(state.ema_params, teacher_params, now)
            log.add_picture("preview", now, picture)
            log.start(now)  # a preview is not training time
    checkpoints.wait()
    checkpoints.close()
    log.close()


def check_fields(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for values that cannot work, naming the field and both values."""
    train = config.train
    sharding.check_batch(train.batch_size, mesh)
    for name in ("steps", "accumulation", "log_every"):
        if train[name] < 1:
            raise ValueError(f"train.{name} must be at least 1, got {train[name]}")
    if train.batch_size % (mesh.size * train.accumulation):
        raise ValueError(f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = "
                         f"{train.accumulation} times the {mesh.size} devices of the mesh")
    if not 0 <= train.label_dropout < 1:
        raise ValueError(f"train.label_dropout must be in [0, 1), got {train.label_dropout}")
    if not 0 <= config.ema.decay < 1:
        raise ValueError(f"ema.decay must be in [0, 1), got {config.ema.decay}")


def student_from_config(config: ConfigDict) -> DiT:
    fields = {name: value for name, value in config.model.items() if name != "input_size"}
    model = make_dit(remat=config.train.remat, **fields)
    if config.model.input_size % model.patch_size:
        raise ValueError(f"model.patch_size = {model.patch_size} does not divide model.input_size = {config.model.input_size}")
    return model


def architecture(model: DiT, config: ConfigDict) -> dict[str, Any]:
    """What a checkpoint says of its model: enough to build it again, in the porter's terms."""
    grid = config.model.input_size // model.patch_size
    names = ("attention", "depth", "width", "num_heads", "patch_size", "in_channels", "num_classes", "learn_sigma", "qkv_bias",
             "conv_size", "kernel_function", "timestep_freq_shift", "mlp_norm_epsilon")
    return {name: getattr(model, name) for name in names} | {"grid": (grid, grid)}


def open_teacher(config: ConfigDict, student: DiT) -> tuple[DiT | None, porting.Checkpoint | None]:
    """The teacher's model and its checkpoint, still on disk; (None, None) for plain training."""
    if not config.teacher.checkpoint:
        return None, None
    source = porting.read_checkpoint(config.teacher.checkpoint)
    fields = dict(source.architecture)
    fields.pop("grid")
    if config.teacher.num_heads:
        fields["num_heads"] = config.teacher.num_heads
    if not fields["num_heads"]:
        raise ValueError(f"{config.teacher.checkpoint} does not say how many heads its width of {fields['width']} has; "
                         f"set teacher.num_heads")
    for name in SHARED_FIELDS:
        if fields[name] != getattr(student, name):
            raise ValueError(f"model.{name} = {getattr(student, name)}, but the teacher {config.teacher.checkpoint} has "
                             f"{fields[name]}")
    return make_dit(size="XL", dtype=config.teacher.dtype, **fields), source


def open_init_source(config: ConfigDict, student: DiT, teacher_source: porting.Checkpoint | None) -> porting.Checkpoint | None:
    """What the student inherits from; None: nothing."""
    if config.student.init == "random":
        return None
    if config.student.init == "teacher":
        if teacher_source is None:
            raise ValueError("student.init = teacher, but teacher.checkpoint is empty; name one, or set student.init=random")
        return teacher_source
    return porting.read_checkpoint(config.student.init)


def check_data(config: ConfigDict, source: data.ImageSource) -> None:
    wanted = (config.model.input_size, config.model.input_size, config.model.in_channels)
    if source.image_shape != wanted:
        raise ValueError(f"model.input_size and model.in_channels make images of {wanted}, those of data.name = {source.name} "
                         f"are {source.image_shape}")
    if source.num_classes != config.model.num_classes:
        raise ValueError(f"model.num_classes = {config.model.num_classes}, but data.name = {source.name} has "
                         f"{source.num_classes} classes")


def load_teacher(teacher: DiT, source: porting.Checkpoint, dtype: str, mesh: jax.sharding.Mesh) -> Any:
    """The teacher's parameters on the mesh, sharded by shape, kept in `dtype`."""
    shardings = sharding.fsdp_sharding(source.params, mesh)
    params = porting.load_params(source.params, shardings)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def new_student(config: ConfigDict, model: DiT, optimizer: Any, shardings: Any, source: porting.Checkpoint | None,
                workdir: pathlib.Path) -> step.TrainState:
    """A state at step 0: fresh parameters on the mesh, then what is inherited, then EMA and optimizer state from those."""
    # Init draws from its own stream, away from the steps' fold_in(key(seed), step).
    rng = jax.random.split(jax.random.key(config.seed), 2)[1]
    init = functools.partial(step.init_params, model, input_size=config.model.input_size)
    params = jax.jit(init, out_shardings=shardings.params)(rng)
    if source:
        params, report = inherit.merge_params(source.params, params, load=tuple(config.inherit.load),
                                              keep_init=tuple(config.inherit.keep_init))
        if jax.process_index() == 0:
            report.save(workdir / "inheritance.json")
            logging.info("%s", report.summary())
    return jax.jit(lambda p: step.new_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)


def read_metrics(metrics: dict[str, jax.Array], state: step.TrainState) -> dict[str, float]:
    metrics = metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}


class Previews:
    """Grids of fixed noise and labels: the teacher's row, drawn once, over the student's."""

    def __init__(self, config: ConfigDict, model: DiT, teacher: DiT | None, diffusion: Any, mesh: jax.sharding.Mesh,
                 workdir: pathlib.Path):
        self._folder = workdir / "previews"
        count = min(config.train.preview_images, 10 * config.model.num_classes)
        make = functools.partial(
            generate.Generator, diffusion=diffusion, mesh=mesh, size=config.model.input_size, seed=config.seed,
            batch_size=-(-count // mesh.size) * mesh.size, sampler=config.sample.sampler, steps=config.sample.steps,
            cfg_scale=config.sample.cfg_scale, cfg_channels=config.sample.cfg_channels,
            cfg_interval=tuple(config.sample.cfg_interval), clip_denoised=config.sample.clip_denoised)
        self._student, self._teacher = make(model), teacher and make(teacher)
        self._index = np.arange(count)
        self._labels = self._student.labels(self._index, "balanced")
        self._teacher_row = None

    def draw(self, ema_params: Any, teacher_params: Any, now: int) -> Image.Image:
        rows, titles = [], []
        if self._teacher:
            if self._teacher_row is None:
                self._teacher_row = records.to_uint8(self._teacher(teacher_params, self._index, self._labels))
            rows, titles = [self._teacher_row], ["teacher"]
        rows.append(records.to_uint8(self._student(ema_params, self._index, self._labels)))
        titles.append("student" if self._teacher else "model")
        picture = records.image_grid(rows, titles)
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            picture.save(self._folder / f"step_{now:07d}.png")
        return picture
