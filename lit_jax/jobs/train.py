"""The main job: plain diffusion training, or the conversion of a pretrained DiT into a LiT when a teacher is named."""

import collections
import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from lit_jax import checkpoint, experiment, inherit, pictures, sampling, sharding
from lit_jax.costs import chips
from lit_jax.data import dataset, pipeline
from lit_jax.diffusion import make_diffusion
from lit_jax.evaluation import features, protocol, references, reports
from lit_jax.evaluation.label_classifier import LabelClassifier
from lit_jax.models.dit import ARCHITECTURE, DiT, forward_flops
from lit_jax.porting.read import Checkpoint, load_params, read_checkpoint
from lit_jax.runtime import exit_status, metric_writer, preemption, progress, workdir_lock
from lit_jax.train_step import TrainState, init_params, new_state, state_shapes, with_sharding

STEPS_AHEAD = 2  # how many steps the loop dispatches before it waits for one to end


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains config.model until config.train.steps, resuming from the workdir's newest checkpoint.

    Leaves config.json, checkpoints/, metrics.jsonl, tensorboard/, previews/, samples.png and report.json in the workdir.
    Raises: ValueError or FileNotFoundError, before anything is written, for a config that cannot be run.
    """
    with (
        contextlib.ExitStack() as held
    ):  # what lasts to the end, whatever that is: the watch over what may hang, the workdir
        watchdog = held.enter_context(
            contextlib.closing(preemption.Watchdog(config.train.watchdog))
        )
        train(config, workdir, watchdog, held)


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    watchdog: preemption.Watchdog,
    held: contextlib.ExitStack,
) -> None:
    """`run`, with a watch over what may hang; `held` takes the workdir before its first file."""
    start_up = progress.StartUp()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    experiment.check_batches(config, mesh)
    model = experiment.student(config)
    teacher, teacher_source = open_teacher(config, model)
    init_source = open_init_source(config, model, teacher_source)
    experiment.check_platform(config, mesh)
    optimizer = experiment.optimizer(config)
    diffusion = make_diffusion()
    # Shapes, then shardings from shapes, then arrays: no full copy ever sits on one device.
    shapes = state_shapes(model, optimizer, config.model.input_size)
    shardings = sharding.fsdp_sharding(shapes, mesh)
    wanted = with_sharding(shapes, shardings)
    if init_source:
        inherit.plan_merge(
            init_source.params,
            shapes.params,
            load=tuple(config.inherit.load),
            keep_init=tuple(config.inherit.keep_init),
        )
    source = dataset.open_dataset(config.data.name, config.data.dir, config.data.split)
    autoencoder, identity = experiment.autoencoder(config, mesh)
    experiment.check_data(config, source, identity)
    rows = sharding.batch_sharding(mesh)
    batches = pipeline.make_batches(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        rows=sharding.process_rows(rows, config.train.batch_size),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )
    start_up.part_ended("devices and data")

    teacher_params = load_teacher(teacher_source, config.teacher.dtype, mesh) if teacher else None
    start_up.part_ended("teacher")

    # The program before the files: what cannot be compiled here leaves no trace.
    models = ({"teacher": teacher} if teacher else {}) | {"student": model}
    # No larger than other batches: between two of them the run can be stopped.
    preview_batch = min(
        -(-config.train.preview_images // mesh.size) * mesh.size,
        max(config.sample.batch_size // mesh.size, 1) * mesh.size,
    )
    previews = Previews(
        config,
        experiment.generators(config, models, diffusion, mesh, preview_batch, autoencoder),
        workdir,
    )
    evaluation = None
    if config.evaluate.every:
        evaluation = Evaluation(
            config,
            model,
            diffusion,
            mesh,
            autoencoder,
            identity,
            run_hash(config, source, teacher_source, init_source),
            workdir,
        )
        start_up.part_ended("reference")
    rng = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()
    train_step = experiment.train_step(
        config,
        model,
        teacher,
        optimizer,
        diffusion,
        mesh,
        source.scaling_factor,
        source.shift_factor,
    )
    batch_shapes = pipeline.batch_shapes(source, config.train.batch_size, rows)
    train_step = train_step.lower(wanted, teacher_params, batch_shapes, rng).compile()
    start_up.part_ended("compilation")

    workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(workdir_lock.lock_workdir(workdir))
    checkpoints = checkpoint.Checkpointer(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    fields = decisive_fields(config, source, teacher_source)
    restored = checkpoints.restore(wanted.items(), fields, force=config.checkpoint.force_config)
    # Metrics since the last log line, still on the device: reading them would stop the queue of steps.
    window = []
    if restored:
        first_step, items, data_state, metadata = restored
        state = TrainState.from_items(items)
        window = [
            {name: np.float32(value) for name, value in metrics.items()}
            for metrics in metadata["window"]
        ]
        logging.info("resumed from step %d of %s", first_step, workdir)
    else:
        first_step, data_state = 0, None
        state = new_student(config, model, optimizer, shardings, init_source, workdir)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
    jax.block_until_ready(state)
    start_up.part_ended("state")

    if isinstance(source, dataset.LatentDataset):
        logging.info(
            "latents of %s times %g: standard deviation %s a channel, about 1 is right",
            source.autoencoder["name"],
            source.scaling_factor,
            ", ".join(f"{x:.2f}" for x in source.deviation()),
        )
    batches = pipeline.DeviceIterator(batches, rows, data_state)
    start_up.part_ended("first batch")
    metadata = {
        "model": architecture(model, config),
        "data": config.data.name,
        "seed": config.seed,
        "fields": fields,
    }
    size = (config.model.input_size,) * 2
    flops = 3 * forward_flops(model, size) + (forward_flops(teacher, size) if teacher else 0)
    log = metric_writer.MetricWriter(
        workdir,
        total_steps=config.train.steps,
        images_per_step=config.train.batch_size,
        flops_per_step=config.train.batch_size * flops,
        peak_flops=chips.PEAK_FLOPS.get(jax.devices()[0].device_kind, 0.0) * jax.device_count(),
        first_step=first_step,
    )

    with (
        exit_status.Crashes(workdir / f"crashes_{jax.process_index()}.json", first_step) as crashes,
        contextlib.closing(log),
        contextlib.closing(preemption.Preemption()) as stop,
    ):

        def began() -> None:
            crashes.begun = True
            start_up.part_ended("first step")
            logging.info("%s", start_up)

        def save(state: TrainState, now: int) -> None:
            window[:] = jax.device_get(window)
            unlogged = [
                {name: float(value) for name, value in metrics.items()} for metrics in window
            ]
            checkpoints.save(
                now, state.items(), data=batches.state, metadata=metadata | {"window": unlogged}
            )

        def look(state: TrainState, now: int, *, again: bool = True) -> None:
            """Draws and scores what is due after a step; not `again` where its file is there."""
            last = now == config.train.steps
            if is_due(config.train.preview_every, now, last) and (
                again or is_missing(previews.path(now))
            ):
                params = {"teacher": teacher_params, "student": state.ema_params}
                log.add_picture("preview", now, previews.draw(params, now, stop.check))
                log.start(now)  # a preview is not training time
            if (
                evaluation
                and is_due(config.evaluate.every, now, last)
                and (again or is_missing(evaluation.path(now)))
            ):
                log.write_scores(now, evaluation.score(state.ema_params, now, stop.check))
                log.start(now)

        try:
            if restored:
                look(state, first_step, again=False)
            state = loop(
                config,
                state,
                first_step,
                window,
                batches,
                checkpoints,
                log,
                watchdog,
                stop,
                train_step=lambda state, batch: train_step(state, teacher_params, batch, rng),
                save=save,
                look=look,
                began=began,
            )
            crashes.begun = True
            checkpoints.wait()
            checkpoints.close()
            if jax.process_index() == 0:
                pictures.plot_curves(workdir)
            if config.report.num_images:
                generators = experiment.generators(
                    config, models, diffusion, mesh, config.sample.batch_size, autoencoder
                )
                params = {"teacher": teacher_params, "student": state.ema_params}
                report(
                    config,
                    generators,
                    {name: params[name] for name in models},
                    source,
                    workdir,
                    stop.check,
                )
        except preemption.StopRequest:
            checkpoints.wait()
            raise exit_status.TryAgainError(
                f"stopped on request; step {checkpoints.latest_step()} is saved in {workdir}, the "
                f"same command goes on from there"
            ) from None


def loop(
    config: ConfigDict,
    state: TrainState,
    first_step: int,
    window: list[dict[str, Any]],
    batches: pipeline.DeviceIterator,
    checkpoints: checkpoint.Checkpointer,
    log: metric_writer.MetricWriter,
    watchdog: preemption.Watchdog,
    stop: preemption.Preemption,
    *,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    save: Callable[[TrainState, int], None],
    look: Callable[[TrainState, int], None],
    began: Callable[[], None],
) -> TrainState:
    """The steps after `first_step`; returns the last state, saved or being saved.

    Args:
      window: metrics since the last log line; changed in place. began: called when the first step has ended.
    Raises: StopRequest once the step is being saved. GiveUpError when losses are not finite again and again.
    """
    in_flight, bad_in_a_row, save_is_due, saved = (
        collections.deque(),
        int(state.skipped_in_a_row),
        False,
        first_step,
    )
    for now in range(first_step + 1, config.train.steps + 1):
        state, metrics = train_step(state, next(batches))
        window.append(metrics)
        last = now == config.train.steps
        if now == first_step + 1:
            jax.block_until_ready(metrics)
            began()
            batches.take_seconds_waiting()
            log.start(now)
        # Two steps ahead keep the device busy; more would only delay an answer to SIGTERM or to a hang.
        in_flight.append(metrics)
        if len(in_flight) > STEPS_AHEAD:
            bad_in_a_row = 0 if is_finite(in_flight.popleft()) else bad_in_a_row + 1
        watchdog.step_ended(now - len(in_flight))
        if (
            now % config.train.log_every == 0
            or last
            or bad_in_a_row >= config.train.stop_after_bad_steps
        ):
            means = read_metrics(window, state)
            log.write(now, means, batches.take_seconds_waiting())
            window.clear()
            bad = max(bad_in_a_row, int(means["train/skipped_in_a_row"]))
            if bad >= config.train.stop_after_bad_steps:
                checkpoints.wait()
                raise exit_status.GiveUpError(
                    f"the loss or its gradient was not finite in {bad} steps in a row, up to step {now}; "
                    f"train.stop_after_bad_steps = {config.train.stop_after_bad_steps}. The last checkpoint: "
                    f"{checkpoints.latest_step() or 'none yet'}"
                )
        checkpoints.check()
        save_is_due |= now % config.checkpoint.every == 0
        # Not among bad steps: one that is kept for them would push out the one before them.
        if last or (save_is_due and not state.skipped_in_a_row):
            save(state, now)
            saved, save_is_due = now, False
        try:
            stop.check()
            look(state, now)
        except preemption.StopRequest:
            if saved != now:
                save(state, now)
            raise
    return state


def is_due(every: int, now: int, last: bool) -> bool:
    return every > 0 and (now % every == 0 or last)


def is_missing(path: pathlib.Path) -> bool:
    """Whether process 0 sees no such file; the same answer on every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool(not path.exists())))


