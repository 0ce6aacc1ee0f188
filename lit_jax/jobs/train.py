"""The main job: the conversion of a pretrained model into a LiT, or plain diffusion training.

    python -m lit_jax.main --config=configs/NAME.py [--workdir=DIR]

With `teacher.checkpoint` the student inherits from the teacher and is distilled from it; without,
the same step trains by the denoising loss alone. The same command goes on where a run stopped.
"""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lit_jax import checkpoint, inherit, pictures, sampling, sharding
from lit_jax.costs import chips
from lit_jax.costs.flops import train_step_flops
from lit_jax.data import pipeline
from lit_jax.evaluation import geneval, in_training, run_report
from lit_jax.evaluation.digit_detector import DigitDetector
from lit_jax.evaluation.evaluator import make_evaluator
from lit_jax.experiment import Experiment
from lit_jax.models import init_params
from lit_jax.runtime import (
    cluster,
    exit_status,
    metric_writer,
    preemption,
    progress,
    storage,
    workdir_lock,
)
from lit_jax.settings import evaluation_settings, naming
from lit_jax.train_step import TrainState, make_optimizer, new_state

# Steps in flight. Two keep the device busy; more would only delay an answer to SIGTERM or a hang.
STEPS_AHEAD = 2
MOST_OF_START = 0.1  # of the EMA at the end, without a warning


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains config.model until train.steps, from the workdir's newest checkpoint on.

    Leaves config.json, checkpoints/, metrics.jsonl, tensorboard/, previews/, samples.png and
    report.json in the workdir.
    Raises: ValueError or FileNotFoundError, before anything is written, for a config that cannot be
      run. TryAgainError when it was asked to stop; GiveUpError when losses are not finite.
    """
    with contextlib.ExitStack() as stack:
        watchdog = preemption.Watchdog(config.train.watchdog)
        stack.enter_context(contextlib.closing(watchdog))
        train(config, epath.Path(workdir), watchdog, stack)


def train(
    config: ConfigDict,
    workdir: epath.Path,
    watchdog: preemption.Watchdog,
    stack: contextlib.ExitStack,
) -> None:
    """`run`, with a watch over what may hang; `stack` closes what is opened on the way."""
    start_up = progress.StartUp()
    experiment = Experiment(config)

    # ---- Devices, model and teacher: shapes and files, nothing computed --------------------------
    mesh = experiment.mesh
    experiment.check_batches()
    model = experiment.model
    teacher = experiment.teacher
    experiment.check_inheritance()
    experiment.check_platform()
    state_shapes = experiment.sharded_state_shapes

    share = experiment.unscaled_step_settings.ema_of_start(config.train.steps)
    if share > MOST_OF_START:
        logging.warning(
            "ema.decay = %g leaves %.0f %% of the first parameters in the EMA after train.steps = "
            "%d, and the EMA is what is sampled; set ema.warmup=True",
            config.ema.decay,
            100 * share,
            config.train.steps,
        )
    parameters = checkpoint.parameter_count(state_shapes.params)
    if remark := experiment.optimizer_settings.remark(parameters):
        logging.warning("optimizer: %s", remark)

    # ---- Data ------------------------------------------------------------------------------------
    data = experiment.dataset
    experiment.check_data()
    host_batches = experiment.batches()
    rows = sharding.batch_sharding(mesh)
    start_up.part_ended("devices and data")

    # ---- What the workdir has already: another run, or all that is asked for ---------------------
    decisive = experiment.decisive_fields()
    with naming("checkpoint", force="checkpoint.force_config"):
        newest = checkpoint.find_newest(
            workdir / "checkpoints",
            state_shapes.items(),
            decisive,
            force=config.checkpoint.force_config,
        )
    if newest is not None and is_complete(experiment, workdir, newest):
        logging.info(
            "nothing to do: step %d of train.steps = %d is saved, with all pictures and scores; %s",
            newest,
            config.train.steps,
            where_next(workdir, newest),
        )
        return

    # ---- Compile: in a thread of its own, while the weights are loaded ---------------------------
    rng = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()
    train_step = StepPrograms(experiment.train_step, (state_shapes, experiment.teacher_shapes), rng)
    stack.enter_context(contextlib.closing(train_step))
    # Of several shapes the largest, which needs most memory; the others at their first batch.
    compilation = train_step.compile(experiment.batch_shapes()[0])
    start_up.part_ended("tracing")

    # ---- The teacher's parameters, and what will draw pictures -----------------------------------
    if config.teacher.checkpoint:
        logging.info("loading the teacher %s", config.teacher.checkpoint)
    teacher_params = experiment.load_teacher()
    start_up.part_ended("teacher")
    due = Pictures.of(experiment, teacher_params, workdir)
    if due.evaluation:
        start_up.part_ended("reference")

    # ---- Resume or start -------------------------------------------------------------------------
    # A new state and the program come before the workdir: one for which there is no memory, or what
    # cannot be compiled here, leaves no file.
    is_new = is_missing(workdir / "checkpoints")
    logging.info("making the first state" if is_new else "reading the newest checkpoint")
    new = None
    if is_new:
        new = new_student(experiment)
        start_up.part_ended("state")
        compilation.result()
        start_up.part_ended("compilation")
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(workdir_lock.lock_workdir(workdir))
    checkpoints = checkpoint.Checkpointer(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    with naming("checkpoint", force="checkpoint.force_config"):
        restored = checkpoints.restore(
            state_shapes.items(), decisive, force=config.checkpoint.force_config
        )
    # Metrics since the last log line. They stay on the device: to read them would empty the queue.
    window: list[dict[str, Any]] = []
    if restored:
        new = None
        first_step, items, data_state, metadata = restored
        state = TrainState.from_items(items)
        window += [
            {name: np.float32(value) for name, value in metrics.items()}
            for metrics in metadata["window"]
        ]
        logging.info("resumed from step %d of %s", first_step, workdir)
    else:
        first_step = 0
        data_state = None
        state, merged = new or new_student(experiment)
        new = None  # the step donates the state
        if merged and jax.process_index() == 0:
            merged.save(workdir / "inheritance.json")
    jax.block_until_ready(state)
    start_up.part_ended("state")
    compilation.result()
    start_up.part_ended("compilation")
    if jax.process_index() == 0:
        storage.replace_text(workdir / "config.json", experiment.to_json())

    if getattr(data, "autoencoder", None):
        deviation = ", ".join(f"{x:.2f}" for x in data.deviation())
        logging.info(
            "latents of %s times %g: standard deviation %s a channel, about 1 is right",
            data.autoencoder["name"],
            data.scaling_factor,
            deviation,
        )
    batches = pipeline.DeviceIterator(host_batches, rows, data_state)
    start_up.part_ended("first batch")

    # ---- Loop ------------------------------------------------------------------------------------
    metadata = {
        "model": experiment.model_config.to_json(),
        "data": config.data.name,
        "class_names": list(getattr(data, "class_names", ())),
        "seed": config.seed,
        "fields": decisive,
    }
    size = experiment.input_size
    flops = train_step_flops(
        model.config.forward_flops(size), teacher.config.forward_flops(size) if teacher else 0.0
    )
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    log = metric_writer.MetricWriter(
        workdir,
        total_steps=config.train.steps,
        images_per_step=config.train.batch_size,
        flops_per_step=config.train.batch_size * flops,
        peak_flops=peak and peak * jax.device_count(),
        first_step=first_step,
    )
    stack.enter_context(contextlib.closing(log))
    crashes = stack.enter_context(
        exit_status.Crashes(workdir / f"crashes_{jax.process_index()}.json", first_step)
    )
    stop = stack.enter_context(contextlib.closing(preemption.Preemption()))
    trace = Trace(config.train.profile, workdir / "profile")
    stack.enter_context(contextlib.closing(trace))
    in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
    bad_in_a_row = int(state.skipped_in_a_row)
    save_is_due = False
    saved_step = first_step
    step = first_step
    try:
        if restored:
            due.draw(state, step, log, stop, only_missing=True)
        for step in range(first_step + 1, config.train.steps + 1):
            is_last = step == config.train.steps
            trace.before_step(step, in_flight)
            batch = experiment.encode_captions(next(batches))
            state, metrics = train_step(state, teacher_params, batch)
            window.append(metrics)
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                crashes.begun = True
                start_up.part_ended("first step")
                logging.info("%s", start_up)
                batches.take_seconds_waiting()
                log.start(step)

            # Wait for the step before the last two, and count how many in a row were not finite.
            in_flight.append(metrics)
            if len(in_flight) > STEPS_AHEAD:
                bad_in_a_row = 0 if is_finite(in_flight.popleft()) else bad_in_a_row + 1
            watchdog.step_ended(step - len(in_flight))

            # Log, and give up where nothing is learned any more.
            gives_up = bad_in_a_row >= config.train.stop_after_bad_steps
            if step % config.train.log_every == 0 or is_last or gives_up:
                log.write(step, read_metrics(window, state), batches.take_seconds_waiting())
                window.clear()
                # The state knows of the steps in flight, too.
                bad = max(bad_in_a_row, int(state.skipped_in_a_row))
                if bad >= config.train.stop_after_bad_steps:
                    checkpoints.wait()
                    raise exit_status.GiveUpError(
                        f"the loss or its gradient was not finite in {bad} steps in a row, up to "
                        f"step {step}; train.stop_after_bad_steps = "
                        f"{config.train.stop_after_bad_steps}. The last checkpoint: "
                        f"{checkpoints.latest_step() or 'none yet'}"
                    )

            # Save. Not among bad steps: a checkpoint of them would push out the one before them.
            checkpoints.check()
            save_is_due |= step % config.checkpoint.every == 0
            if is_last or (save_is_due and not state.skipped_in_a_row):
                save(checkpoints, state, step, window, batches, metadata)
                saved_step = step
                save_is_due = False

            # Draw and score what is due. A request to stop is heard between its batches too.
            stop.check()
            due.draw(state, step, log, stop)

        # ---- Report ------------------------------------------------------------------------------
        crashes.begun = True
        checkpoints.wait()
        checkpoints.close()
        if jax.process_index() == 0:
            pictures.plot_curves(workdir)
        if config.report.num_images:
            write_report(experiment, state, teacher_params, workdir, step, stop)
        logging.info("done: %s", where_next(workdir, step))
    except preemption.StopRequest:
        if saved_step != step:
            save(checkpoints, state, step, window, batches, metadata)
        checkpoints.wait()
        newest = checkpoints.latest_step()
        cluster.leave_together()
        raise exit_status.TryAgainError(
            f"stopped on request; step {newest} is saved in {workdir}, the same "
            f"command goes on from there"
        ) from None


# ---- The parts of it that have a name ------------------------------------------------------------


class StepPrograms:
    """The train step, compiled once for each shape of a batch, in a thread of its own.

    Args:
      train_step: what `make_train_step` gives.
      arguments: shapes of the state, and of the teacher's parameters.
    """

    def __init__(self, train_step: Any, arguments: tuple[Any, Any], rng: jax.Array):
        self._train_step = train_step
        self._arguments = arguments
        self._rng = rng
        self._programs: dict[Any, futures.Future] = {}
        self._compiler = futures.ThreadPoolExecutor(1, "compiler")

    def compile(self, batch: dict[str, Any]) -> futures.Future:
        """Traces the step here, and compiles it while the caller goes on.

        Args: batch: arrays of the shapes, or ShapeDtypeStructs with sharding.
        Returns: the program to come, for batches of these shapes.
        """
        key = tuple(sorted((name, x.shape) for name, x in batch.items()))
        if key not in self._programs:
            picture = batch["mean" if "mean" in batch else "image"]
            # Of buckets each takes its time, at its first batch.
            logging.info("compiling the step for pictures of %d x %d", *picture.shape[1:3])
            shapes = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for name, x in batch.items()
            }
            lowered = self._train_step.lower(*self._arguments, shapes, self._rng)
            self._programs[key] = self._compiler.submit(lowered.compile)
        return self._programs[key]

    def __call__(
        self, state: TrainState, teacher_params: Any, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        program = self.compile(batch).result()
        return program(state, teacher_params, batch, self._rng)

    def close(self) -> None:
        """Waits for a program that is being compiled: XLA cannot be stopped."""
        self._compiler.shutdown()


def new_student(experiment: Experiment) -> tuple[TrainState, inherit.MergeReport | None]:
    """A state at step 0: fresh parameters, what is inherited, EMA and optimizer state from those.

    Returns: the state, and where each parameter came from; None: nothing was inherited.
    """
    shapes = experiment.state_shapes.params
    merged = None
    if experiment.init_checkpoint is None:
        params = draw_params(experiment, flatten_dict(shapes, sep="/"))
    else:
        # What is inherited whole is not drawn: of XL/2 that is nearly everything.
        source = experiment.init_checkpoint.params
        _, merged = inherit.plan_merge(source, shapes, **experiment.inheritance)
        drawn = draw_params(experiment, merged.at_init)
        params, _ = inherit.merge_params(source, drawn, **experiment.inheritance)
        if jax.process_index() == 0:
            for note in experiment.init_checkpoint.report.notes:
                logging.info("%s: %s", experiment.init_checkpoint.report.source, note)
            logging.info("%s", merged.summary())
            # Of a label table for other classes: rows of a leaf that is inherited.
            for rows in experiment.init_checkpoint.report.reinitialised:
                logging.info("  of the inherited, drawn afresh: %s", rows)
    optimizer = make_optimizer(experiment.optimizer_settings)
    build = jax.jit(
        lambda params: new_state(params, optimizer),
        out_shardings=experiment.state_sharding,
        donate_argnums=0,
    )
    return jax.block_until_ready(build(params)), merged


def draw_params(experiment: Experiment, paths: Iterable[str]) -> Any:
    """Fresh parameters of the student at the paths; all others are left as ShapeDtypeStructs.

    Each leaf is what it would be if all were drawn: XLA leaves out what nobody asks for.
    """
    # Not the steps' key itself. (It is the parent of step 1's keys; no draw of the two is alike,
    # and runs that are there began so.)
    rng = jax.random.split(jax.random.key(experiment.config.seed), 2)[1]
    leaves = flatten_dict(experiment.sharded_state_shapes.params, sep="/")
    places = {path: leaves[path].sharding for path in paths}

    def draw(rng):
        drawn = flatten_dict(init_params(experiment.model, rng), sep="/")
        return {path: drawn[path] for path in places}

    return unflatten_dict(leaves | jax.jit(draw, out_shardings=places)(rng), sep="/")


def save(
    checkpoints: checkpoint.Checkpointer,
    state: TrainState,
    step: int,
    window: list[dict[str, Any]],
    batches: pipeline.DeviceIterator,
    metadata: dict[str, Any],
) -> None:
    """Saves all that the next step depends on, the metrics that are not logged yet among it."""
    window[:] = jax.device_get(window)
    unlogged = [{name: float(value) for name, value in metrics.items()} for metrics in window]
    checkpoints.save(
        step, state.items(), data=batches.state, metadata=metadata | {"window": unlogged}
    )


def is_finite(metrics: dict[str, jax.Array]) -> bool:
    """Whether the step that these are of changed the parameters; waits for its end."""
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))


def read_metrics(window: list[dict[str, jax.Array]], state: TrainState) -> dict[str, float]:
    """Means of the steps since the last log line.

    A skipped step counts in `skipped`, not in the means.
    """
    window = jax.device_get(window)
    good = [metrics for metrics in window if is_finite(metrics)] or window
    # A window that an older version saved has fewer names than the steps after it.
    names = dict.fromkeys(name for metrics in good for name in metrics)
    means = {
        name: np.mean([metrics[name] for metrics in good if name in metrics]) for name in names
    }
    counters = jax.device_get(
        {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    )
    return {f"train/{name}": float(value) for name, value in (means | counters).items()}


class Trace:
    """A profiler trace of some steps; see train.profile.

    A run that goes on from a later step traces what is left of them, or nothing.
    """

    def __init__(self, steps: tuple[int, ...], folder: epath.Path):
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._folder = folder
        self._is_running = False

    def before_step(self, step: int, in_flight: Iterable[dict[str, jax.Array]]) -> None:
        """Starts or ends the trace; `in_flight`: metrics of the steps that may not have ended."""
        if (step in self._steps) == self._is_running:
            return
        # What was dispatched before must not be in the trace, and what is in it must have ended.
        jax.block_until_ready(list(in_flight))
        if self._is_running:
            self.close()
        else:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True

    def close(self) -> None:
        """Ends a trace that is running, at the end of the run at the latest."""
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
            logging.info("a profiler trace is in %s", self._folder)


def where_next(workdir: epath.Path, step: int) -> str:
    """Where the result of a run is, and what may be done with it."""
    return (
        f"the result is {workdir}/checkpoints/{step}; the same command draws from it with "
        f"--mode=sample, and --mode=port and --mode=export pass it on"
    )


def is_complete(experiment: Experiment, workdir: epath.Path, newest: int) -> bool:
    """Whether the steps are made and what is drawn after the last one is there.

    Args: newest: the step of the newest checkpoint.
    Returns: the same on every process.
    """
    config = experiment.config
    if newest < config.train.steps:
        return False
    files = [workdir / "curves.png"]
    if config.train.preview_every:
        files.append(in_training.preview_path(workdir / "previews", newest))
    if config.evaluate.every:
        files.append(in_training.evaluation_path(workdir, newest))
    wanted = {}
    found = None
    if config.report.num_images:
        files.append(workdir / "samples.png")
        wanted = what_report_depends_on(experiment, newest)
        path = workdir / "report.json"
        found = storage.read_object(path) if path.exists() else None
    is_drawn = (found or {}).get("asked", {}) == wanted
    there = [pictures.is_whole(f) if f.suffix == ".png" else f.exists() for f in files]
    return bool(multihost_utils.broadcast_one_to_all(np.bool(is_drawn and all(there))))


def what_report_depends_on(experiment: Experiment, step: int) -> dict[str, Any]:
    """JSON values: with others, the report is drawn again."""
    config = json.loads(experiment.config.to_json_best_effort())
    names = ("seed", "sample", "report")
    return {"step": step} | {name: config[name] for name in names}


def is_due(every: int, step: int, is_last: bool) -> bool:
    return every > 0 and (step % every == 0 or is_last)


def is_missing(path: epath.Path) -> bool:
    """Whether process 0 sees no such whole file; the same answer on every process."""
    there = pictures.is_whole(path) if path.suffix == ".png" else path.exists()
    return bool(multihost_utils.broadcast_one_to_all(np.bool(not there)))


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is drawn and scored between steps: previews, and evaluations of the EMA weights."""

    experiment: Experiment
    teacher_params: Any
    previews: in_training.Previews | None
    evaluation: in_training.PeriodicEvaluation | None

    @classmethod
    def of(cls, experiment: Experiment, teacher_params: Any, workdir: epath.Path) -> "Pictures":
        """Builds the samplers, and reads the reference of the evaluation."""
        config = experiment.config
        devices = experiment.mesh.size
        # No larger than other batches: between two of them the run can be stopped.
        batch_size = min(
            -(-config.train.preview_images // devices) * devices,
            max(config.sample.batch_size // devices, 1) * devices,
        )
        models = {"student": experiment.model}
        if experiment.teacher:
            models = {"teacher": experiment.teacher} | models
        previews = None
        if config.train.preview_every:
            previews = in_training.Previews(
                {name: experiment.sampler(model, batch_size) for name, model in models.items()},
                balanced(experiment, config.train.preview_images),
                workdir / "previews",
            )
        evaluation = None
        if config.evaluate.every:
            evaluation = make_evaluation(experiment, workdir)
        return cls(experiment, teacher_params, previews, evaluation)

    def draw(
        self,
        state: TrainState,
        step: int,
        log: metric_writer.MetricWriter,
        stop: preemption.Preemption,
        *,
        only_missing: bool = False,
    ) -> None:
        """Draws and scores what is due after a step; `only_missing`: where its file is not there.

        Raises: StopRequest between two batches.
        """
        config = self.experiment.config
        is_last = step == config.train.steps
        if (
            self.previews is not None
            and is_due(config.train.preview_every, step, is_last)
            and (not only_missing or is_missing(self.previews.path(step)))
        ):
            params = {"teacher": self.teacher_params, "student": state.ema_params}
            logging.info("drawing the preview of step %d", step)
            log.add_picture("preview", step, self.previews.draw(params, step, stop.check))
            log.start(step)  # a preview is not training time
        if self.evaluation is None:
            return
        if is_due(config.evaluate.every, step, is_last) and (
            not only_missing or is_missing(self.evaluation.path(step))
        ):
            logging.info("drawing and scoring %d images", config.evaluate.every_images)
            log.write_scores(step, self.evaluation.score(state.ema_params, step, stop.check))
            log.start(step)


def balanced(experiment: Experiment, num_images: int) -> dict[str, np.ndarray]:
    """The conditions of pictures for people: each class as often as the others."""
    index = np.arange(num_images)
    return experiment.conditions(index, "balanced")


def write_report(
    experiment: Experiment,
    state: TrainState,
    teacher_params: Any,
    workdir: epath.Path,
    step: int,
    stop: preemption.Preemption,
) -> None:
    """The end of a run in a few lines and pictures; see `run_report`."""
    config = experiment.config
    samplers = {"student": experiment.sampler()}
    params = {"student": state.ema_params}
    if experiment.teacher:
        samplers = {"teacher": experiment.sampler(experiment.teacher)} | samplers
        params["teacher"] = teacher_params
    num_images = config.report.num_images
    logging.info("drawing the report: %d images with %s", num_images, " and ".join(samplers))
    condition = balanced(experiment, num_images)
    captions: list[str] = []
    if experiment.is_told_captions:
        texts = experiment.prompts.texts
        captions = [texts[i % len(texts)] for i in range(num_images)]
    run_report.report(
        samplers,
        params,
        condition,
        workdir,
        asked=what_report_depends_on(experiment, step),
        captions=captions,
        read_labels=label_reader(experiment, condition),
        score_prompts=scene_reader(experiment) if config.report.read_scenes else None,
        on_batch=stop.check,
    )


def label_reader(
    experiment: Experiment, condition: dict[str, np.ndarray]
) -> Callable[[np.ndarray], float] | None:
    """How often images show the labels of the condition; None where report.read_labels is off."""
    if not experiment.config.report.read_labels:
        return None
    return functools.partial(experiment.label_classifier.accuracy, labels=condition["label"])


def scene_reader(experiment: Experiment) -> Callable[[np.ndarray], geneval.Scores]:
    """Scores the images of the digit scenes' prompts, in their order, by GenEval's rules."""
    detect = DigitDetector()
    lines = [json.loads(line) for line in experiment.prompts.geneval or ()]

    def score(images):
        asked = [lines[i % len(lines)] for i in range(len(images))]
        return geneval.score(geneval.results(asked, detect(images)))

    return score


def make_evaluation(experiment: Experiment, workdir: epath.Path) -> in_training.PeriodicEvaluation:
    """The evaluation of the EMA weights that evaluate.every asks for; reads its reference."""
    config = experiment.config
    settings = evaluation_settings(config)
    num_images = config.evaluate.every_images
    with naming("evaluate", directory="data.dir"):
        evaluator = make_evaluator(settings, num_images, config.data.dir, workdir)
    about = sampling.protocol(
        experiment.sampler_settings,
        input_size=config.model.input_size,
        seed=config.seed,
        dtype=config.model.dtype,
        weights=f"EMA in training of run {experiment.run_hash()}",
        autoencoder=experiment.autoencoder_identity,
        labels="balanced",
    )
    condition = balanced(experiment, num_images)
    return in_training.PeriodicEvaluation(
        evaluator,
        experiment.sampler(),
        condition,
        about,
        workdir,
        label_reader(experiment, condition),
    )
