"""--mode=sample: images from a checkpoint's EMA weights.

    python -m lit_jax.main --config=configs/NAME.py --mode=sample --workdir=DIR

Leaves samples/ (PNG files), samples.png (a grid) and samples.npz, which evaluators read.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from lit_jax import pictures, sampling, sharding
from lit_jax.checkpoint import is_checkpoint, open_params
from lit_jax.evaluation import geneval
from lit_jax.experiment import Experiment
from lit_jax.porting.read import load_params
from lit_jax.runtime import progress, storage, workdir_lock

GRID_IMAGES = 100
LATENTS = ".latents"  # ending of the files of sample.offload
NAMED_IMAGES = 4  # of those that cannot be written, in an error

# The numbers of images (n,) to what the model is told of each, arrays (n, ...).
Condition = Callable[[np.ndarray], dict[str, np.ndarray]]


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws images 0 to sample.num_images - 1, or those that are still missing.

    Image i depends on (seed, i) alone. It is finished when its PNG is there;
    the npz and the grid are made of the PNGs.
    Raises: ValueError when the checkpoint is of another model than the config
      says, the folder holds images that were drawn by another protocol, or an
      image is not finite.
    """
    with contextlib.ExitStack() as stack:
        draw(config, epath.Path(workdir), stack)


