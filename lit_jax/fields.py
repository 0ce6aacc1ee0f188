"""What each field of a config may hold, whatever the job: nonsense ends before anything is read.

Settings that travel as a dataclass check themselves where `Experiment` builds them; here are the
fields that no such class has. What depends on the mesh, a checkpoint or the data is checked where
those are known: experiment.py.
"""

import re
from typing import Any

from ml_collections import ConfigDict

from lit_jax.data.caption_records import CAPTION_DTYPES
from lit_jax.models.blocks import REMAT_POLICIES
from lit_jax.quantization import KINDS
from lit_jax.ranges import AT_LEAST_0, AT_LEAST_1, NOT_NEGATIVE, SIDES, UNIT, Range, between, one_of
from lit_jax.runtime import storage

SIZE = Range("at least 1, or -1", lambda x: x >= 1 or x == -1)
SEED = Range("in [0, 2**32)", lambda x: 0 <= x < 2**32)
STEPS = Range(
    "(), or the first and the last step to trace",
    lambda x: len(x) == 0 or (len(x) == 2 and 1 <= x[0] <= x[1]),
)
# One name in brackets is a str to Python: ('q') where ('q',) was meant.
NAMES = Range(
    "a tuple of names, such as ('a', 'b')",
    lambda x: isinstance(x, tuple | list) and all(isinstance(name, str) for name in x),
)
# What memory and files are made for. Anything larger is a slip of the finger.
IMAGES = between(1, 10_000_000)
BATCH = between(1, 1_000_000)
DEVICES = between(0, 256)  # JAX aborts the process where there are thousands
SECONDS = between(1, 10_000_000)  # a timer of C takes no more than about 300 years
PIXELS = Range(
    "(), or height and width",
    lambda x: len(x) in (0, 2) and all(isinstance(side, int) and 0 < side < 10**5 for side in x),
)
ASPECT = Range(
    "empty, or width:height such as 16:9",
    lambda x: isinstance(x, str) and bool(re.fullmatch(r"([1-9]\d{0,4}:[1-9]\d{0,4})?", x)),
)
DTYPE = one_of("bfloat16", "float32")

RANGES = {
    # JAX takes a seed of 32 bits, and NumPy, which shuffles the data, none below 0.
    "seed": SEED,
    "model.input_size": SIDES,
    "model.dtype": DTYPE,
    "teacher.num_heads": AT_LEAST_0,
    "teacher.dtype": DTYPE,
    "inherit.load": NAMES,
    "inherit.keep_init": NAMES,
    # 0 reads in the main thread: for a debugger, and for data that are in memory.
    # Grain starts the threads, and makes a place for each batch that is read ahead, before
    # the first one is there.
    "data.num_threads": between(0, 1024),
    "data.prefetch": between(0, 10_000),
    "autoencoder.scaling_factor": NOT_NEGATIVE,
    "text.caption_ratio": UNIT,
    "prepare.buckets": NAMES,
    "prepare.captions": one_of("features", "text"),
    "prepare.caption_dtype": one_of(*CAPTION_DTYPES),
    "prepare.skip_broken": AT_LEAST_0,
    "prepare.batch_size": between(1, 65_536),
    "prepare.shard_records": IMAGES,
    # The devices have to divide it too: Experiment.check_batches, once the mesh is known.
    "train.batch_size": BATCH,
    "train.remat": one_of(*REMAT_POLICIES),
    "train.log_every": AT_LEAST_1,
    "train.preview_every": AT_LEAST_0,
    "train.preview_images": BATCH,
    "train.watchdog": between(0, 10_000_000),
    "train.profile": STEPS,
    "train.stop_after_bad_steps": AT_LEAST_1,
    "mesh.data": SIZE,
    "mesh.fsdp": SIZE,
    "mesh.cpu_devices": DEVICES,
    "mesh.join_timeout": SECONDS,
    "mesh.heartbeat": SECONDS,
    "checkpoint.every": AT_LEAST_1,
    "checkpoint.keep": AT_LEAST_1,
    "checkpoint.keep_every": AT_LEAST_0,
    "sample.prompts": NAMES,
    "sample.size": PIXELS,
    "sample.aspect": ASPECT,
    "sample.images_per_prompt": between(1, 10_000),
    "sample.null_mask": one_of("prompt", "own"),
    "sample.quantize": one_of(*KINDS),
    "sample.num_images": IMAGES,
    "sample.batch_size": BATCH,
    "port.input_size": Range(f"0, or {SIDES.words}", lambda x: x == 0 or SIDES.holds(x)),
    # 0 leaves it as the source says.
    "port.scaling_factor": NOT_NEGATIVE,
    "export.platforms": NAMES,
    "export.batch_size": between(0, 1_000_000),
    "demo.host": Range("the name or number of an interface", lambda x: bool(str(x))),
    "demo.port": between(0, 65_535),
    "evaluate.every": AT_LEAST_0,
    "evaluate.every_images": BATCH,
    "evaluate.num_images": AT_LEAST_0,
    "evaluate.compare": NAMES,
    "evaluate.compare_across": NAMES,
    "layers.num_batches": between(1, 1_000_000),
    "layers.flops_share": NOT_NEGATIVE,
    "benchmark.what": NAMES,
    "benchmark.attention_tokens": between(1, 10**9),
    "benchmark.model_tokens": between(1, 10**9),
    "benchmark.repeats": between(1, 10_000),
    "plan.slices": between(1, 1_024),
    "plan.programs": NAMES,
    "plan.buckets": NAMES,
    "report.num_images": between(0, 1_000_000),
}


# Where a user names a file or a folder; some of them may hold another word instead.
PATHS = (
    "compilation_cache",
    "teacher.checkpoint",
    "student.init",
    "data.dir",
    "autoencoder.checkpoint",
    "prepare.source",
    "prepare.dir",
    "text.checkpoint",
    "text.tokenizer",
    "sample.checkpoint",
    "sample.prompt_file",
    "port.source",
    "port.target",
    "port.null_caption",
    "export.target",
    "evaluate.weights",
    "evaluate.samples",
    "evaluate.reference",
    "evaluate.compare",
    "evaluate.geneval",
)


def resolve_paths(config: ConfigDict) -> None:
    """Puts the home folder for ~ in all path fields.

    Raises: ValueError naming the field that is a URL of a kind that is not known.
    """
    for field in PATHS:
        value = _read(config, field)
        group, _, name = field.rpartition(".")
        section = config[group] if group else config
        if isinstance(value, str):
            section[name] = storage.resolve(value, field)
        elif isinstance(value, tuple | list):
            section[name] = tuple(storage.resolve(str(path), field) for path in value)


def check(config: ConfigDict) -> None:
    """Raises ValueError for the first value that can never work, and says what it may be."""
    for name, (words, holds) in RANGES.items():
        value = _read(config, name)
        # ml_collections takes None for any field; only placeholders may hold it, and none is here.
        if value is None or not holds(value):
            raise ValueError(f"{name} must be {words}; got {value!r}")


def _read(config: ConfigDict, field: str) -> Any:
    value = config
    for name in field.split("."):
        try:
            value = value[name]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the config has no field {field}; get_config() starts from that of "
                f"configs/default.py"
            ) from error
    return value
