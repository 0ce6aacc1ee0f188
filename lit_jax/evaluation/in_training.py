"""What a training run draws and scores on its way: previews, and evaluations of the EMA weights."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from lit_jax import pictures
from lit_jax.evaluation import protocol, reports


class Previews:
    """Grids of fixed noise and conditions: the teacher's row, drawn once, over the student's."""

    def __init__(self, samplers, index, condition, folder: epath.Path):
        self._samplers = samplers
        self._index = index
        self._condition = condition
        self._folder = folder
        self._rows: dict[str, np.ndarray] = {}

    def path(self, step: int) -> epath.Path:
        return self._folder / f"step_{step:07d}.png"

    def draw(
        self, params: dict[str, Any], step: int, on_batch: Callable[[int], None]
    ) -> Image.Image:
        for name, sampler in self._samplers.items():
            if name == "teacher" and name in self._rows:
                continue
            images = sampler(params[name], self._index, self._condition, on_batch)
            self._rows[name] = pictures.to_uint8(images)
        picture = pictures.image_grid(list(self._rows.values()), list(self._rows))
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            picture.save(self.path(step))
        return picture


class PeriodicEvaluation:
    """Scores a few images of the EMA weights during training, against evaluate.reference."""

    def __init__(self, sampler, index, condition, extractor, reference, settings, about, workdir):
        self._sampler = sampler
        self._index = index
        self._condition = condition
        self._extractor = extractor
        self._reference = reference
        self._settings = settings
        self._about = about
        self._workdir = workdir

    def path(self, step: int) -> epath.Path:
        return self._workdir / f"evaluation_{step:07d}.json"

    def score(
        self, ema_params: Any, step: int, on_batch: Callable[[int], None]
    ) -> dict[str, float]:
        images = self._sampler(ema_params, self._index, self._condition, on_batch)
        images = pictures.to_uint8(images)
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
                sampling=self._about | {"step": step},
            )
            reports.write_report(self.path(step).with_suffix(""), result)
        return scores
