"""LiT-0.6B at 512 pixels from PixArt-Sigma-XL-2-512-MS: stage one of the paper's text-to-image.

    python -m lit_jax.main --config=configs/pixart_sigma_512.py --mode=prepare
    python -m lit_jax.main --config=configs/pixart_sigma_512.py --workdir=runs/pixart_sigma_512
    python -m lit_jax.main --config=configs/pixart_sigma_512.py --workdir=runs/pixart_sigma_512 \\
        --mode=sample

docs/text_to_image.md has the whole sequence: the files that it needs, the captions, GenEval.

Hardware and time: an image costs 4.9 TFLOP, the teacher's forward pass included, and 6.1 with the
rematerialisation of this recipe. So the 40.7 million images of the run are 2.5e20 FLOPs: seven days
on one GPU that sustains 400 TFLOP/s, 22 hours on eight. --mode=plan says at most 520 images/s for
16 chips of v5e: 22 hours. The paper does not say its hardware. Not run here: there was no
PixArt-Sigma.

Expected (LiT, arXiv 2501.12976, text-to-image): GenEval overall 0.47 after this stage; PixArt-Sigma
has 0.52. The standard error of such a score is 0.008. The paper's data set is not public.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.update(
        family="pixart", size="XL", attention="linear", input_size=64, in_channels=4,
        # Fields of DiT that PixArt has not.
        num_classes=None, timestep_freq_shift=None, mlp_norm_epsilon=None,
    )  # fmt: skip
    with config.model.unlocked():  # PixArt's own fields (lit_jax/models/pixart.py)
        config.model.cross_heads = 16  # of the attention to the caption: the teacher's
        config.model.caption_channels = 4096  # of T5-XXL's features
        config.model.caption_length = 300  # tokens at most
        # Positions span base / scale on both axes: 16, 32, 64, 128 and 0.5, 1, 2, 4 for 256, 512,
        # 1024 and 2048 pixels.
        config.model.position_base = 32
        config.model.position_scale = 1.0
    # The official .pth, or a pipeline's folder.
    config.teacher.update(checkpoint="PixArt-Sigma-XL-2-512-MS.pth", size="XL")
    config.student.init = "teacher"
    # The pipeline's folder has tokenizer/, text_encoder/ and vae/.
    config.text.checkpoint = "pixart_sigma_sdxlvae_T5_diffusers"
    config.autoencoder.update(
        checkpoint="pixart_sigma_sdxlvae_T5_diffusers", scaling_factor=0.13025
    )
    config.prepare.update(source="data_info.json", image_size=512)
    # A caption says left and right. With its padded captions a batch is a gigabyte.
    config.data.update(name="text_to_image_512", dir="data", flip=False, prefetch=4)
    config.distill.update(noise_weight=1.0, variance_weight=0.05)
    # With adamw: epsilon=1e-10 or clip_norm=1.0. The clip leaves an element's gradient an rms of
    # 4e-7, which AdamW's usual 1e-8 would shorten by 2.5 %.
    config.optimizer.update(name="came", learning_rate=2e-5, warmup=1000, clip_norm=0.01)
    config.train.update(batch_size=384, steps=106_000, remat="full", preview_every=2_500)
    config.checkpoint.update(every=2_500)
    config.report.read_labels = False
    config.sample.update(
        sampler="dpm++", spacing="time_uniform", steps=20, order=2, cfg_scale=4.5,
        cfg_channels="all", prompt_file="geneval", images_per_prompt=4, batch_size=32,
    )  # fmt: skip
    config.evaluate.every = 0
    return config