def draw(config: ConfigDict, workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """`run`; `stack` frees the folder of the images."""
    experiment = Experiment(config)
    settings = config.sample

    # ---- The model and its checkpoint, still on disk -------------------------
    experiment.check_platform()
    checkpoint = experiment.read_sampled(workdir)
    path = settings.checkpoint or str(workdir)
    if settings.cfg_scale != 1 and never_dropped(path):
        logging.warning(
            "%s was trained with train.label_dropout = 0, so no step trained the "
            "null class that sample.cfg_scale = %g guides away from; "
            "sample.cfg_scale=1 draws without guidance",
            path,
            settings.cfg_scale,
        )
    model = experiment.for_drawing(experiment.model)
    asked = what_is_asked(experiment, checkpoint.class_names)
    folder = workdir / "samples"
    paths = [asked.path(folder, i) for i in range(asked.num_images)]
    # No larger than all that is asked for; not what is missing, whose last bits may follow it.
    devices = experiment.mesh.size
    size = min(settings.batch_size, -(-len(paths) // devices) * devices)
    # The decoder joins it when its turn has come.
    sampler = experiment.sampler(model, size, decodes=False)

    # ---- What is missing -----------------------------------------------------
    todo = missing_numbers(np.arange(len(paths)), lambda i: pictures.is_whole(paths[i]))
    undrawn = todo
    if settings.offload:
        undrawn = missing_numbers(todo, lambda i: has_latents(paths[i], sampler.shape))
    protocol = protocol_of(experiment, checkpoint.report.checksum) | asked.protocol
    # The text encoder comes and goes here, before the model is loaded.
    told, text = tell(experiment, asked, checkpoint.params, undrawn)
    # Its own lock: a run may be training in the workdir.
    stack.enter_context(workdir_lock.lock_folder(folder, str(folder), "another --workdir"))
    claim_folder(folder, protocol | text)

    # ---- Draw ----------------------------------------------------------------
    speed = None
    load = functools.partial(load_drawn, experiment, model, checkpoint.params)
    if len(todo) and settings.offload:
        draw_in_turns(experiment, sampler, load, told, todo, paths)
    elif len(todo):
        speed = draw_missing(experiment, sampler, load, told, paths)
    else:
        logging.info("all %d images are in %s already", len(paths), folder)
    multihost_utils.sync_global_devices("samples written")

    # ---- The npz and the grid ------------------------------------------------
    if jax.process_index() != 0:
        return
    # Those of interrupted runs too, whose images are there by now.
    for parent in dict.fromkeys(path.parent for path in paths):
        for latents in parent.glob(f"*{LATENTS}"):
            latents.unlink()
    about = {"protocol": json.loads((folder / "protocol.json").read_text())}
    noted = folder / "speed.json"
    if speed is not None:
        about["speed"] = {
            "images_per_second": speed,
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }
        storage.replace_text(noted, json.dumps(about["speed"]) + "\n")
        logging.info(
            "%(images_per_second).1f images/s on %(devices)d x %(device)s",
            about["speed"],
        )
    # Otherwise that of the run that drew them.
    elif noted.exists() and (before := storage.read_object(noted)):
        about["speed"] = before
    asked.finish(folder)
    write_npz(workdir / "samples.npz", paths, asked.names, about)
    shown = np.stack([read_image(path) for path in paths[:GRID_IMAGES]])
    captions = asked.captions[:GRID_IMAGES]
    pictures.save_picture(workdir / "samples.png", pictures.square_grid(shown, captions))
    logging.info(
        "%d images in %s, their grid in samples.png, all of them in samples.npz",
        len(paths),
        folder,
    )


def missing_numbers(numbers: np.ndarray, is_there: Callable[[int], bool]) -> np.ndarray:
    """Those of the numbers that process 0 does not find: all draw a batch together."""
    missing = np.array([not is_there(i) for i in numbers], np.int32)
    return numbers[np.flatnonzero(multihost_utils.broadcast_one_to_all(missing))]


def load_drawn(experiment: Experiment, model: Any, params: Any) -> Any:
    """The parameters that `model` draws with, on the devices.

    Args: params: the checkpoint's, still on disk.
    """
    params = load_params(params, sharding.fsdp_sharding(params, experiment.mesh))
    return experiment.drawn_params(model, params)


def compile_samplers(
    sampler: sampling.Sampler, params: Any, told: "Told"
) -> dict[int, sampling.Sampler]:
    """By the length of prompts. Ahead of the clock, which a single batch would stop with it."""
    logging.info("compiling the sampler for %d images at once", sampler.batch_size)
    batches = dict(told.batches(sampler.batch_size))
    return {n: sampler.compile(params, told.condition(rows[:1])) for n, rows in batches.items()}


def draw_missing(
    experiment: Experiment,
    sampler: sampling.Sampler,
    load: Callable[[], Any],
    told: "Told",
    paths: Sequence[epath.Path],
) -> float:
    """Draws the images of the numbers `told.todo` into their paths.

    Args:
      sampler: without a decoder, which is loaded here.
      load: gives the parameters.
      paths: of all images.
    Returns: images a second.
    """
    params = load()
    of_length = compile_samplers(sampler.with_autoencoder(experiment.autoencoder), params, told)
    clock = time.monotonic()
    pending: tuple[np.ndarray, jax.Array] | None = None
    with progress.progress("sampling", len(paths), len(paths) - len(told.todo)) as advance:
        for length, rows in told.batches(sampler.batch_size):
            images = of_length[length].draw(params, rows, told.condition(rows))
            if pending:
                # Written while the device draws the next one.
                save_batch(paths, sampler, *pending)
                advance(len(pending[0]))
            pending = (rows, images)
        if pending:
            save_batch(paths, sampler, *pending)
            advance(len(pending[0]))
    return len(told.todo) / (time.monotonic() - clock)


def draw_in_turns(
    experiment: Experiment,
    sampler: sampling.Sampler,
    load: Callable[[], Any],
    told: "Told",
    todo: np.ndarray,
    paths: Sequence[epath.Path],
) -> None:
    """sample.offload: first all latents, into files beside the images; then the decoder.

    Args: as of `draw_missing`; `told.todo` are those of `todo` whose latents are not there.
    """
    if len(told.todo):
        params = load()
        of_length = compile_samplers(sampler, params, told)
        with progress.progress("latents", len(todo), len(todo) - len(told.todo)) as advance:
            for length, rows in told.batches(sampler.batch_size):
                drawn = of_length[length].draw_latents(params, rows, told.condition(rows))
                for row, latents in local_rows(drawn):
                    if row < len(rows):
                        save_latents(paths[rows[row]], latents)
                advance(len(rows))
        # Their memory is the decoder's.
        del params, of_length
        multihost_utils.sync_global_devices("latents written")
    sampler = sampler.with_autoencoder(experiment.autoencoder)
    with progress.progress("decoding", len(paths), len(paths) - len(todo)) as advance:
        for start in range(0, len(todo), sampler.batch_size):
            rows = todo[start : start + sampler.batch_size]
            latents = np.stack([read_latents(paths[i], sampler.shape) for i in rows])
            save_batch(paths, sampler, rows, sampler.decode(sampler.put(latents)))
            advance(len(rows))


def never_dropped(path: epath.PathLike) -> bool:
    """Whether a checkpoint's metadata say that it was trained without dropping conditions."""
    if not is_checkpoint(epath.Path(path)):
        return False
    fields = open_params(path).metadata.get("fields")
    return isinstance(fields, dict) and fields.get("train.label_dropout") == 0


# ---- What is asked of the model ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """The images of a run: their number, and where each is written.

    Attributes:
      names: arrays of the npz beside the images, such as label (N,).
      protocol: what the images depend on besides the sampler.
      captions: a text below each image of the grid; empty: none.
      path: of (folder, number).
      finish: writes what belongs beside the images of a folder.
    """

    num_images: int
    names: dict[str, np.ndarray]
    protocol: dict[str, Any] = dataclasses.field(default_factory=dict)
    captions: list[str] = dataclasses.field(default_factory=list)
    path: Callable[[epath.Path, int], epath.Path] = lambda folder, i: image_path(folder, i)
    finish: Callable[[epath.Path], None] = lambda folder: None


def what_is_asked(experiment: Experiment, names: Sequence[str]) -> Asked:
    """What config.sample asks for: images of classes, or of prompts.

    Args: names: of the classes, as far as the checkpoint tells them.
    """
    sample = experiment.config.sample
    if not experiment.is_told_captions:
        index = np.arange(sample.num_images)
        labels = experiment.labels(names)
        told = experiment.conditions(index, labels)
        captions = [names[label] for label in told["label"]] if names else []
        return Asked(len(index), told, {"labels": labels}, captions)

    prompts = experiment.prompts
    numbers = prompts.of(np.arange(prompts.num_images))
    texts = [prompts.texts[i] for i in numbers]
    protocol = {
        "prompts": prompts.sha256(),
        "images_per_prompt": prompts.images_per_prompt,
        "null_mask": sample.null_mask,
        "size": list(experiment.sample_size),
    }
    asked = Asked(prompts.num_images, {"prompt": np.array(texts)}, protocol, texts)
    if prompts.geneval is None:
        return asked
    lines = list(prompts.geneval)

    def geneval_path(folder, i):
        return geneval.image_path(folder, *divmod(i, prompts.images_per_prompt))

    return dataclasses.replace(
        asked,
        path=geneval_path,
        finish=lambda folder: geneval.write_metadata(folder, lines),
    )


@dataclasses.dataclass(frozen=True)
class Told:
    """What the model is told of the images that are missing.

    Attributes:
      todo: their numbers, (n,), ascending.
      lengths: of their captions with padding, (n,). A caption's depends on it alone, and all of a
        batch have one: another padding would round an image's last bits otherwise.
      condition: of the numbers of a batch.
    """

    todo: np.ndarray
    lengths: np.ndarray
    condition: Condition

    def batches(self, size: int) -> list[tuple[int, np.ndarray]]:
        """Batches of at most `size`: the length of each, and its numbers; the shortest first."""
        found = []
        for length in np.unique(self.lengths):
            rows = self.todo[self.lengths == length]
            found += [(int(length), rows[i : i + size]) for i in range(0, len(rows), size)]
        return found


def tell(
    experiment: Experiment, asked: Asked, params: Any, todo: np.ndarray
) -> tuple[Told, dict[str, Any]]:
    """What the model is told of images, and what the protocol says of that.

    Args:
      params: the model's, still on disk. A text encoder is compared with their null caption.
      todo: the numbers of those that are missing; where none is, no text encoder is loaded.
    """
    if not experiment.is_told_captions:
        same = np.zeros(len(todo), int)
        named = asked.names
        return Told(todo, same, lambda index: {name: named[name][index] for name in named}), {}
    if not len(todo):
        return Told(todo, todo, lambda index: {}), {"text": experiment.text_identity()}
    prompts = experiment.prompts
    null_caption = flatten_dict(params, sep="/")[experiment.model_config.frozen[0]]
    numbers, rows = np.unique(prompts.of(todo), return_inverse=True)
    texts = [prompts.texts[number] for number in numbers]
    features, identity = experiment.encode(texts, null_caption)
    lengths = experiment.text_settings.fitting(features["caption_mask"].sum(axis=1))
    if experiment.is_told_tokens:  # all of one length
        lengths = np.full(len(texts), features["caption_mask"].shape[1])

    def of_prompt(index):
        chosen = np.searchsorted(numbers, prompts.of(index))
        S = lengths[chosen].max()
        return {name: value[chosen, :S] for name, value in features.items()}

    return Told(todo, lengths[rows], of_prompt), {"text": identity}


def protocol_of(experiment: Experiment, weights: str) -> dict[str, Any]:
    """What the images depend on, as it goes into protocol.json and the npz."""
    config = experiment.config
    quantize = config.sample.quantize
    # Folders that were begun before it could be anything do not name it.
    precision = {} if quantize == "none" else {"quantize": quantize}
    return precision | sampling.protocol(
        experiment.sampler_settings,
        input_size=config.model.input_size,
        seed=config.seed,
        dtype=config.model.dtype,
        weights=weights,
        autoencoder=experiment.autoencoder_identity,
        labels=str(config.sample.labels),
    )


# ---- Files -------------------------------------------------------------------


def claim_folder(folder: epath.Path, wanted: dict[str, Any]) -> None:
    """Writes the protocol into a new folder, or compares it with the folder's own.

    Raises: ValueError, on every process, naming the first field that differs.
    """
    path = folder / "protocol.json"
    wanted = json.loads(json.dumps(wanted))
    there = storage.read_object(path) if path.exists() else {}
    # Before process 0 may write it.
    multihost_utils.sync_global_devices("protocol read")
    if there is None:
        raise ValueError(
            f"{path} is damaged, so nothing says how the images in {folder} "
            f"were drawn; use another --workdir or remove the folder"
        )
    if there:
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise ValueError(
                    f"{folder} holds images drawn with "
                    f"{name} = {there.get(name)}, "
                    f"this run has {wanted.get(name)}; "
                    f"use another --workdir or remove the folder"
                )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        storage.replace_text(path, json.dumps(wanted, indent=1) + "\n")
    multihost_utils.sync_global_devices("protocol written")


def image_path(folder: epath.Path, i: int) -> epath.Path:
    return folder / f"{i:06d}.png"


def local_rows(batch: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a sharded batch that this process holds, with their numbers.

    Each row belongs to one process.
    """
    for shard in batch.addressable_shards:
        if shard.replica_id == 0:
            yield from enumerate(np.asarray(shard.data), shard.index[0].start or 0)


def save_batch(
    paths: Sequence[epath.Path],
    sampler: sampling.Sampler,
    index: np.ndarray,
    images: jax.Array,
) -> None:
    """Writes the images of a batch that this process holds.

    Row r is image index[r] and goes to paths[index[r]]; the rows beyond the
    index fill the batch.
    Raises: ValueError, on every process, naming the images that are not
      finite. The others are written.
    """
    finite = sampler.are_finite(images)[: len(index)]
    for row, image in local_rows(images):
        if row < len(index) and finite[row]:
            save_image(paths[index[row]], pictures.to_uint8(image))
    bad = index[~finite]
    if len(bad):
        names = ", ".join(paths[i].name for i in bad[:NAMED_IMAGES])
        rest = len(bad) - NAMED_IMAGES
        more = f" and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"{names}{more} would hold NaN or infinite values, so nothing is "
            f"written for them: what the weights compute overflows; "
            f"try model.dtype=float32, or other weights"
        )


def latents_path(image: epath.Path) -> epath.Path:
    """Of an image's latents, as long as they are not decoded."""
    return image.with_suffix(LATENTS)


def has_latents(image: epath.Path, shape: tuple[int, ...]) -> bool:
    """Whether an image's latents (h, w, C) are there as a whole."""
    path = latents_path(image)
    return path.exists() and path.stat().length == 4 * math.prod(shape)


def save_latents(image: epath.Path, latents: np.ndarray) -> None:
    """Writes an image's latents (h, w, C) as bare float32."""
    path = latents_path(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_bytes(path, np.asarray(latents, "<f4").tobytes())


def read_latents(image: epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(latents_path(image).read_bytes(), "<f4").reshape(shape)


def save_image(path: epath.Path, image: np.ndarray) -> None:
    """Writes a PNG, (h, w, 1 or 3) uint8; its name appears when it is whole."""
    # Pillow has no axis for the one channel of a grey image.
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_bytes(path, buffer.getvalue())


def read_image(path: epath.Path) -> np.ndarray:
    """(h, w, 1 or 3) uint8. Raises: ValueError naming the file."""
    try:
        with path.open("rb") as file:
            image = np.asarray(Image.open(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; remove it, the same command draws it again"
        ) from error
    return image[..., None] if image.ndim == 2 else image


def write_npz(
    path: epath.Path,
    images: list[epath.Path],
    names: dict[str, np.ndarray],
    about: dict[str, dict[str, Any]],
) -> None:
    """Writes what the ADM evaluator reads, image by image.

    arr_0 is (N, h, w, C) uint8. With it go the arrays of `names`, such as
    label (N,), and the dicts of `about` as JSON.
    Raises: ValueError naming an image that cannot be read or is not of the
      first one's shape, OSError when the disk is full. The npz is then as it
      was.
    """
    first = read_image(images[0]).shape
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(images), *first),
    }
    texts = {name: np.array(json.dumps(value)) for name, value in about.items()}
    arrays = names | texts
    with (
        storage.replacing(path) as raw,
        zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image_file in images:
                image = read_image(image_file)
                if image.shape != first or image.dtype != np.uint8:
                    raise ValueError(
                        f"{image_file} is {image.dtype} {image.shape}, {images[0].name} is uint8 "
                        f"{first}; remove the one that is not of this run"
                    )
                file.write(np.ascontiguousarray(image).tobytes())
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value)
