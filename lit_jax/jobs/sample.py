"""Draws images from a checkpoint: PNG files, a grid, and the npz that evaluators read."""

import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from lit_jax import experiment, pictures, sampling, sharding
from lit_jax.diffusion import make_diffusion
from lit_jax.models.dit import check_architecture
from lit_jax.porting.read import load_params, read_checkpoint
from lit_jax.runtime import progress

GRID_IMAGES = 100
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"  # the last chunk: no content, its name, its CRC


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Draws images 0 to sample.num_images - 1 into workdir/samples, going on where an interrupted run stopped.

    Image i depends on (seed, i) alone. It is finished when its PNG is there; the npz and the grid are made of the PNGs.
    Raises: ValueError when the checkpoint is of another model than the config says, or the folder holds images that were
    drawn by another protocol.
    """
    sample = config.sample
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    experiment.check_platform(config, mesh)
    model = experiment.student(config)
    source = read_checkpoint(sample.checkpoint or workdir)
    check_architecture(model, source.architecture, sample.checkpoint or str(workdir))
    autoencoder, identity = experiment.autoencoder(config, mesh)
    generator = experiment.generators(
        config, {"model": model}, make_diffusion(), mesh, sample.batch_size, autoencoder
    )["model"]
    index = np.arange(sample.num_images)
    labels = generator.labels(index, sample.labels)

    folder = workdir / "samples"
    claim(
        folder,
        sampling.protocol(
            sample.to_dict(),
            input_size=config.model.input_size,
            seed=config.seed,
            dtype=config.model.dtype,
            weights=source.report.checksum,
            autoencoder=identity,
            labels=sample.labels,
        ),
    )
    missing = np.array([not is_whole(image_path(folder, i)) for i in index], np.int32)
    todo = np.flatnonzero(
        multihost_utils.broadcast_one_to_all(missing)
    )  # one list for all: they draw a batch together
    params = load_params(source.params, sharding.fsdp_sharding(source.params, mesh))
    with progress.progress("sampling", len(index), len(index) - len(todo)) as advance:
        drawing, clock, compiled = None, time.monotonic(), 0
        for start in range(0, len(todo) + sample.batch_size, sample.batch_size):
            batch = todo[start : start + sample.batch_size]
            ahead = (batch, generator.draw(params, batch, labels[batch])) if len(batch) else None
            if drawing:  # written while the device draws the next one
                if (
                    start == sample.batch_size and ahead
                ):  # the clock starts after the first batch, which compiles
                    jax.block_until_ready(drawing[1])
                    clock, compiled = time.monotonic(), len(drawing[0])
                save_batch(folder, *drawing)
                advance(len(drawing[0]))
            drawing = ahead
    multihost_utils.sync_global_devices("samples written")
    if jax.process_index() == 0:
        about = {"protocol": json.loads((folder / "protocol.json").read_text())}
        speed = folder / "speed.json"
        if len(todo):
            speed.write_text(
                json.dumps(
                    {
                        "images_per_second": (len(todo) - compiled) / (time.monotonic() - clock),
                        "device": jax.devices()[0].device_kind,
                        "devices": jax.device_count(),
                    }
                )
                + "\n"
            )
        if speed.exists():  # of the last run that drew any
            about["speed"] = json.loads(speed.read_text())
            logging.info(
                "%.1f images/s on %d x %s",
                *(about["speed"][name] for name in ("images_per_second", "devices", "device")),
            )
        paths = [image_path(folder, i) for i in index]
        write_npz(workdir / "samples.npz", paths, labels, about)
        shown = np.stack([read_image(path) for path in paths[:GRID_IMAGES]])
        pictures.square_grid(shown).save(workdir / "samples.png")
        logging.info(
            "%d images in %s, their grid in samples.png, all of them in samples.npz",
            len(index),
            folder,
        )


def local_rows(batch: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a sharded batch that this process holds, with their numbers; each row belongs to one process."""
    for shard in batch.addressable_shards:
        if shard.replica_id == 0:
            yield from enumerate(np.asarray(shard.data), shard.index[0].start or 0)


def save_batch(folder: pathlib.Path, index: np.ndarray, images: jax.Array) -> None:
    """Writes the images of a batch that this process holds; row r is image index[r], rows beyond the index are filling."""
    for row, image in local_rows(images):
        if row < len(index):
            save_image(image_path(folder, index[row]), pictures.to_uint8(image))


def claim(folder: pathlib.Path, wanted: dict[str, Any]) -> None:
    """Writes the protocol into a new folder, or checks that the folder's images were drawn by the same one."""
    path = folder / "protocol.json"
    wanted = json.loads(json.dumps(wanted))
    there = json.loads(path.read_text()) if path.exists() else {}
    multihost_utils.sync_global_devices("protocol read")  # before process 0 may write it
    if there:
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise ValueError(
                    f"{folder} holds images drawn with {name} = {there.get(name)}, this run has "
                    f"{wanted.get(name)}; use another --workdir or remove the folder"
                )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1) + "\n")
    multihost_utils.sync_global_devices("protocol written")


def image_path(folder: pathlib.Path, i: int) -> pathlib.Path:
    return folder / f"{i:06d}.png"


def save_image(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes a PNG under its final name only when it is whole: (h, w, 1 or 3) uint8."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
        file.flush()
        os.fsync(
            file.fileno()
        )  # a machine that dies after the renaming would else leave an empty file of that name
    os.replace(part, path)


def is_whole(path: pathlib.Path) -> bool:
    """Whether the PNG is there up to its last chunk, which a file cut short lacks."""
    if not path.is_file() or path.stat().st_size < len(PNG_START + PNG_END):
        return False
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-len(PNG_END), os.SEEK_END)
        return (start, file.read()) == (PNG_START, PNG_END)


def read_image(path: pathlib.Path) -> np.ndarray:
    """(h, w, 1 or 3) uint8. Raises: ValueError naming the file."""
    try:
        image = np.asarray(Image.open(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; remove it, the same command draws it again"
        ) from error
    return image[..., None] if image.ndim == 2 else image


def write_npz(
    path: pathlib.Path,
    images: list[pathlib.Path],
    labels: np.ndarray,
    about: dict[str, dict[str, Any]],
) -> None:
    """Writes arr_0 (N, h, w, C) uint8, what the ADM evaluator reads, image by image; and label and `about` beside it.

    Raises: ValueError naming an image that cannot be read or is not of the first one's shape; the npz is as it was.
    """
    part = path.with_suffix(".part")
    first = read_image(images[0]).shape
    shape = (len(images), *first)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for path_of_image in images:
                image = read_image(path_of_image)
                if image.shape != first or image.dtype != np.uint8:
                    raise ValueError(
                        f"{path_of_image} is {image.dtype} {image.shape}, {images[0].name} is uint8 {first}; "
                        f"remove the one that is not of this run"
                    )
                file.write(np.ascontiguousarray(image).tobytes())
        for name, value in {
            "label": labels,
            **{name: np.array(json.dumps(text)) for name, text in about.items()},
        }.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value)
    os.replace(part, path)
