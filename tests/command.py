"""The real command line, run in this process, and a teacher for it.

The teacher is a torch model with random weights everywhere.
"""

import pathlib
import sys

import torch_dit
from absl import flags
from absl.testing import flagsaver
from safetensors.torch import save_file

from lit_jax import main

ROOT = pathlib.Path(__file__).parent.parent


def run(monkeypatch, *arguments):
    """Runs `python -m lit_jax.main ARGUMENTS`.

    Returns: None if it ends well, or the text that goes to stderr with status 1.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lit_jax.main", *map(str, arguments)])
    with flagsaver.flagsaver():  # overrides define flags of their own; they go with the run
        flags.FLAGS.unparse_flags()
        try:
            main.run()
        except SystemExit as end:
            return end.code
        finally:
            flags.FLAGS.mark_as_parsed()
    return None


def debug_arguments(folder, teacher, *overrides):
    """configs/debug.py with its data under `folder` and its workdir `folder`/run."""
    return [
        "--config=configs/debug.py",
        f"--workdir={folder / 'run'}",
        f"--config.data.dir={folder / 'data'}",
        f"--config.teacher.checkpoint={teacher}",
        "--config.teacher.num_heads=2",
        *overrides,
    ]


def write_teacher(path, seed=0, **change):
    """Writes a softmax DiT of configs/debug.py's size in the official key layout.

    Returns: the torch model.
    """
    fields = (
        dict(
            depth=2, width=32, num_heads=2, patch_size=4, in_channels=1, num_classes=10, grid=(7, 7)
        )
        | change
    )
    model = torch_dit.randomise_(torch_dit.DiT(**fields), seed)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model
