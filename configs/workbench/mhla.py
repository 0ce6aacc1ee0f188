"""MHLA (arXiv 2601.07832) from DiT-XL/2: a state for each of 16 blocks of the image.

    python -m lit_jax.main --config=configs/workbench/mhla.py
    python -m lit_jax.main --config=configs/workbench/mhla.py --mode=sample
    python -m lit_jax.main --config=configs/workbench/mhla.py --mode=evaluate

Aims at FID-50K 2.54 with guidance, 8.34 without (the teacher: 9.62), after 400,000 steps of
batch 256 at 1e-4 without distillation: table of the paper.

Data, teacher and time are those of configs/imagenet256_lit_xl.py. Not run here: there was no
ImageNet. docs/workbench.md has the design.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.update(attention="mhla", num_blocks=16, conv_size=3)
    config.train.steps = 400_000
    # Not distilled: the teacher is where the student begins, and no step runs it.
    config.student.init = config.teacher.checkpoint
    config.teacher.checkpoint = ""
    return config
