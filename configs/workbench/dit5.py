"""DiT5's attention (arXiv 2605.02772) from DiT-XL/2: everything is inherited, q, k, v, o too.

    python -m lit_jax.main --config=configs/workbench/dit5.py
    python -m lit_jax.main --config=configs/workbench/dit5.py --mode=sample
    python -m lit_jax.main --config=configs/workbench/dit5.py --mode=evaluate

Aims at FID-50K 2.48 with guidance 1.5 after 8 epochs without distillation: table of the paper.

Data, teacher and time are those of configs/imagenet256_lit_xl.py. Not run here: there was no
ImageNet. docs/workbench.md has the design.
"""

from configs import imagenet256_lit_xl


def get_config():
    config = imagenet256_lit_xl.get_config()
    config.model.update(attention="dit5", conv_size=3)
    config.inherit.load = ("q", "k", "v", "o")
    config.optimizer.update(learning_rate=1e-3, inherited_rate=0.01)
    config.train.steps = 40_000  # 8 epochs
    # Not distilled: the teacher is where the student begins, and no step runs it.
    config.student.init = config.teacher.checkpoint
    config.teacher.checkpoint = ""
    return config
