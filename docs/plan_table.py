"""Plans LiT-XL/2 with its DiT-XL/2 teacher on one slice after the other.

Prints the table of docs/scaling.md, about 80 CPU seconds a row. Of TPU7x "a chip" is one of its
two cores, which are devices of their own. Rows that are already
in WORKDIR are not planned again.

python docs/plan_table.py [WORKDIR]
"""

import json
import pathlib
import subprocess
import sys

FSDP = 8
BATCH_SIZE = 256
ROWS = (  # pixels, topology, slices
    (256, "v5e:2x4", 1),
    (256, "v5e:4x4", 1),
    (256, "v5e:4x8", 1),
    (256, "v5e:8x8", 1),
    (256, "v5e:8x16", 1),
    (256, "v5e:16x16", 1),
    (256, "v5e:8x8", 2),
    (512, "v5p:2x2x2", 1),
    (512, "v5p:4x4x4", 1),
    (512, "v6e:2x4", 1),
    (512, "v6e:8x8", 1),
    (256, "tpu7x:2x2x1", 1),
    (512, "tpu7x:2x2x1", 1),
    (512, "tpu7x:4x4x4", 1),
)
HEAD = (
    "pixels",
    "slice",
    "chips",
    "data x fsdp",
    "batch",
    "GiB a chip",
    "TFLOP a chip",
    "GB a chip",
    "sent GB",
    "step at least",
    "bound by",
    "images/s at most",
    "MFU at most",
)


def main(workdir: pathlib.Path) -> None:
    _write_row(HEAD)
    sys.stdout.write(f"|{'---|' * len(HEAD)}\n")
    for pixels, topology, slices in ROWS:
        folder = workdir / f"{pixels}_{topology.replace(':', '_')}_{slices}"
        report = folder / "plan.json"
        if not report.exists():
            _plan(folder, pixels, topology, slices)
        name = f"{slices} x {topology}" if slices > 1 else topology
        if report.exists():
            cells = [pixels, name, *_cells(json.loads(report.read_text()))]
        else:
            cells = [pixels, topology, "not planned: stderr says why"]
        _write_row(cells + [""] * (len(HEAD) - len(cells)))


def _plan(folder: pathlib.Path, pixels: int, topology: str, slices: int) -> None:
    fields = {
        "plan.topology": topology,
        "plan.slices": slices,
        "plan.programs": "('distill',)",
        "mesh.fsdp": FSDP,
        "train.batch_size": BATCH_SIZE,
        "model.input_size": pixels // 8,
    }
    command = [
        sys.executable,
        "-m",
        "lit_jax.main",
        "--config=configs/default.py",
        "--mode=plan",
        f"--workdir={folder}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    # Exit status 1: it does not fit, which is a row too.
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def _cells(plan: dict) -> list:
    """From the third column on."""
    mesh = plan["mesh"]
    e = plan["programs"]["distill"]
    cells = [
        plan["chips"],
        f"{mesh['data']} x {mesh['fsdp']}",
        BATCH_SIZE,
        f"{e['needs'] / 2**30:.1f} of {e['capacity'] / 2**30:.1f}",
    ]
    if not e["fits"]:
        return [*cells, f"does not fit; batch {plan['largest_batch']['distill']} does"]

    sent = sum(kind["wire_bytes"] for kind in e["collectives"].values())
    seconds = e["seconds"]
    bound = max(seconds, key=seconds.get)
    return [
        *cells,
        f"{e['flops'] / 1e12:.2f}",
        f"{e['traffic'] / 1e9:.0f}",
        f"{sent / 1e9:.1f}",
        f"{seconds[bound] * 1e3:.0f} ms",
        bound,
        f"{e['images_per_second']:,.0f}",
        f"{e['mfu']:.0%}",
    ]


def _write_row(cells) -> None:
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(pathlib.Path((sys.argv[1:] + ["workdir/plans"])[0]))