def architecture(model: DiT, config: ConfigDict) -> dict[str, Any]:
    """What a checkpoint says of its model: enough to build it again, in the porter's terms."""
    grid = config.model.input_size // model.patch_size
    fields = {name: getattr(model, name) for name in ARCHITECTURE} | {"grid": (grid, grid)}
    return fields | ({"conv_size": 0} if model.attention == "softmax" else {})


def read_field(field: str, path: str, weights: str) -> Checkpoint:
    """The checkpoint that a field of the config names. Raises: FileNotFoundError naming the field when it is not there."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f"{field} = {path}: no such file or folder; it is what another training or download leaves"
        )
    return read_checkpoint(path, weights=weights)


def open_teacher(config: ConfigDict, student: DiT) -> tuple[DiT | None, Checkpoint | None]:
    """The teacher's model and its checkpoint, still on disk; (None, None) for plain training."""
    if not config.teacher.checkpoint:
        return None, None
    source = read_field("teacher.checkpoint", config.teacher.checkpoint, config.teacher.weights)
    return experiment.teacher(config, student, source.architecture), source


def open_init_source(
    config: ConfigDict, student: DiT, teacher_source: Checkpoint | None
) -> Checkpoint | None:
    """What the student inherits from; None: nothing.

    Raises: ValueError where the weights' own code computes by another convention than the student, which no shape tells.
    """
    if config.student.init == "random":
        return None
    source = teacher_source
    if config.student.init != "teacher":
        source = read_field("student.init", config.student.init, config.student.weights)
    elif source is None:
        raise ValueError(
            "student.init = teacher, but teacher.checkpoint is empty; name one, or set student.init=random"
        )
    for name in ("timestep_freq_shift", "mlp_norm_epsilon"):
        ours, theirs = getattr(student, name), source.architecture[name]
        if ours != theirs:
            raise ValueError(
                f"model.{name} = {ours}, but {source.report.source}, which the student inherits from, computes "
                f"with {theirs}; set model.{name}={theirs} or, if it was trained with {ours}, port it with "
                f"port.{name}={ours} first"
            )
    return source


