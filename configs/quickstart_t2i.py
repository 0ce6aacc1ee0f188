"""Text-to-image in small: a PixArt of digit scenes becomes a LiT in minutes on two CPU cores.

    python -m lit_jax.main --config=configs/quickstart_t2i.py

The teacher and its text encoder are lit_jax/assets/digit_scenes, a pipeline's folder of the kind
that configs/quickstart_t2i_teacher.py makes (lit_jax/assets/README.md has its trainings). The run
ends with a table of GenEval's six tasks for teacher and student, read by a detector of digits, and
their pictures side by side.
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
    # The paper inherits all but attention, and has tens of thousands of steps. In these few and
    # small ones the teacher's projections help, and its outputs teach faster without the images'
    # own noise beside them; most of all, what each of its attentions gives.
    config.inherit.load = ("q", "k", "v", "o")
    config.distill.update(noise_weight=80.0, denoising_weight=0.0, feature_weight=2.0)
    # What a caption decides, how many digits and where, is decided at the noisiest timesteps, at
    # which teacher and student differ least. Min-SNR lets these count more.
    config.train.update(
        batch_size=16, steps=1900, min_snr_gamma=0.1, vb_weight=0.01, log_every=50,
        preview_every=950,
    )  # fmt: skip
    config.optimizer.update(text_rate=1.0, learning_rate=2e-3, warmup=50, schedule="cosine")
    config.ema.decay = 0.98
    config.checkpoint.update(every=950, keep=1)
    # The ancestral sampler leaves fewer pictures without a digit than dpm++ in 20 steps.
    config.sample.update(
        sampler="ddpm", steps=50, prompts=(), prompt_file="digit_scenes", batch_size=48
    )
    config.report.update(num_images=180, read_scenes=True)
    return config
