"""The real command line, run in this process, and a teacher for it whose weights are all random."""

import pathlib
import signal
import sys

import numpy as np
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import save_file

from lit_jax import main

ROOT = pathlib.Path(__file__).parent.parent


def run(monkeypatch, *arguments):
    """Runs `python -m lit_jax.main ARGUMENTS`.

    Returns: None if it ends well, or the text that goes to stderr with status 1.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lit_jax.main", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with flagsaver.flagsaver():  # overrides define flags of their own; they go with the run
        flags.FLAGS.unparse_flags()
        try:
            main.run()
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            flags.FLAGS.mark_as_parsed()
    return None


def debug_arguments(folder, teacher, *overrides):
    """configs/debug.py with its data under `folder` and its workdir `folder`/run."""
    return [
        "--config=configs/debug.py",
        f"--workdir={folder / 'run'}",
        f"--config.data.dir={folder / 'data'}",
        f"--config.teacher.checkpoint={teacher}",
        "--config.student.init=teacher",
        "--config.teacher.num_heads=2",
        *overrides,
    ]


TEACHER = {
    "depth": 2,
    "width": 32,
    "patch_size": 4,
    "in_channels": 1,
    "num_classes": 10,
    "grid": (7, 7),
    "learn_sigma": True,
}


def write_teacher(path: pathlib.Path, seed: int = 0, **change) -> dict[str, np.ndarray]:
    """Writes a softmax DiT of configs/debug.py's size in the official key layout.

    NumPy writes it, so that the jobs are tested where no torch is. tests/models/test_dit.py holds
    this key layout against a torch model. Matrices are N(0, 1/fan_in) and vectors N(0, 0.1**2): a
    fresh adaLN-Zero block would be the identity, and a port that forgets a part of it would pass.

    Args:
      change: other values for entries of TEACHER.

    Returns: {official key: float32 array}; a linear layer's weight is (out, in), as in torch.
    """
    assert change.keys() <= TEACHER.keys()
    size = TEACHER | change
    D = size["width"]
    C = size["in_channels"]
    p = size["patch_size"]
    C_out = 2 * C if size["learn_sigma"] else C

    weights = {
        "x_embedder.proj": (D, C, p, p),
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (p * p * C_out, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for i in range(size["depth"]):
        weights |= {
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D),
        }
    shapes = {"y_embedder.embedding_table.weight": (size["num_classes"] + 1, D)}
    for name, shape in weights.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    rng = np.random.default_rng(seed)
    tensors = {"pos_embed": position_table(size["grid"], D)}
    for name, shape in shapes.items():
        deviation = 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        tensors[name] = np.float32(deviation * rng.standard_normal(shape))
    save_file(tensors, path)
    return tensors


def position_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """(1, h * w, width) float32: half of the width encodes the column, half the row."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    halves = [f(position * omega) for position in (columns, rows) for f in (np.sin, np.cos)]
    return np.float32(np.concatenate(halves, axis=1))[None]
