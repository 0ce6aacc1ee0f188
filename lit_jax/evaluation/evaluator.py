"""Scores images against a reference.

Settings, network and reference belong together, as an `Evaluator`:

    settings = EvaluationSettings(reference="cifar10:train")
    evaluator = make_evaluator(settings, len(images), "data", "runs/scores")
    evaluator.score_images(images)  # {"fd_efficientnet_lite0_10k": 12.3}

What the scores mean is said in docs/evaluation.md.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lit_jax import ranges
from lit_jax.evaluation import features, metrics, references


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What decides the scores of given images.

    Raises: ValueError whose text starts with the field's name.
    """

    reference: str  # an npz file, a folder of images, or DATASET:SPLIT
    features: str = "efficientnet_lite0"  # one of features.EXTRACTORS
    weights: str = ""  # a file; "": those of the EfficientNet package
    batch_size: int = 64  # images through the network at once
    # Precision and recall use at most this many images of the reference.
    num_neighbour_images: int = 10_000
    neighbours: int = 3  # k of precision and recall
    split_size: int = 5_000  # images a split of the Inception score

    def __post_init__(self) -> None:
        features.check_name(self.features)
        ranges.check(
            self,
            # More at once are a mistake, and JAX would only say so when it allocates.
            batch_size=ranges.between(1, 1_000_000),
            num_neighbour_images=ranges.AT_LEAST_1,
            neighbours=ranges.AT_LEAST_1,
            split_size=ranges.AT_LEAST_1,
        )
        self.check_neighbours("num_neighbour_images", self.num_neighbour_images)

    def check_neighbours(self, name: str, count: int) -> None:
        """Raises ValueError where `count` images are too few.

        Args:
          name: what they are, for the error.
        """
        if count <= self.neighbours:
            raise ValueError(
                f"neighbours = {self.neighbours} needs more images than that, "
                f"but the {name} is {count}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """A feature network, a reference, and the settings of the scores between them."""

    settings: EvaluationSettings
    extractor: features.Extractor
    reference: references.Statistics

    def collect(self, batches: Iterable[np.ndarray]) -> references.Statistics:
        """Runs samples through the network.

        Args:
          batches: (B, H, W, 1 or 3) uint8, at most settings.batch_size images
            each.
        """
        return references.collect(self.extractor, batches, self.settings.batch_size)

    def score(self, samples: references.Statistics) -> dict[str, float]:
        """All scores that samples and reference allow, by name.

        A name carries its features and the number of images: "fid_adm_50k".
        """
        reference = self.reference
        settings = self.settings
        # The Frechet distance and the precision depend on the number of
        # images, so scores of different numbers get different names.
        suffix = f"{self.extractor.suffix}_{count_name(samples.count)}"

        scores = {}
        for key, name in self.extractor.frechet.items():
            # A reference of pytorch-fid has no moments for sFID.
            if key in reference.moments:
                scores[f"{name}_{suffix}"] = metrics.frechet_distance(
                    *samples.moments[key],
                    *reference.moments[key],
                )

        if samples.logits is not None:
            scores[f"is_{suffix}"] = metrics.inception_score(
                samples.logits,
                settings.split_size,
            )

        # A reference of moments alone has no neighbours.
        if reference.features is not None and samples.features is not None:
            precision, recall = metrics.precision_recall(
                reference.features,
                samples.features,
                settings.neighbours,
            )
            scores[f"precision_{suffix}"] = precision
            scores[f"recall_{suffix}"] = recall
        return scores

    def score_images(
        self, images: np.ndarray, on_batch: Callable[[int], None] = lambda done: None
    ) -> dict[str, float]:
        """The scores of images in memory, (N, H, W, C) uint8.

        Args:
          on_batch: is called before each batch with the number of images
            that are done. It may raise to stop.
        """
        batches = _split(images, self.settings.batch_size, on_batch)
        return self.score(self.collect(batches))

    def make_result(
        self,
        scores: dict[str, float],
        num_images: int,
        image_shape: Sequence[int],
        sampling: dict[str, Any],
    ) -> dict[str, Any]:
        """Scores with the protocol that they were made by, ready for JSON.

        Args:
          image_shape: (H, W, C) of the scored images.
          sampling: how they were drawn, see `sampling.protocol`, or what
            file they are from.
        Returns: with `notes`, what a reader of the scores should know.
        """
        made_by = self.extractor.protocol | {
            "num_images": num_images,
            "image_shape": list(image_shape),
            "reference": self.reference.identity,
            "neighbours": self.settings.neighbours,
            "samples": sampling,
        }
        # Only what decides a score is part of the protocol, or runs would
        # refuse to be compared for no reason: no batch size, and no split
        # size where there is no Inception score.
        if self.extractor.scores_classes:
            made_by["inception_score_split_size"] = self.settings.split_size
        return {
            "scores": scores,
            "protocol": made_by,
            "device": jax.local_devices()[0].device_kind,
            "notes": self._notes(image_shape),
        }

    def _notes(self, image_shape: Sequence[int]) -> list[str]:
        there = self.reference.image_shape
        # Both are resized to the network's input, so a score is computed all
        # the same. Channels decide nothing: grey becomes RGB.
        if not there or tuple(there[:2]) == tuple(image_shape[:2]):
            return []
        ours = f"{image_shape[0]} x {image_shape[1]}"
        theirs = f"{there[0]} x {there[1]}"
        return [
            f"the samples are {ours} pixels (height x width), the reference's images {theirs}: "
            "the scores measure the difference of sharpness too"
        ]


def make_evaluator(
    settings: EvaluationSettings,
    num_images: int,
    data_dir: epath.PathLike,
    workdir: epath.PathLike,
) -> Evaluator:
    """Loads the network, and loads or computes the reference's statistics.

    Args:
      num_images: how many will be scored at once.
      data_dir: where the data set of "DATASET:SPLIT" is.
      workdir: where its statistics are kept.
    Raises: ValueError or FileNotFoundError that names the setting.
    """
    # Before anything is read or drawn, which may take hours.
    settings.check_neighbours("number of images", num_images)
    # The network first: whether statistics can be used depends on it.
    extractor = features.make_extractor(settings.features, settings.weights)
    reference = references.make_reference(
        settings.reference,
        data_dir,
        workdir,
        extractor,
        batch_size=settings.batch_size,
        num_neighbour_images=settings.num_neighbour_images,
    )
    return Evaluator(settings, extractor, reference)


def count_name(count: int) -> str:
    """50000 -> "50k"; a count that is no multiple of a thousand is written out."""
    return str(count) if count % 1000 else f"{count // 1000}k"


def _split(
    images: np.ndarray, batch_size: int, on_batch: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch_size):
        on_batch(start)
        yield images[start : start + batch_size]
