"""What each field of a config may hold, whatever the job: nonsense is refused before anything is read or written.

What depends on the mesh, a checkpoint or the data is checked where those are known: from_config.py.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from lit_jax.kernels.linear_attention import IMPLEMENTATIONS, KERNEL_FUNCTIONS
from lit_jax.models.attention import SOFTMAX_IMPLEMENTATIONS
from lit_jax.samplers import SAMPLERS, VARIANCES

# In words, as a test, and the fields; NaN passes no test.
NUMBERS = (
    (
        "at least 1",
        lambda x: x >= 1,
        (
            "model.patch_size",
            "model.num_classes",
            "model.input_size",
            "model.in_channels",
            "prepare.image_size",
            "prepare.batch_size",
            "prepare.shard_records",
            "train.batch_size",
            "train.steps",
            "train.accumulation",
            "train.log_every",
            "train.preview_images",
            "train.stop_after_bad_steps",
            "checkpoint.every",
            "checkpoint.keep",
            "sample.steps",
            "sample.num_images",
            "sample.batch_size",
            "evaluate.every_images",
            "evaluate.batch_size",
            "evaluate.num_neighbour_images",
            "evaluate.neighbours",
            "evaluate.split_size",
            "benchmark.attention_tokens",
            "benchmark.model_tokens",
            "benchmark.repeats",
            "plan.slices",
            "mesh.join_timeout",
            "mesh.heartbeat",
        ),
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        (
            "model.depth",
            "model.width",
            "model.num_heads",
            "teacher.num_heads",
            "data.num_threads",
            "data.prefetch",
            "autoencoder.slice_size",
            "train.preview_every",
            "optimizer.warmup",
            "mesh.cpu_devices",
            "checkpoint.keep_every",
            "port.num_heads",
            "port.num_classes",
            "port.input_size",
            "evaluate.every",
            "evaluate.num_images",
            "report.num_images",
        ),
    ),
    ("at least 1, or -1", lambda x: x >= 1 or x == -1, ("mesh.data", "mesh.fsdp")),
    ("a multiple of 4, or 0", lambda x: x >= 0 and x % 4 == 0, ("autoencoder.tile_size",)),
    ("odd, or 0", lambda x: x == 0 or x > 0 and x % 2, ("model.conv_size",)),
    ("in [0, 2**32)", lambda x: 0 <= x < 2**32, ("seed",)),
    (
        "in [0, 1)",
        lambda x: 0 <= x < 1,
        ("train.label_dropout", "optimizer.b1", "optimizer.b2", "ema.decay"),
    ),
    ("in [0, 1]", lambda x: 0 <= x <= 1, ("sample.eta",)),
    (
        "a finite number, at least 0",
        lambda x: 0 <= x < math.inf,
        (
            "distill.noise_weight",
            "distill.variance_weight",
            "autoencoder.scaling_factor",
            "train.watchdog",
            "optimizer.learning_rate",
            "optimizer.weight_decay",
            "optimizer.clip_norm",
            "sample.cfg_scale",
            "port.scaling_factor",
        ),
    ),
    (
        "a finite number above 0",
        lambda x: 0 < x < math.inf,
        ("model.mlp_norm_epsilon", "optimizer.epsilon"),
    ),
    (
        "two numbers, the first not above the second",
        lambda x: len(x) == 2 and all(isinstance(end, (int, float)) for end in x) and x[0] <= x[1],
        ("sample.cfg_interval",),
    ),
)
NAMES = (
    "inherit.load",
    "inherit.keep_init",
    "evaluate.compare",
    "evaluate.compare_across",
    "plan.programs",
    "benchmark.what",
)
WORDS = {
    "model.kernel_function": KERNEL_FUNCTIONS,
    "model.timestep_freq_shift": (0, 1),
    "teacher.dtype": ("bfloat16", "float32"),
    "teacher.implementation": (None, *SOFTMAX_IMPLEMENTATIONS),
    "distill.variance_target": ("raw", "log_variance"),
    "autoencoder.dtype": ("float32", "bfloat16"),
    "sample.sampler": SAMPLERS,
    "sample.spacing": ("", "respaced", "leading", "trailing", "linspace"),
    "sample.variance": ("", *VARIANCES),
    "sample.order": (1, 2, 3),
    "sample.labels": ("random", "balanced"),
    "sample.cfg_channels": ("3", "all"),
    **dict.fromkeys(("port.weights", "teacher.weights", "student.weights"), ("ema", "model")),
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for the first value that can never work, naming the field, the value and what it may be."""
    missing = [
        name for *_, names in NUMBERS for name in (*names, *NAMES, *WORDS) if not _has(config, name)
    ]
    if missing:
        raise ValueError(
            f"the config has no field {missing[0]}; get_config() starts from that of configs/default.py"
        )
    for words, allowed, names in NUMBERS:
        for name in names:
            if (value := _read(config, name)) is None or not allowed(value):
                raise ValueError(f"{name} must be {words}; got {value!r}")
    for name in NAMES:
        if not isinstance(value := _read(config, name), (tuple, list)) or not all(
            isinstance(x, str) for x in value
        ):
            raise ValueError(f"{name} must be a tuple of names, such as ('a', 'b'); got {value!r}")
    words = WORDS | {
        "model.implementation": (
            None,
            *(IMPLEMENTATIONS if config.model.attention == "linear" else SOFTMAX_IMPLEMENTATIONS),
        )
    }
    for name, choices in words.items():
        if (value := _read(config, name)) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def _has(config: Any, field: str) -> bool:
    try:
        _read(config, field)
    except (KeyError, TypeError):
        return False
    return True


def _read(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config
