"""Plans LiT-XL/2 with its DiT-XL/2 teacher on several slices: the table of docs/scaling.md.

    python docs/plan_table.py [WORKDIR]

It prints the table. A row takes about 80 CPU seconds. A row that is already in WORKDIR is not
planned again.
"""

import json
import pathlib
import subprocess
import sys

FSDP, BATCH_SIZE = 8, 256
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
)


def main(workdir: pathlib.Path) -> None:
    head = (
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
    sys.stdout.write(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    for pixels, topology, slices in ROWS:
        folder = workdir / f"{pixels}_{topology.replace(':', '_')}_{slices}"
        if not (folder / "plan.json").exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "lit_jax.main",
                    "--config=configs/default.py",
                    "--mode=plan",
                    f"--workdir={folder}",
                    f"--config.plan.topology={topology}",
                    f"--config.plan.slices={slices}",
                    f"--config.mesh.fsdp={FSDP}",
                    f"--config.train.batch_size={BATCH_SIZE}",
                    f"--config.model.input_size={pixels // 8}",
                    "--config.plan.programs=('distill',)",
                ],
                stdout=subprocess.DEVNULL,
                check=False,
            )  # status 1: does not fit, which is a row too
        if not (folder / "plan.json").exists():
            sys.stdout.write(
                f"| {pixels} | {topology} | not planned: stderr says why |"
                + " |" * (len(head) - 3)
                + "\n"
            )
            continue
        plan = json.loads((folder / "plan.json").read_text())
        e, mesh = plan["programs"]["distill"], plan["mesh"]
        name = f"{slices} x {topology}" if slices > 1 else topology
        cells = [
            pixels,
            name,
            mesh["data"] * mesh["fsdp"],
            f"{mesh['data']} x {mesh['fsdp']}",
            BATCH_SIZE,
        ]
        cells.append(f"{e['needs'] / 2**30:.1f} of {e['capacity'] / 2**30:.1f}")
        if e["fits"]:
            seconds, sent = (
                e["seconds"],
                sum(kind["wire_bytes"] for kind in e["collectives"].values()),
            )
            bound = max(seconds, key=seconds.get)
            cells += [
                f"{e['flops'] / 1e12:.2f}",
                f"{e['traffic'] / 1e9:.0f}",
                f"{sent / 1e9:.1f}",
                f"{seconds[bound] * 1e3:.0f} ms",
                bound,
                f"{e['images_per_second']:,.0f}",
                f"{e['mfu']:.0%}",
            ]
        else:
            cells += [f"does not fit; batch {plan['largest_batch']['distill']} does"] + [""] * 6
        sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(pathlib.Path((sys.argv[1:] + ["workdir/plans"])[0]))
