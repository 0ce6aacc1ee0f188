"""Text-to-image in small: a PixArt that draws digit scenes becomes a LiT on two CPU cores.

    python -m lit_jax.main --config=configs/quickstart_t2i.py

The teacher and its text encoder are a pipeline's folder, workdir/digit_scenes, that the commands of
configs/quickstart_t2i_teacher.py make: none is shipped yet. The run ends with a table of GenEval's
six tasks for teacher and student, read by a detector of digits, and their pictures side by side.
"""

from configs import quickstart_t2i_teacher

TEACHER = "workdir/digit_scenes"


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
        batch_size=32, steps=1000, min_snr_gamma=0.0, log_every=25, preview_every=500
    )
    config.optimizer.update(text_rate=1.0, learning_rate=1.5e-3, warmup=25, schedule="cosine")
    config.ema.decay = 0.98
    config.checkpoint.update(every=500, keep=1)
    config.sample.update(prompts=(), prompt_file="digit_scenes", batch_size=48)
    config.report.update(num_images=180, read_scenes=True)
    return config