def decisive_fields(
    config: ConfigDict, source: dataset.ImageDataset, teacher_source: Checkpoint | None
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that wrote the checkpoint, by the names of the config.

    Left out: what changes speed, files or rounding alone, and what only a start looks at.
    """
    fields = {
        "seed": config.seed,
        "data.records": repr(source),
        "data.flip": config.data.flip,
        "data.content": f"of checksum {source.content()}",  # the same name and size can be another data set
        "train.batch_size": config.train.batch_size,
        "train.label_dropout": config.train.label_dropout,
    }
    for group in ("model", "distill", "optimizer", "ema"):
        fields |= {
            f"{group}.{name}": value
            for name, value in config[group].items()
            if name != "implementation"
        }
    if config.optimizer.schedule != "constant":
        fields["train.steps"] = config.train.steps
    fields["teacher.checkpoint"] = (
        teacher_source and f"of checksum {teacher_source.report.checksum}"
    )
    return fields | {f"teacher.{name}": config.teacher[name] for name in ("num_heads", "dtype")}


def run_hash(
    config: ConfigDict,
    source: dataset.ImageDataset,
    teacher_source: Checkpoint | None,
    init_source: Checkpoint | None,
) -> str:
    """Tells runs apart whose weights, step by step, are not the same."""
    fields = decisive_fields(config, source, teacher_source) | {
        "init": init_source.report.checksum if init_source else "random",
        "inherit": config.inherit.to_dict(),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def load_teacher(source: Checkpoint, dtype: str, mesh: jax.sharding.Mesh) -> Any:
    """The teacher's parameters on the mesh, sharded by shape, kept in `dtype`."""
    shardings = sharding.fsdp_sharding(source.params, mesh)
    params = load_params(source.params, shardings)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def new_student(
    config: ConfigDict,
    model: DiT,
    optimizer: Any,
    shardings: Any,
    source: Checkpoint | None,
    workdir: pathlib.Path,
) -> TrainState:
    """A state at step 0: fresh parameters on the mesh, then what is inherited, then EMA and optimizer state from those."""
    # Init draws from its own stream, away from the steps' fold_in(key(seed), step).
    rng = jax.random.split(jax.random.key(config.seed), 2)[1]
    init = functools.partial(init_params, model, input_size=config.model.input_size)
    params = jax.jit(init, out_shardings=shardings.params)(rng)
    if source:
        params, report = inherit.merge_params(
            source.params,
            params,
            load=tuple(config.inherit.load),
            keep_init=tuple(config.inherit.keep_init),
        )
        if jax.process_index() == 0:
            report.save(workdir / "inheritance.json")
            logging.info("%s", report.summary())
    return jax.jit(lambda p: new_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(
        params
    )


def is_finite(metrics: dict[str, jax.Array]) -> bool:
    """Whether the step that these are of changed the parameters; waits for its end."""
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))


