"""What a run shows of itself while it trains.

Grids of preview images, and scores of a few images.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from lit_jax import pictures
from lit_jax.evaluation import reports
from lit_jax.evaluation.evaluator import Evaluator

# (params, index (n,), condition, on_batch) -> images (n, h, w, C) float32: a
# `sampling.Sampler`.
DrawImages = Callable[
    [Any, np.ndarray, Mapping[str, np.ndarray], Callable[[int], None]],
    np.ndarray,
]


class Drawn(NamedTuple):
    """Images of a model."""

    images: np.ndarray  # (n, h, w, C) uint8; black where one is not finite
    not_finite: int  # how many held NaN or infinity

    def title(self, name: str) -> str:
        """The model's name, with the number of images that are not finite, if any."""
        return f"{name}, {self.not_finite} not finite" if self.not_finite else name


def draw_images(
    name: str,
    sampler: DrawImages,
    params: Any,
    condition: Mapping[str, np.ndarray],
    on_batch: Callable[[int], None],
) -> Drawn:
    """Images 0 to n - 1 under the n given conditions.

    Args:
      name: of the model, for the warning about images that are not finite.
      sampler: draws image i from its number and condition alone.
      condition: arrays (n, ...), see `conditions.for_images`.
      on_batch: is called after each batch with the number of images that are
        done. It may raise to stop.
    Returns: the same on every process.
    """
    # The same numbers each time: what changes from step to step is the model.
    num_images = len(next(iter(condition.values())))
    images = sampler(params, np.arange(num_images), condition, on_batch)
    finite = np.array([np.isfinite(image).all() for image in images])
    count = int((~finite).sum())
    if count:
        logging.warning("%d of %d images of the %s are not finite", count, num_images, name)
    # -1 is black; a NaN has no grey level.
    images = np.where(finite[:, None, None, None], images, np.float32(-1))
    return Drawn(pictures.to_uint8(images), count)


def preview_path(folder: epath.Path, step: int) -> epath.Path:
    """The grid of a step. Zeros in front, so that the files are sorted by step."""
    return folder / f"step_{step:07d}.png"


def evaluation_path(workdir: epath.Path, step: int) -> epath.Path:
    """The scores of a step."""
    return workdir / f"evaluation_{step:07d}.json"


class Previews:
    """Grids of the same images at every step, the student below the teacher.

    Args:
      samplers: by the name of the model, "teacher" and "student", in the order
        of the rows.
      condition: arrays (n, ...) for n columns.
      folder: where the grids go.
    """

    def __init__(
        self,
        samplers: Mapping[str, DrawImages],
        condition: Mapping[str, np.ndarray],
        folder: epath.PathLike,
    ):
        self._samplers = samplers
        self._condition = condition
        self._folder = epath.Path(folder)
        self._rows: dict[str, Drawn] = {}

    def path(self, step: int) -> epath.Path:
        """The grid of a step."""
        return preview_path(self._folder, step)

    def draw(
        self,
        params: Mapping[str, Any],
        step: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Image.Image:
        """Draws, saves and returns the grid of a step.

        Args:
          params: the parameters of each sampler's model; of the student its
            EMA.
          on_batch: see `draw_images`.
        """
        for name, sampler in self._samplers.items():
            # The teacher does not change, so its row is drawn once.
            if name == "teacher" and name in self._rows:
                continue
            self._rows[name] = draw_images(
                name,
                sampler,
                params[name],
                self._condition,
                on_batch,
            )

        rows = [drawn.images for drawn in self._rows.values()]
        titles = [drawn.title(name) for name, drawn in self._rows.items()]
        picture = pictures.image_grid(rows, titles)
        # All processes draw together and have all images; one writes.
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            pictures.save_picture(self.path(step), picture)
        return picture


class PeriodicEvaluation:
    """Scores of the same few images at every step, drawn with the EMA.

    Args:
      evaluator: scores them.
      sampler: draws them.
      condition: arrays (n, ...) for n images.
      sampling: how they are drawn, for the protocol; see `sampling.protocol`.
      workdir: the scores go into evaluation_STEP.json and .md there.
      read_labels: how often a classifier finds in images (n, h, w, C) uint8 what
        `condition` asks for; becomes the score labels_read.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        sampler: DrawImages,
        condition: Mapping[str, np.ndarray],
        sampling: Mapping[str, Any],
        workdir: epath.PathLike,
        read_labels: Callable[[np.ndarray], float] | None = None,
    ):
        self._evaluator = evaluator
        self._sampler = sampler
        self._condition = condition
        self._sampling = sampling
        self._workdir = epath.Path(workdir)
        self._read_labels = read_labels

    def path(self, step: int) -> epath.Path:
        """The JSON of a step."""
        return evaluation_path(self._workdir, step)

    def score(
        self,
        ema_params: Any,
        step: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> dict[str, float]:
        """Draws and scores the images of a step.

        The files that it writes hold the protocol too, see `protocol.py`.

        Args:
          on_batch: is called around each batch of the sampler and of the
            feature network. It may raise to stop.
        Returns: the scores by name, such as fd_efficientnet_lite0_1k. Where
          images are not finite, their number, images_not_finite, alone.
        """
        images, not_finite = draw_images(
            "student",
            self._sampler,
            ema_params,
            self._condition,
            on_batch,
        )
        # Every process scores. To hear of a request to stop, all of them must
        # call on_batch equally often.
        if not_finite:
            # A distance to black images would look like one of a bad model.
            scores = {"images_not_finite": float(not_finite)}
        else:
            scores = self._evaluator.score_images(images, on_batch)
            if self._read_labels:
                scores["labels_read"] = self._read_labels(images)
        if jax.process_index() == 0:
            # The step is a field of its own, so that a comparison can be drawn
            # over it.
            sampling = {**self._sampling, "step": step}
            num_images, *shape = images.shape
            result = self._evaluator.make_result(scores, num_images, shape, sampling)
            for note in result["notes"]:
                logging.warning("step %d: %s", step, note)
            path = self.path(step)
            reports.write_report(path.with_name(path.stem), result)
        return scores
