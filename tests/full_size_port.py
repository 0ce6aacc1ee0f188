"""Ports a model of full size and random weights there and back, and prints what it took.

    python tests/full_size_port.py FOLDER             # DiT-XL/2
    python tests/full_size_port.py FOLDER pixart      # PixArt-Sigma-XL/2 at 512 pixels

It is not part of the suite. It takes 8 GB in FOLDER, which it frees at the end, and 6 GB of memory.
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

REPOSITORY = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from lit_jax.models.dit import DiTConfig, position_embedding
from lit_jax.models.pixart import PixArtConfig
from lit_jax.porting import dit, pixart
from lit_jax.porting.torch_file import NewTensor, write_torch

# The recipe that ports it, its architecture, and the module with its keys.
MODELS = {
    "dit": ("configs/default.py", DiTConfig.of_size("XL", grid=(16, 16)), dit),
    "pixart": ("configs/pixart_sigma_512.py", PixArtConfig.of_size("XL", grid=(32, 32)), pixart),
}


def write_checkpoint(path: pathlib.Path, model: str) -> None:
    """A flat state dict in the official layout."""
    _, config, keys = MODELS[model]
    rng = np.random.default_rng(0)
    tokens = config.grid[0] * config.grid[1]

    def table():
        return position_embedding(config.grid, config.width)[None]

    def draw(shape):
        return rng.standard_normal(shape, np.float32)

    tensors = [NewTensor("pos_embed", (1, tokens, config.width), table)]
    for entry in keys.entries(config):
        shape = entry.torch_shape
        read = functools.partial(draw, shape)
        tensors += [NewTensor(key, shape, read) for key in entry.keys]
    write_torch(path, tensors)


def port(source: pathlib.Path, target: pathlib.Path, workdir: pathlib.Path, model: str) -> dict:
    """Runs the command as a user does; prints its time and memory, and returns its report."""
    command = [
        sys.executable,
        "-m",
        "lit_jax.main",
        f"--config={MODELS[model][0]}",
        "--mode=port",
        f"--workdir={workdir}",
        f"--config.port.source={source}",
        f"--config.port.target={target}",
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    report = json.loads((workdir / "port_report.json").read_text())
    peak = 1024 * usage.ru_maxrss
    size = 4 * report["parameters"]
    print(
        f"{source.name} to {target.name}: {report['counts']['keys']} keys, "
        f"{report['parameters']:,} parameters; peak memory {peak / 1e9:.2f} GB, "
        f"{peak / size:.2f} times their {size / 1e9:.2f} GB; "
        f"{usage.ru_utime + usage.ru_stime:.0f} s of a core, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return report


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    model = sys.argv[2] if len(sys.argv) > 2 else "dit"
    folder.mkdir(parents=True)
    made = [folder / name for name in (f"{model}_xl2.pt", "orbax", f"{model}_xl2.safetensors")]
    try:
        write_checkpoint(made[0], model)
        reports = [
            port(source, target, folder / "work", model) for source, target in zip(made, made[1:])
        ]
        if len({report["checksum"] for report in reports}) > 1:
            sys.exit("the checksums differ")
        print(f"sha256 {reports[0]['checksum']} on both ways")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
