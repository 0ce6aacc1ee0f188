"""Kills a training run many times at random moments.

    python tests/soak.py [KILLS] [SEED]

Its end must equal that of a run that nobody disturbed, bit by bit. Without arguments there are 100
kills, with the seed 0. A kill takes a few seconds on one core.
"""

import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import lives


def soak(kills: int, seed: int) -> None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak_"))
    os.environ["SESSION_FILES"] = str(folder)
    forker, draw = lives.Forker(), random.Random(seed)
    server = lives.Server(forker, folder)
    steps = 6 * kills
    rhythm = (
        f"--config.train.steps={steps}",
        "--config.train.log_every=7",
        "--config.checkpoint.every=3",
    )
    expected, workdir = folder / "undisturbed", folder / "killed"
    ids, started = server.run(expected, *rhythm).ids(), time.monotonic()
    during_save = 0
    for kill in range(kills):
        batches = draw.randint(0, 8)
        life = server.start(workdir, *rhythm, batches=batches + draw.randint(0, 3))
        if draw.random() < 0.8:  # the others die while they start
            life.wait_for_batches(batches)
        time.sleep(draw.uniform(0.0, 1.0))
        life.kill(signal.SIGKILL)
        assert life.wait() == -signal.SIGKILL, life.text()
        during_save += any(not path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
        taken, first = life.ids(), life.first_step()
        assert taken == ids[first:][: len(taken)], (
            f"kill {kill}: other images than the undisturbed run saw from step {first}"
        )
        sys.stdout.write(
            f"\rkill {kill + 1} of {kills}: went on from step {first}, took {len(taken)} batches "
        )
        sys.stdout.flush()
    life = server.run(workdir, *rhythm)
    assert lives.losses(workdir) == lives.losses(expected), "other losses"
    assert lives.fingerprints(workdir, steps) == lives.fingerprints(expected, steps), (
        "other parameters"
    )
    forker.close()
    sys.stdout.write(
        f"\n{kills} kills (seed {seed}), {during_save} of them in a save, the last life went on "
        f"from step {life.first_step()} of {steps}: same ids, losses, parameters, EMA and "
        f"optimizer state, every bit; {time.monotonic() - started:.0f} s\n"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    soak(*(int(argument) for argument in (sys.argv[1:] + ["100", "0"][len(sys.argv) - 1 :])))
