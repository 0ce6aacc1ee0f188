"""--mode=layers: ranks the layers by how well each bears the student's attention.

    python -m lit_jax.main --config=configs/NAME.py --mode=layers --workdir=DIR

The student is the workdir's newest checkpoint, or that of sample.checkpoint: of a
layer-wise regression, or of any later stage. See docs/workbench.md.
"""

import functools

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lit_jax import sharding
from lit_jax.data import pipeline
from lit_jax.evaluation import layers
from lit_jax.experiment import Experiment
from lit_jax.porting.read import load_params
from lit_jax.runtime import progress
from lit_jax.settings import naming
from lit_jax.train_step import images_to_model


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Compares student and teacher layer by layer on the config's data.

    Leaves layers.json, layers.md and layers.png in the workdir.
    Raises: ValueError or FileNotFoundError, before anything is written, for a
      config that cannot be run, a budget that no pattern meets, or errors that
      are not finite.
    """
    workdir = epath.Path(workdir)
    experiment = Experiment(config)

    # ---- Student and teacher: shapes and files -------------------------------
    experiment.check_layers("--mode=layers")
    teacher = experiment.teacher
    assert teacher is not None  # `check_layers` has refused
    experiment.check_batches()
    experiment.check_platform()
    checkpoint = experiment.read_sampled(workdir)
    candidates = candidate_patterns(experiment)
    experiment.check_data()

    # ---- The errors, batch after batch ---------------------------------------
    mesh = experiment.mesh
    params = checkpoint.params
    params = load_params(params, sharding.fsdp_sharding(params, mesh))
    teacher_params = experiment.load_teacher()
    rows = sharding.batch_sharding(mesh)
    batches = pipeline.DeviceIterator(experiment.batches(), rows, None)
    layer_sums = layers.make_layer_sums(experiment.model, teacher, mesh)
    prepare = jax.jit(functools.partial(draws, experiment), out_shardings=rows)
    count = config.layers.num_batches
    num_images = count * config.train.batch_size
    sums = []
    with progress.progress("images", num_images) as advance:
        for number in range(count):
            batch = experiment.encode_captions(next(batches))
            told = prepare(batch, number)
            sums.append(jax.device_get(layer_sums(params, teacher_params, *told)))
            advance(config.train.batch_size)
    source = config.sample.checkpoint or str(workdir)
    errors = layers.errors_of(sums, source)

    # ---- The pattern, and the report -----------------------------------------
    candidates = [pattern.with_errors(errors) for pattern in candidates]
    share = config.layers.flops_share
    chosen = layers.choose(candidates, share) if share else None
    if jax.process_index() != 0:
        return
    about = {
        "student": source,
        "teacher": config.teacher.checkpoint,
        "attention": experiment.model_config.attention,
        "images": num_images,
        "seed": config.seed,
    }
    path = workdir / "layers"
    tables = layers.write_report(path, errors, candidates, chosen, about)
    logging.info("each layer replaced alone, in %s.md:\n%s", path, tables)
    if chosen and chosen.softmax_every:
        logging.info(
            "the pattern is --config.model.softmax_every=%d --config.model.softmax_heads=%d",
            chosen.softmax_every,
            teacher.config.num_heads,
        )


def candidate_patterns(experiment: Experiment) -> list[layers.Pattern]:
    """The patterns that the student may have instead; none where it has one already.

    Raises: ValueError where layers.flops_share asks for a choice that there is not.
    """
    assert experiment.teacher is not None
    student = experiment.model_config
    teacher = experiment.teacher.config
    share = experiment.config.layers.flops_share
    asked = f"layers.flops_share = {share:g} chooses which layers keep softmax, but"
    is_softmax = student.attention == "softmax" or student.softmax_every
    if is_softmax or teacher.attention != "softmax":
        if share:
            raise ValueError(
                f"{asked} model.attention = {student.attention} with "
                f"model.softmax_every = {student.softmax_every}, and the teacher has "
                f"{teacher.attention} attention; it needs a student without softmax and "
                f"a softmax teacher; set it to 0"
            )
        return []
    found = layers.patterns(student, teacher, experiment.sample_size)
    if share:
        # Before the devices work: errors do not change what a pattern costs.
        with naming("layers"):
            layers.choose(found, share)
    return found


def draws(
    experiment: Experiment, batch: dict[str, jax.Array], number: int
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """x_t, t and the condition of a batch, by its number, as training draws them.

    No condition is dropped.
    """
    rng = jax.random.fold_in(jax.random.key(experiment.config.seed), number)
    t_rng, noise_rng, latent_rng = jax.random.split(rng, 3)
    data = experiment.dataset
    scale = (data.scaling_factor, data.shift_factor)
    x_start = images_to_model(batch, latent_rng, *scale)
    process = experiment.process
    t = process.draw_t(t_rng, len(x_start))
    noise = jax.random.normal(noise_rng, x_start.shape)
    names = experiment.model_config.condition_shapes(1)
    condition = {name: batch[name] for name in names}
    return process.perturb(x_start, t, noise), t, condition
