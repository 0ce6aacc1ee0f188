"""Scores with the protocol that they were made by, and which of them may be compared."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from lit_jax.evaluation import features, metrics, references

# README of openai/guided-diffusion's evaluations folder: admnet_guided_upsampled_imagenet256.npz against
# VIRTUAL_imagenet256_labeled.npz. The tolerances allow for float32 in another order, and for the float16 distances
# that precision and recall were published with.
PUBLISHED = {
    "is_adm_50k": (215.8370361328125, 0.3),
    "fid_adm_50k": (3.9425574129223264, 0.01),
    "sfid_adm_50k": (6.140433703346162, 0.02),
    "precision_adm_50k": (0.8265, 0.002),
    "recall_adm_50k": (0.5309, 0.002),
}


def count_name(count: int) -> str:
    """50000 -> "50k"; a count that is no multiple of a thousand is written out."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def score(
    extractor: features.Extractor,
    samples: references.Statistics,
    reference: references.Statistics,
    *,
    neighbours: int = 3,
    split_size: int = 5000,
) -> dict[str, float]:
    """All scores that the two sides allow, by name; a reference without its own features gives no precision and recall."""
    suffix = f"{extractor.suffix}_{count_name(samples.count)}"
    scores = {
        f"{name}_{suffix}": metrics.frechet_distance(*samples.moments[key], *reference.moments[key])
        for key, name in extractor.frechet.items()
        if key in reference.moments
    }
    if samples.logits is not None:
        scores[f"is_{suffix}"] = metrics.inception_score(samples.logits, split_size)
    if reference.features is not None and samples.features is not None:
        precision, recall = metrics.precision_recall(
            reference.features, samples.features, neighbours
        )
        scores |= {f"precision_{suffix}": precision, f"recall_{suffix}": recall}
    return scores


def score_images(
    extractor: features.Extractor,
    images: np.ndarray,
    reference: references.Statistics,
    *,
    batch_size: int = 64,
    neighbours: int = 3,
    split_size: int = 5000,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Scores images (N, H, W, C) uint8 held in memory: what training calls every few thousand steps.

    `on_batch` is told, before each batch goes through the network, how many images went before it.
    """

    def batches():
        for start in range(0, len(images), batch_size):
            on_batch(start)
            yield images[start : start + batch_size]

    samples = references.collect(extractor, batches(), batch_size)
    return score(extractor, samples, reference, neighbours=neighbours, split_size=split_size)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"samples": {"steps": 250}} -> {"samples.steps": 250}"""
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _differences(a, b, across=()):
    a, b = flatten(a), flatten(b)
    return [
        f"{key} is {a.get(key)!r} and {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == c or key.startswith(f"{c}.") for c in across)
    ]


def check_comparable(results: dict[str, dict[str, Any]], across: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless all results were made by one protocol.

    Args:
        results: what `run` writes, by the name of the run.
        across: fields of the protocol that may differ, "samples.cfg_scale" or a whole branch, "samples".
    """
    (first, expected), *others = results.items()
    for name, result in others:
        differences = _differences(expected["protocol"], result["protocol"], across)
        if differences:
            raise ValueError(
                f"{first} and {name} were not made by the same protocol: {'; '.join(differences)}. What may "
                "differ is named in evaluate.compare_across"
            )
        if expected["scores"].keys() != result["scores"].keys():
            raise ValueError(
                f"{first} and {name} have different scores: {sorted(expected['scores'])} and "
                f"{sorted(result['scores'])}"
            )


def self_check(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Holds scores against the published figures of ADM's own samples; a row for each figure."""
    missing = sorted(PUBLISHED.keys() - scores.keys())
    if missing:
        raise ValueError(
            f"the self-check needs {missing}, there are {sorted(scores)}: the reference is not ADM's "
            "VIRTUAL_imagenet256_labeled.npz"
        )
    return [
        {
            "score": name,
            "here": scores[name],
            "published": published,
            "tolerance": tolerance,
            "passed": abs(scores[name] - published) <= tolerance,
        }
        for name, (published, tolerance) in PUBLISHED.items()
    ]


def check_settings(settings: ml_collections.ConfigDict, num_images: int) -> None:
    """Raises ValueError for too few images for their neighbours, before anything is computed."""
    for name, count in (
        ("num_neighbour_images", settings.num_neighbour_images),
        ("number of images", num_images),
    ):
        if count <= settings.neighbours:
            raise ValueError(
                f"evaluate.neighbours = {settings.neighbours} needs more images than that, but the "
                f"{name} is {count}"
            )


def make_result(
    extractor: features.Extractor,
    scores: dict[str, float],
    reference: references.Statistics,
    *,
    num_images: int,
    image_shape: Sequence[int],
    neighbours: int,
    split_size: int,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """Scores with the protocol that they were made by; `sampling` says how the images were drawn."""
    protocol = extractor.protocol | {
        "num_images": num_images,
        "image_shape": list(image_shape),
        "reference": reference.identity,
        "neighbours": neighbours,
        "samples": sampling,
    }
    if extractor.scores_classes:
        protocol["inception_score_split_size"] = split_size
    return {"scores": scores, "protocol": protocol, "device": jax.local_devices()[0].device_kind}
