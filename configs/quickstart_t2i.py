"""Text-to-image in small: a PixArt of digit scenes becomes a LiT in nine minutes on two CPU cores.

    python -m lit_jax.main --config=configs/quickstart_t2i.py

The teacher and its text encoder are lit_jax/assets/digit_scenes, a pipeline's folder that
configs/quickstart_t2i_teacher.py made. The run ends with a table of GenEval's six tasks for teacher
and student, read by a detector of digits, and their pictures side by side.
"""

from configs import quickstart_t2i_teacher
from configs.quickstart import ASSETS

TEACHER = str(ASSETS / "digit_scenes")


def get_config():
    config = quickstart_t2i_teacher.get_config()
    with config.model.unlocked():
        # The text encoder is no part of this model.
        for name in [name for name in config.model if name.startswith("text_")]:
            del config.model[name]
    config.model.update(family="pixart", attention="linear")
    config.teacher.update(checkpoint=TEACHER, dtype="float32")
    config.student.init = "teacher"
    config.text.update(checkpoint=TEACHER, tokenizer="", batch_size=32)
    # The paper's 1.0 is for tens of thousands of steps. In hundreds a larger one teaches faster.
    config.distill.noise_weight = 8.0
    config.train.update(
        steps=800, min_snr_gamma=0.0, vb_weight=1.0, log_every=25, preview_every=400
    )
    config.optimizer.update(text_rate=1.0, learning_rate=1.5e-3, warmup=25, schedule="cosine")
    config.ema.decay = 0.98
    config.checkpoint.update(every=400, keep=1)
    # The ancestral sampler leaves fewer pictures without a digit than dpm++ in 20 steps.
    config.sample.update(
        sampler="ddpm", steps=50, prompts=(), prompt_file="digit_scenes", batch_size=48
    )
    config.report.update(num_images=180, read_scenes=True)
    return config