def read_metrics(window: list[dict[str, jax.Array]], state: TrainState) -> dict[str, float]:
    """Means of the steps since the last log line; a skipped step counts in `skipped`, not in the means."""
    window = jax.device_get(window)
    good = [metrics for metrics in window if is_finite(metrics)]
    means = {name: np.mean([metrics[name] for metrics in good or window]) for name in window[0]}
    counters = jax.device_get(
        {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    )
    return {f"train/{name}": float(value) for name, value in (means | counters).items()}


class Previews:
    """Grids of fixed noise and labels: the teacher's row, drawn once, over the student's."""

    def __init__(
        self, config: ConfigDict, generators: dict[str, sampling.Sampler], workdir: pathlib.Path
    ):
        self._generators, self._folder = generators, workdir / "previews"
        self._index = np.arange(config.train.preview_images)
        self._rows = {}

    def path(self, now: int) -> pathlib.Path:
        return self._folder / f"step_{now:07d}.png"

    def draw(
        self, params: dict[str, Any], now: int, on_batch: Callable[[int], None]
    ) -> Image.Image:
        """Draws, saves and returns the grid; params holds the parameters of each generator's model."""
        for name, generator in self._generators.items():
            if name == "teacher" and name in self._rows:
                continue
            labels = generator.labels(self._index, "balanced")
            self._rows[name] = pictures.to_uint8(
                generator(params[name], self._index, labels, on_batch)
            )
        picture = pictures.image_grid(list(self._rows.values()), list(self._rows))
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            pictures.save_picture(self.path(now), picture)
        return picture


class Evaluation:
    """Scores a few images of the EMA weights during training, against evaluate.reference."""

    def __init__(
        self,
        config: ConfigDict,
        model: DiT,
        diffusion: Any,
        mesh: jax.sharding.Mesh,
        autoencoder: Any,
        identity: dict[str, Any] | None,
        run: str,
        workdir: pathlib.Path,
    ):
        protocol.check_settings(config.evaluate, config.evaluate.every_images)
        self._workdir = workdir
        self._sampling = sampling.protocol(
            config.sample.to_dict(),
            input_size=config.model.input_size,
            seed=config.seed,
            dtype=config.model.dtype,
            weights=f"EMA in training of run {run}",
            autoencoder=identity,
            labels="balanced",
        )
        self._settings, self._index = config.evaluate, np.arange(config.evaluate.every_images)
        self._generator = experiment.generators(
            config, {"model": model}, diffusion, mesh, config.sample.batch_size, autoencoder
        )["model"]
        self._extractor = features.make_extractor(config.evaluate.features, config.evaluate.weights)
        self._reference = references.make_reference(
            config.evaluate.reference,
            config.data.dir,
            workdir,
            self._extractor,
            batch_size=config.evaluate.batch_size,
            num_neighbour_images=config.evaluate.num_neighbour_images,
        )

    def path(self, now: int) -> pathlib.Path:
        return self._workdir / f"evaluation_{now:07d}.json"

    def score(self, ema_params: Any, now: int, on_batch: Callable[[int], None]) -> dict[str, float]:
        """{"fd_efficientnet_lite0_1k": ...}: a score's name carries its features and the number of images.

        Leaves evaluation_STEP.json and .md, which carry the rest of the protocol.
        """
        labels = self._generator.labels(self._index, "balanced")
        images = pictures.to_uint8(self._generator(ema_params, self._index, labels, on_batch))
        counts = dict(neighbours=self._settings.neighbours, split_size=self._settings.split_size)
        scores = protocol.score_images(
            self._extractor,
            images,
            self._reference,
            batch_size=self._settings.batch_size,
            on_batch=on_batch,
            **counts,
        )
        if jax.process_index() == 0:
            result = protocol.make_result(
                self._extractor,
                scores,
                self._reference,
                num_images=len(images),
                **counts,
                image_shape=images.shape[1:],
                sampling=self._sampling | {"step": now},
            )
            reports.write_report(self.path(now).with_suffix(""), result)
        return scores


def report(
    config: ConfigDict,
    generators: dict[str, sampling.Sampler],
    params: dict[str, Any],
    source: dataset.ImageDataset,
    workdir: pathlib.Path,
    on_batch: Callable[[int], None],
) -> None:
    """The end of a run in a few lines and pictures: report.json, samples.png, and the summary on the log.

    With report.read_labels a classifier fitted on the real images says how often it reads the label that was asked for.
    """
    index = np.arange(config.report.num_images)
    images, result = {}, {"num_images": len(index)}
    for name, generator in generators.items():
        labels = generator.labels(index, "balanced")
        images[name] = pictures.to_uint8(generator(params[name], index, labels, on_batch))
    lines = metric_writer.read_training(workdir) or [
        {"step": config.train.steps}
    ]  # a finished run whose metrics are gone
    first, last = lines[0], lines[-1]
    terms = [
        name for name in ("loss", "mse", "vb", "kd_noise", "kd_variance") if f"train/{name}" in last
    ]
    result["loss"] = {
        name: {"start": first[f"train/{name}"], "end": last[f"train/{name}"]} for name in terms
    }
    result["parameters"] = {name: checkpoint.parameter_count(tree) for name, tree in params.items()}
    if (workdir / "inheritance.json").exists():
        parts = json.loads((workdir / "inheritance.json").read_text())
        result["inheritance"] = {name: sum(leaves.values()) for name, leaves in parts.items()}
    if config.report.read_labels:
        reader = LabelClassifier(*dataset.read_all(source))
        result["labels_read"] = {
            name: reader.accuracy(picture, labels) for name, picture in images.items()
        }
    if jax.process_index() == 0:
        pictures.save_picture(
            workdir / "samples.png", pictures.square_grid(list(images.values())[-1])
        )
        (workdir / "report.json").write_text(json.dumps(result, indent=1) + "\n")
        logging.info("%s", summary(result, first["step"], last["step"], workdir))


def summary(result: dict[str, Any], first: int, last: int, workdir: pathlib.Path) -> str:
    """The report as the few lines that a person reads."""
    lines = [
        "",
        f"parameters     {', '.join(f'{name} {count:,}' for name, count in result['parameters'].items())}",
    ]
    if "inheritance" in result:
        parts = result["inheritance"]
        lines.append(
            f"inheritance    {parts['inherited']:,} inherited, {parts['at_init']:,} new, "
            f"{parts['left_behind']:,} of the source left behind"
        )
    lines.append(f"loss terms     mean of steps 1 to {first:,} -> of the last ones, up to {last:,}")
    lines += [
        f"  {name:<13}{values['start']:.4f} -> {values['end']:.4f}"
        for name, values in result["loss"].items()
    ]
    if "labels_read" in result:
        lines.append(
            f"labels read    by a classifier of the real images, on {result['num_images']} images each: "
            + ", ".join(f"{name} {share:.1%}" for name, share in result["labels_read"].items())
        )
    lines.append(
        f"pictures       {workdir}/previews/step_{last:07d}.png, {workdir}/samples.png, {workdir}/curves.png"
    )
    return "\n".join(lines)
