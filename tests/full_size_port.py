"""Ports a DiT-XL/2 of full size and random weights there and back, and prints what it took. Not part of the suite.

python tests/full_size_port.py FOLDER        # takes 8 GB there and leaves nothing; 6 GB of memory
"""

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

from lit_jax.models.dit import position_embedding
from lit_jax.porting import layouts, torch_file

XL = dict(
    attention="softmax",
    depth=28,
    width=1152,
    num_heads=16,
    patch_size=2,
    in_channels=4,
    num_classes=1000,
    learn_sigma=True,
    qkv_bias=True,
    conv_size=0,
)
GRID = (16, 16)


def write_checkpoint(path: pathlib.Path) -> None:
    """A flat state dict in the official layout."""
    rng = np.random.default_rng(0)
    tensors = [("pos_embed", (1, 256, 1152), lambda: position_embedding(GRID, 1152)[None])]
    tensors += [
        (key, shape, lambda shape=shape: rng.standard_normal(shape, np.float32))
        for _, keys, _, shape in layouts.dit_rules(XL)
        for key in keys
    ]
    torch_file.write_torch(path, tensors)


def port(source: pathlib.Path, target: pathlib.Path, workdir: pathlib.Path) -> dict:
    """Runs the command as a user does; prints its time and memory, and returns its report."""
    command = [
        sys.executable,
        "-m",
        "lit_jax.main",
        "--config=configs/default.py",
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
    peak, size = 1024 * usage.ru_maxrss, 4 * report["parameters"]
    print(
        f"{source.name} to {target.name}: {report['counts']['keys']} keys, {report['parameters']:,} parameters; peak memory "
        f"{peak / 1e9:.2f} GB, {peak / size:.2f} times their {size / 1e9:.2f} GB; {usage.ru_utime + usage.ru_stime:.0f} s "
        f"of a core, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return report


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True)
    made = [folder / name for name in ("dit_xl2.pt", "orbax", "dit_xl2.safetensors")]
    try:
        write_checkpoint(made[0])
        reports = [port(source, target, folder / "work") for source, target in zip(made, made[1:])]
        if len({report["checksum"] for report in reports}) > 1:
            sys.exit("the checksums differ")
        print(f"sha256 {reports[0]['checksum']} on both ways")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
