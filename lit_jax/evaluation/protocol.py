"""Which scores may be compared: those that were made by the same protocol.

A protocol is a nested dict with everything that a score depends on: features,
weights, resize, reference, and how the images were drawn. It is written into
the file of the scores, see `Evaluator.make_result`.
"""

from collections.abc import Mapping
from typing import Any

# {score: (value, tolerance)}, from the README of openai/guided-diffusion's
# evaluations folder: admnet_guided_upsampled_imagenet256.npz against
# VIRTUAL_imagenet256_labeled.npz. The tolerances allow for float32 sums in
# another order, and for the float16 distances that the published precision and
# recall were computed from.
PUBLISHED = {
    "is_adm_50k": (215.8370361328125, 0.3),
    "fid_adm_50k": (3.9425574129223264, 0.01),
    "sfid_adm_50k": (6.140433703346162, 0.02),
    "precision_adm_50k": (0.8265, 0.002),
    "recall_adm_50k": (0.5309, 0.002),
}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"samples": {"steps": 250}} -> {"samples.steps": 250}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], across: tuple[str, ...] = ()
) -> list[str]:
    """What differs between two protocols, in words; fields under `across` may differ.

    Args:
      across: fields or whole branches of the protocol: "samples.cfg_scale", or
        "samples".
    """
    a = flatten(a)
    b = flatten(b)
    branches = tuple(f"{name}." for name in across)
    return [
        f"{key} is {a.get(key)!r} and {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in across and not key.startswith(branches)
    ]


def check_comparable(
    results: Mapping[str, Mapping[str, Any]], compare_across: tuple[str, ...] = ()
) -> None:
    """Raises ValueError unless all results were made by one protocol.

    Args:
      results: what `Evaluator.make_result` returns, by the name of the run.
      compare_across: what may differ, see `differences`.
    """
    (first, expected), *others = results.items()
    for name, result in others:
        found = differences(expected["protocol"], result["protocol"], compare_across)
        if found:
            raise ValueError(
                f"compare_across = {compare_across!r}: {first} and {name} were not made by the "
                f"same protocol: {'; '.join(found)}. Add the fields that may differ"
            )

        # A comparison has one column for each score, so every run needs all of
        # them.
        if expected["scores"].keys() != result["scores"].keys():
            raise ValueError(
                f"{first} and {name} have different scores: {sorted(expected['scores'])} and "
                f"{sorted(result['scores'])}"
            )


def self_check(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compares scores of ADM's samples with the published ones.

    Returns: rows of score, here, published, tolerance, and passed.
    Raises: ValueError where one of the published scores is not among `scores`.
    """
    missing = sorted(PUBLISHED.keys() - scores.keys())
    if missing:
        raise ValueError(
            f"the self-check needs {missing}, there are {sorted(scores)}: the reference is not "
            "ADM's VIRTUAL_imagenet256_labeled.npz"
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
