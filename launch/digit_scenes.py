"""What belongs to the digit scenes besides the pictures that training composes for itself.

    python launch/digit_scenes.py workdir/scenes

    workdir/scenes/tokenizer/spiece.model    one piece for each word of the captions
    workdir/scenes/real/                     GenEval's folder: composed test pictures of its prompts
    workdir/scenes/shuffled/                 the same pictures under other prompts of their tasks

The scores of the last two are the judge's ceiling and floor:

    python -m lit_jax.main --config=configs/quickstart_t2i.py --mode=evaluate \\
        --workdir=workdir/scenes --config.evaluate.geneval=workdir/scenes/real
"""

import argparse
import pathlib
import sys

import numpy as np
from etils import epath
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from lit_jax.data import digit_scenes
from lit_jax.evaluation import geneval

SHIFT = 7  # how far a picture is moved among the prompts of its task


def write_pictures(folder: epath.Path, images: np.ndarray) -> None:
    """A GenEval folder of the prompts, with IMAGES_A_PROMPT pictures each.

    Args: images: (prompts, IMAGES_A_PROMPT, h, w, 3) uint8.
    """
    geneval.write_metadata(folder, digit_scenes.metadata())
    for prompt, pictures in enumerate(images):
        for number, picture in enumerate(pictures):
            path = geneval.image_path(folder, prompt, number)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    folder = epath.Path(parser.parse_args().folder)
    tokenizer = folder / "tokenizer" / "spiece.model"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_bytes(digit_scenes.tokenizer_model())

    rng = np.random.default_rng(0)
    digits = digit_scenes.digit_images("test")
    images = np.stack(
        [
            [digit_scenes.compose(rng, scene, digits) for _ in range(geneval.IMAGES_A_PROMPT)]
            for scene in digit_scenes.prompts()
        ]
    )
    write_pictures(folder / "real", images)
    by_task = images.reshape(
        len(digit_scenes.TASKS), digit_scenes.PROMPTS_A_TASK, *images.shape[1:]
    )
    write_pictures(folder / "shuffled", np.roll(by_task, SHIFT, axis=1).reshape(images.shape))
    print(f"{folder}: tokenizer, real, shuffled")


if __name__ == "__main__":
    main()
